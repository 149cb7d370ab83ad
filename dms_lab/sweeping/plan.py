"""What `submit --dry-run` prints: the jobs, what they cost, and what that is assumed from."""

from collections.abc import Sequence

from rich.table import Table

from dms_lab.config import num_processes
from dms_lab.sweep_config import SweepConfig
from dms_lab.sweeping import cost
from dms_lab.sweeping.cost import Cost, costs
from dms_lab.sweeping.memory import host_bytes, saved_bytes, weight_bytes
from dms_lab.sweeping.points import Point
from dms_lab.sweeping.resources import load_cluster, resources_of, slurm_parameters
from dms_lab.sweeping.shapes import shape_of
from dms_lab.sweeping.slurm import job_name
from dms_lab.sweeping.state import PointState
from dms_lab.sweeping.step_memory import step_memory
from dms_lab.sweeping.tables import console


def print_plan(sweep: SweepConfig, states: Sequence[PointState]) -> None:
    """Prints what a submission would do now."""
    todo = [state.point for state in states if state.is_free]
    done, active = (sum(test(state) for state in states) for test in (lambda s: s.state == "done", lambda s: s.is_active))
    out = console()
    out.print(f"{sweep.name}: {len(states)} points, {done} done, {active} queued or running, {len(todo)} to submit")
    table = Table(
        "Model", "Trained", "Done", "Left", "Tokens", "Device hours", "At least", "Disk", "Evaluations", "Hours by"
    )
    found = costs(states)
    for row in [*found, *([_total(found)] if len(found) > 1 else [])]:
        table.add_row(*_cells(row))
    out.print(table)
    for line in (*_jobs(sweep, todo), *_working(sweep, todo), *_gpu_memory(sweep, todo), *assumptions(found)):
        out.print(line, highlight=False, markup=False)


def _cells(row: Cost) -> tuple[str, ...]:
    return (
        row.model,
        row.trained,
        str(row.num_done),
        str(row.num_left),
        f"{row.tokens / 1e6:,.1f} M" if row.tokens else "-",
        "?" if row.hours is None else f"{row.hours:,.2f}" if row.tokens else "-",
        "" if row.least_hours is None else f"{row.least_hours:,.2f}",
        "?" if row.disk_bytes is None else size(row.disk_bytes),
        str(row.num_evaluations),
        row.basis,
    )


def _total(rows: Sequence[Cost]) -> Cost:
    def added(name: str) -> float | None:
        values = [getattr(row, name) for row in rows]
        return None if None in values else sum(values)

    sums = {name: added(name) for name in ("num_done", "num_left", "tokens", "hours", "disk_bytes", "num_evaluations")}
    return Cost(model="all", trained="", least_hours=None, basis="", **sums)


def _jobs(sweep: SweepConfig, points: Sequence[Point]) -> list[str]:
    """A line for each array of jobs, or one for this machine."""
    if sweep.cluster == "local":
        return [f"jobs: {len(points)} on this machine, {min(sweep.workers, len(points))} at a time"] if points else []
    cluster = load_cluster("slurm")
    arrays: dict[str, int] = {}
    for point in points:
        asked = slurm_parameters(point, resources_of(point, sweep, cluster), job_name(sweep))
        passing = ("name", "slurm_srun_args", "slurm_additional_parameters", "slurm_setup")
        words = " ".join(f"{key.removeprefix('slurm_')}={value}" for key, value in asked.items() if key not in passing)
        arrays[words] = arrays.get(words, 0) + 1
    return [f"jobs: {count} in Slurm, each {words}" for words, count in arrays.items()]


