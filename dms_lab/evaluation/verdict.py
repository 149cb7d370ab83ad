"""What a grader says about one answer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """`score` in [0, 1], 1 for right. `answer` is what a majority vote counts, normalised; None does not vote.

    `note` says why in a few words where there is more to say than right or wrong: no answer found, a limit that was hit,
    two checkers that disagree.
    """

    score: float
    answer: str | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.score <= 1:
            raise ValueError(f"score={self.score} must lie in [0, 1]")
