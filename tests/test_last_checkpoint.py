"""`last.ckpt` is written where it belongs or not at all, and read by each process as far as it needs it."""

import tempfile
from pathlib import Path

import pytest
import torch

from dms_lab.training.last_checkpoint import StraightFile
from dms_lab.training.run import train
from dms_lab.training.stopping import GracefulStop

CHECKPOINT = {"state_dict": {"a": torch.arange(200_000.0)}, "global_step": 3}


def test_a_checkpoint_is_read_as_it_was_written_by_mapping_the_file(tmp_path):
    StraightFile().save_checkpoint(CHECKPOINT, tmp_path / "last.tmp")
    found = StraightFile().load_checkpoint(tmp_path / "last.tmp")
    assert found["global_step"] == 3
    assert torch.equal(found["state_dict"]["a"], CHECKPOINT["state_dict"]["a"])
    assert "last.tmp" in Path("/proc/self/maps").read_text()


def test_a_full_disk_is_told_as_that_and_leaves_nothing(tmp_path):
    (tmp_path / "last.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        StraightFile().save_checkpoint(CHECKPOINT, tmp_path / "last.tmp")
    assert list(tmp_path.iterdir()) == []


def test_a_run_saves_without_the_temporary_folder_of_the_system(make_config, tmp_path, monkeypatch):
    class Saved(GracefulStop):
        def __init__(self, folder, **options):
            super().__init__(folder, every=2, **options)

    monkeypatch.setattr("dms_lab.training.run.GracefulStop", Saved)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    assert train(make_config(), progress=False).finished
