"""Figures and tables of comparisons: one look a method, sizes of a paper's column, log2 budgets in plain numbers.

    accuracy_figure(points, budget)      accuracy against what the cache costs, and each curve's frontier
    ratio_figure(points, published)      accuracy against CR at equal length, published scores hollow
    margins_figure(margins, published)   margins over a baseline as bars
    retention_figure(run folder)         what each layer and head keeps over training
    save_figure(figure, path)            PNG and SVG, the same bytes each time

`points` and `margins` are the frames of `dms_lab.comparison`. A run's evaluation uses `pareto_figures` and `summary_table`,
benchmarks `benchmark_figures` and `benchmark_table`, `report.html` what `interactive` has.
"""

from dms_lab.plots.accuracy import accuracy_figure
from dms_lab.plots.axes import BUDGETS, TOKEN_BUDGETS, save_figure
from dms_lab.plots.benchmark import benchmark_figure, benchmark_figures
from dms_lab.plots.margins import margins_figure
from dms_lab.plots.ratio import ratio_figure
from dms_lab.plots.retention import retained, retention_figure
from dms_lab.plots.run import mean_over_tasks, pareto_figures, per_task
from dms_lab.plots.style import STYLE, Look, display_name, looks, looks_of_methods, sorting_key
from dms_lab.plots.tables import benchmark_table, summary_table

__all__ = [
    "BUDGETS",
    "Look",
    "STYLE",
    "TOKEN_BUDGETS",
    "accuracy_figure",
    "benchmark_figure",
    "benchmark_figures",
    "benchmark_table",
    "display_name",
    "looks",
    "looks_of_methods",
    "margins_figure",
    "mean_over_tasks",
    "pareto_figures",
    "per_task",
    "ratio_figure",
    "retained",
    "retention_figure",
    "save_figure",
    "sorting_key",
    "summary_table",
]
