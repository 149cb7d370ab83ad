"""What `tasks=list` prints: this project's tasks, their sizes, licences and what full attention should score."""

from rich.table import Table

from dms_lab import terminal
from dms_lab.evaluation.benchmarks import BENCHMARKS, TASKS, TOLERANCE
from dms_lab.evaluation.sets import SETS

_GENERATED = {
    "ruler": "per length, generated; RULER's definition, 4k to 128k tokens",
    "embedded": "generated; for the embedded model",
}


def task_table() -> Table:
    """A row a task."""
    table = Table(title="Tasks of dms_lab; expected: full attention, percent, 32k tokens, temperature 0.6, top-p 0.95")
    for name in ("task", "problems", "licence", "access", "several chains", "expected"):
        table.add_column(name, overflow="fold")
    for task, benchmark in BENCHMARKS.items():
        info = SETS.get(task.removeprefix("dms_"))
        expected = ", ".join(f"{model} {score:g}" for model, score in benchmark.expected.items())
        if info is None:
            row = (_GENERATED[benchmark.kind], "Apache-2.0", "made here")
        else:
            access = f"gated: accept the terms on {info.page}, then `hf auth login`" if info.gated else info.hub_id
            fewer = "; fewer between eval.start and eval.end" if benchmark.kind == "code" else ""
            row = (f"{info.num_problems}{fewer}", info.licence, access)
        table.add_row(task, *row, benchmark.headline, expected and f"{expected} (± {TOLERANCE:g})")
    return table


def print_tasks() -> None:
    """Prints the tasks, and how lm-eval's own command finds them."""
    console = terminal.console()
    console.print(task_table())
    console.print("limit=<n> takes the first n problems of each. Any other name is looked up among lm-eval's own tasks.")
    console.print(f"For lm-eval's own command the task files are in {TASKS}", soft_wrap=True)
