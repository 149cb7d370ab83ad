"""A terminal for what a user should read: the notices of libraries that ask nothing of anybody stay away."""

import logging
import os
import sys
import warnings

from rich.console import Console

# Each is about a choice that this project makes on purpose, or about a library's own future.
_NOTICES = (
    r".*LeafSpec.* is deprecated",
    r"Found \d+ module\(s\) in eval mode at the start of training",  # teacher and student without dropout
    r"You're resuming from a checkpoint that ended before the epoch ended",  # the loader only counts steps
    r"The '?train_dataloader'? does not have many workers",
    r"The `srun` command is available on your system but is not used",  # one process is what was asked for
    r".*`gradient_checkpointing_enable` is deprecated",
)


def console() -> Console:
    """Where tables go: as wide as the terminal, and wide enough for them in a file or pipe."""
    return Console(width=None if sys.stdout.isatty() else 140)


def quiet(trains: bool = False) -> None:
    """Silences transformers' notices in this process and those it starts; warnings of others remain.

    `trains`: Lightning's as well, whose import takes seconds.
    """
    if trains:
        import lightning.pytorch  # noqa: F401  sets its loggers' levels when imported: they must be set after that

        for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
            logging.getLogger(name).setLevel(logging.ERROR)
    for notice in _NOTICES:
        warnings.filterwarnings("ignore", message=notice)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
