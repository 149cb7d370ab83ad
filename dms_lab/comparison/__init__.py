"""From a frame of results to what is said about methods: points, margins, equal accuracy, equal budget, warnings.

    results.load -> points (rows of one budget, over tasks and seeds) -> curves (points of one method) -> frames

A curve is (model, method, variant), over the tasks that its points share. Every frame has accuracies in [0, 1].
"""

from dms_lab.comparison.curves import equal_accuracy, equal_budget, margins
from dms_lab.comparison.points import BUDGETS, PROBLEMS, SEEDS, curve_points, label
from dms_lab.comparison.suspicions import warnings_of

__all__ = [
    "BUDGETS",
    "PROBLEMS",
    "SEEDS",
    "curve_points",
    "equal_accuracy",
    "equal_budget",
    "label",
    "margins",
    "warnings_of",
]
