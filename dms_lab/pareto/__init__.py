"""Accuracy against a budget: intervals, frontiers, and the margin between two methods. Pure numpy.

intervals   of one accuracy               frontiers   what curves say of each other, where both were measured
resampling  intervals of what is computed from whole curves, over seeds and problems, paired
"""

from dms_lab.pareto.frontiers import AXES, accuracy_at, area, budget_at, common_interval, frontier, held_share, margin
from dms_lab.pareto.intervals import bootstrap_interval, mean_interval, seeds_interval, wilson_interval
from dms_lab.pareto.resampling import (
    Cell,
    difference_intervals,
    interval_of,
    margin_interval,
    ratio_intervals,
    resample,
)

__all__ = [
    "AXES",
    "Cell",
    "accuracy_at",
    "area",
    "bootstrap_interval",
    "budget_at",
    "common_interval",
    "difference_intervals",
    "frontier",
    "held_share",
    "interval_of",
    "margin",
    "margin_interval",
    "mean_interval",
    "ratio_intervals",
    "resample",
    "seeds_interval",
    "wilson_interval",
]
