"""A checkpoint gives back what was saved, and refuses by name what it is not."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from dms_lab.attachment import retrofit
from dms_lab.checkpoint import CheckpointError, fingerprint, load_checkpoint, save_checkpoint
from dms_lab.policies.dms import DmsConfig


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def saved(base_folder, tmp_path):
    model = load(base_folder)
    base = fingerprint(model)
    handle = retrofit(model, DmsConfig(window=3))
    with torch.no_grad():
        for predictor in handle.predictors.values():
            predictor.weight.normal_()
    return save_checkpoint(tmp_path / "point", handle, "adapter", str(base_folder), base, {"cr": 4}), handle


def logits(model):
    with torch.no_grad():
        return model(torch.arange(5, 45)[None]).logits


def test_a_loaded_checkpoint_computes_what_the_saved_model_did(saved, base_folder):
    folder, handle = saved
    other = load_checkpoint(folder, load(base_folder))
    assert torch.equal(logits(other.model), logits(handle.model))
    assert sorted(p.name for p in folder.parent.iterdir()) == ["point"]


def test_all_weights_are_saved_when_all_were_trained(base_folder, tmp_path):
    model = load(base_folder)
    base = fingerprint(model)
    handle = retrofit(model, DmsConfig(window=3))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    folder = save_checkpoint(tmp_path / "all", handle, "all", str(base_folder), base, {})
    assert torch.equal(logits(load_checkpoint(folder, load(base_folder)).model), logits(model))


def test_saving_again_replaces_the_folder(saved, base_folder):
    folder, handle = saved
    with torch.no_grad():
        handle.predictors[0].weight.zero_()
    save_checkpoint(folder, handle, "adapter", str(base_folder), fingerprint(load(base_folder)), {"cr": 4})
    assert load_checkpoint(folder, load(base_folder)).predictors[0].weight.abs().sum() == 0
    assert [p.name for p in folder.parent.iterdir()] == ["point"]


def refuse(folder, model, reason):
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(folder, model)
    assert getattr(model, "dms_retrofit", None) is None


def test_other_weights_of_the_same_shape_are_refused(saved, base_folder):
    model = load(base_folder)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    refuse(saved[0], model, "other weights")


def test_another_shape_is_refused(saved, base_folder):
    config = load(base_folder).config
    config.num_hidden_layers = 1
    refuse(saved[0], AutoModelForCausalLM.from_config(config), "config hash")


def test_a_truncated_file_is_refused(saved, base_folder):
    path = saved[0] / "dms.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refuse(saved[0], load(base_folder), "truncated")


def test_an_unknown_schema_and_foreign_entries_are_refused(saved, base_folder):
    path = saved[0] / "dms.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"schema_version": 99}))
    refuse(saved[0], load(base_folder), "schema version 99")
    path.write_text(json.dumps(content | {"extra": 1}))
    refuse(saved[0], load(base_folder), "extra")
    path.write_text("{")
    refuse(saved[0], load(base_folder), "not JSON")


def test_a_pickle_is_refused_by_name(saved, base_folder):
    (saved[0] / "dms.safetensors").rename(saved[0] / "dms.pt")
    refuse(saved[0], load(base_folder), "dms.pt is a pickle")
