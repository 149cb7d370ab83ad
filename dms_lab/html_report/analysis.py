"""Everything that is said about some results, computed once: what the tables, figures, report and W&B show."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dms_lab import comparison, published

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Analysis:
    """Frames of `comparison` for one frame of results; `margins_by_cr` has a curve for each CR of a method.

    Frames against the baseline are empty where only perplexities were measured, or the baseline alone. `published_scores`
    and `published_margins` are what was published of the models in `frame`.
    """

    frame: "pd.DataFrame"
    against: str
    within: float
    points: "pd.DataFrame"
    margins: "pd.DataFrame"
    margins_by_cr: "pd.DataFrame"
    equal_accuracy: "pd.DataFrame"
    equal_budget: "pd.DataFrame"
    published_scores: "pd.DataFrame"
    published_margins: "pd.DataFrame"
    warnings: list[str]

    @property
    def has_accuracies(self) -> bool:
        """Whether there is anything to draw."""
        return bool(self.points["accuracy"].notna().any())


def analyse(frame: "pd.DataFrame", against: str = "full", within: float = 0.0) -> Analysis:
    """Compares the results with each other, with `against` at equal budgets and accuracies, and with what was published.

    `within` is how much less accurate than the baseline counts as equal, as a share. Raises `ValueError` for one that is
    none, and if there are accuracies, but none of `against`.
    """
    import pandas as pd

    if not 0 <= within <= 1:
        raise ValueError(f"an accuracy {100 * within:g} points lower cannot count as equal; give 0 to 100 points")

    points = comparison.curve_points(frame)
    models = set(frame["model"])
    versus = [pd.DataFrame(columns=["model", "tasks", name]) for name in ("margin", "margin", "at_least", "difference")]
    if points["accuracy"].notna().any():
        found = [
            comparison.margins(frame, against),
            comparison.margins(frame, against, by="target_cr"),
            comparison.equal_accuracy(frame, against, within=within),
            comparison.equal_budget(frame, against),
        ]
        versus = [table if len(table) else empty for table, empty in zip(found, versus, strict=True)]
    scores, margins = published.scores(), published.margins()
    scores, margins = scores[scores["model"].isin(models)], margins[margins["model"].isin(models)]
    return Analysis(frame, against, within, points, *versus, scores, margins, comparison.warnings_of(frame))


def select_tasks(frame: "pd.DataFrame", tasks: list[str]) -> "pd.DataFrame":
    """The rows of these tasks; all without any. Raises `ValueError` for a task that no row has."""
    if not tasks:
        return frame
    known = sorted(frame["task"].unique())
    unknown = [task for task in tasks if task not in known]
    if unknown:
        raise ValueError(f"task {unknown[0]!r} is not in these results; choose from {', '.join(known)}")
    return frame[frame["task"].isin(tasks)].reset_index(drop=True)