def _working(sweep: SweepConfig, points: Sequence[Point]) -> list[str]:
    """What runs at work take, beside what they leave: of the disk, of a node's memory, of the GPU that evaluates."""
    known = [(p.config, shape) for p in points if p.command == "train" and (shape := shape_of(p.config.model))]
    if not known:
        return []
    lines = [f"disk, while it trains: up to {size(max(saved_bytes(*run) for run in known))} a run more (last.ckpt)"]
    large = [run for run in known if run[1].num_parameters >= cost.SMALL]
    if large:
        lines.append(f"memory of a node, to load and to save: up to {size(max(host_bytes(*run) for run in large))} a run")
    if shared := [weight_bytes(*run) for run in large if num_processes(run[0]) > 1 and run[0].eval_after]:
        lines.append(
            "evaluation: one process on one GPU, however many trained the run; it holds all weights, up to "
            f"{size(max(shared))}, and the caches, while the job's other GPUs wait. With eval_after=false a part with "
            "command: evaluate and checkpoint=<run> is a job of one GPU for benchmarks"
        )
    return lines


def _gpu_memory(sweep: SweepConfig, points: Sequence[Point]) -> list[str]:
    """The peak of a GPU in training, a line for each kind of run, and a warning where it is more than the GPU has."""
    cluster = load_cluster(sweep.cluster)
    kinds: dict[str, tuple[float, float | None]] = {}
    for point in points:
        config = point.config
        shape = shape_of(config.model) if point.command == "train" else None
        if shape is None or shape.num_parameters < cost.SMALL:
            continue
        found = step_memory(config, shape)
        words = f"{config.model.name} trained={config.trained}, {config.batch_size} x {config.context:,} tokens"
        words += f", {num_processes(config)} GPUs, {config.strategy}" if num_processes(config) > 1 else ""
        words += f": {size(found.peak)} ({size(found.kept)} of it weights and what is kept of them)"
        kinds[words] = (found.peak, resources_of(point, sweep, cluster).gpu_memory_gb)
    lines = [f"memory of a GPU at the peak of a step, {words}" for words in kinds]
    for words, (peak, limit) in kinds.items():
        if limit is not None and peak > limit * 1e9:
            lines.append(
                f"warning: {words.partition(':')[0]} would not fit the {limit:g} GB of gpu_memory_gb; lower batch_size or "
                "context, train less (trained=adapter), keep model.gradient_checkpointing, or cut the weights "
                "(strategy=fsdp devices=8)"
            )
    return lines


def assumptions(rows: Sequence[Cost]) -> list[str]:
    """What the figures rest on, a sentence each, as far as it was used."""
    used = {row.basis for row in rows}
    rate, assumed = f"{cost.PUBLISHED_TOKENS_PER_SECOND:,.0f}", f"{cost.CPU_TOKENS_PER_SECOND:,.0f}"
    sentences = {
        cost.MEASURED: "at the tokens a second that runs of the model have logged in this sweep",
        cost.PUBLISHED: (
            "H100 hours of the retrofit of all weights in Lancucki et al. 2025, Table 3, by the tokens of its recipe there"
        ),
        cost.SCALED: (
            f"at {rate} tokens a second of an H100 for Qwen3-8B (the reference recipe: 142.6 M tokens in about 4 h on 8), "
            "inversely to the number of parameters"
        ),
        cost.ASSUMED: f"at {assumed} tokens a second of one thread for the embedded model, inversely to the parameters",
    }
    found = ["tokens: steps * batch_size * accumulate * context, of the steps that are left of every run"]
    found += [f"device hours, {basis}: {sentence}" for basis, sentence in sentences.items() if basis in used]
    if any(row.least_hours is not None for row in rows):
        found.append(
            "at least: 8 operations a parameter and token, 10 with trained=all, at "
            f"{100 * cost.SHARE_OF_PEAK:.0f} % of an H100's {cost.PEAK_FLOPS / 1e12:.0f} TFLOPS; attention not counted"
        )
    found.append("evaluations take no hours here: how long the chains are is what they find out")
    found.append(
        f"disk: trained parameters in float32 a member of cr_family, and {size(cost.RESULTS_BYTES)} of figures a run"
    )
    return found


def size(num_bytes: float) -> str:
    """Bytes in words."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:,.1f} {unit}"
    return f"{num_bytes / 1e3:,.0f} kB"
