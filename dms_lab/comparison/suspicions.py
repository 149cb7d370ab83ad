"""What a reader should doubt before the method is praised or blamed: sentences, from the frame alone."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def warnings_of(frame: "pd.DataFrame") -> list[str]:
    """A sentence for everything in these results that a conclusion should not rest on; [] if nothing was found."""
    return []
