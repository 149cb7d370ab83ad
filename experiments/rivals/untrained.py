"""An untrained rule at the live tokens of DMS, without its trainings: python experiments/rivals/untrained.py keydiff

    results.csv -> what each seed's DMS kept -> what the evaluation of a run measures of a rule -> rows in results.csv

For a rule that came after the sweep was collected. Its rows are those that the evaluation of the runs would have written:
an untrained rule knows of a run its budget, the problems of its seed and its name. Earlier rows of the rule are replaced.
"""

import sys
from pathlib import Path

import pandas as pd

from dms_lab import results
from dms_lab.evaluation.report import subject_of
from dms_lab.evaluation.suite import Job, measure
from dms_lab.policies import HEURISTICS
from dms_lab.sweep_config import load_sweep
from dms_lab.sweeping.points import expand

FOLDER = Path(__file__).parent


def jobs(frame: pd.DataFrame, rule: str) -> dict[str, list[Job]]:
    """What there is to measure of a rule beside each run: at each ratio, the live tokens that its other rivals had."""
    found: dict[str, set[tuple[float, int]]] = {}
    for row in frame[frame["method"].isin(HEURISTICS)].to_dict("records"):
        found.setdefault(row["run_id"], set()).add((row["target_cr"], row["settings"]["live_tokens"]))
    return {run: [Job(rule, cr, budget=live) for cr, live in sorted(cases)] for run, cases in found.items()}


def main() -> None:
    """Measures and writes `results.csv`."""
    rule, table = sys.argv[-1], FOLDER / "results.csv"
    if rule not in HEURISTICS:
        raise SystemExit(f"error: {rule!r} is no untrained rule; choose one of {', '.join(HEURISTICS)}")
    frame = results.load(table)
    asked, rows = jobs(frame, rule), []
    for point in expand(load_sweep(FOLDER / "sweep.yaml")):
        for job in asked.get(point.name, []):
            found, _ = measure(subject_of(point.config, Path(point.folder), {}), job)
            rows += [vars(result) for result in found]
            scores = [f"{result.task} {result.perplexity or result.accuracy:.3f}" for result in found]
            print(f"{point.name} at CR {job.target_cr:g}: {', '.join(scores)}", flush=True)
    results.save_csv(pd.concat([frame[frame["method"] != rule], pd.DataFrame(rows)]), table)


if __name__ == "__main__":
    main()
