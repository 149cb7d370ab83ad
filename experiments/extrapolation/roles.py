"""What is kept of each kind of token, at 512, 1,024 and 1,536 tokens: python experiments/extrapolation/roles.py

    done runs of sweep.yaml, retrofitted at 512 tokens -> held-out problems, answered -> decisions by role and length

Six chains a seed and length; a role is what a token is for in the tasks of the embedded model (`inspection.task_roles`).
"""

from pathlib import Path

from dms_lab import inspection, terminal
from dms_lab.sweep_config import load_sweep
from dms_lab.sweeping.points import expand

FOLDER = Path(__file__).parent
LENGTHS = (512, 1024, 1536)


def main() -> None:
    """Prints the percentage of decisions to keep by role, and the ratio and the live slots of whole chains, by length."""
    terminal.quiet()
    chains = []
    for point in expand(load_sweep(FOLDER)):
        if point.command == "train" and point.config.context == 512:
            place = Path(point.folder) / "checkpoints" / f"cr{point.config.cr:g}"
            for problem_seed in range(2):
                chains += inspection.inspect_checkpoint(place, LENGTHS, problem_seed=problem_seed)
    kept = inspection.kept_share(inspection.tidy(chains, inspection.task_roles), ["type", "length"])
    print((100 * kept.pivot(index="type", columns="length", values="kept")).round(1).to_string())
    ends = inspection.cr_by_length(chains).groupby("chain").last()
    print(ends.groupby("length")[["measured_cr", "live", "right"]].mean().round(2).to_string())


if __name__ == "__main__":
    main()
