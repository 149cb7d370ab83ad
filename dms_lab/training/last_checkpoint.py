"""How `last.ckpt` gets to the disk and back: straight, without a second copy of it in memory.

Lightning's own way pickles a checkpoint into memory, copies it into the system's temporary folder and moves it from there;
and every process reads a file whole into its own memory. With all weights of a large model neither fits.
"""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO


class StraightFile(TorchCheckpointIO):
    """Writes a checkpoint where it was asked for, a tensor at a time, and maps it into memory to read it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes the file and waits for the disk. If that fails nothing is left of it; a full disk is an `OSError`."""
        try:
            with Path(path).open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except BaseException as error:
            Path(path).unlink(missing_ok=True)
            if (cause := _os_error(error)) is not None:
                raise cause from None
            raise

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The checkpoint on the CPU: pages are read as tensors are used, and shared by the processes of a node."""
        return torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)


def _os_error(error: BaseException | None) -> OSError | None:
    """The `OSError` that is behind an error: torch hides it behind a file that it cannot end either."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error
