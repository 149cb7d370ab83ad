"""Weights & Biases, beside the files: everything there also stands in them, and is made again from them by `rebuild`.

    metrics.jsonl                  -> job type train      id: hash of the configuration
    results.jsonl, examples.jsonl  -> job type evaluate   id: that, and how chains were drawn
    comparison, report.html        -> job type pareto     id: the sweep's or folder's name

The group is the sweep, the project and the entity are W&B's own (WANDB_PROJECT, WANDB_ENTITY), else project `dms_lab`.
Without an API key runs are kept offline in the folder they are of, and ``wandb sync`` sends them later as the same runs.
"""

from dms_lab.tracking.evaluation import evaluation_id, log_evaluations
from dms_lab.tracking.pareto import Comparison, log_pareto
from dms_lab.tracking.rebuild import has_results, rebuild
from dms_lab.tracking.run import Label, WandbRun
from dms_lab.tracking.training import Tracker, closing, log_training

__all__ = [
    "Comparison",
    "Label",
    "Tracker",
    "WandbRun",
    "closing",
    "evaluation_id",
    "has_results",
    "log_evaluations",
    "log_pareto",
    "log_training",
    "rebuild",
]
