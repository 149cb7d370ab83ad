"""One checkpoint at other ratios: the threshold is found, the rest of the model stays as it was."""

import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from dms_lab import calibration
from dms_lab.attachment import retrofit
from dms_lab.cache.compact import CompactCache
from dms_lab.evaluation import dialled, suite
from dms_lab.evaluation.attached import identity_of
from dms_lab.evaluation_config import ratios
from dms_lab.policies.dms import DmsConfig


@pytest.fixture
def handle(base_folder):
    """A model whose predictors decide by chance: ratios between 1 and what the window allows."""
    handle = retrofit(AutoModelForCausalLM.from_pretrained(base_folder).eval(), DmsConfig(window=4, offset=0.0))
    torch.manual_seed(0)
    for predictor in handle.predictors.values():
        torch.nn.init.normal_(predictor.weight, std=0.05)
    return handle


@pytest.fixture
def texts(handle):
    rng = random.Random(0)
    size = handle.model.config.vocab_size
    return [[rng.randrange(4, size) for _ in range(length)] for length in (64, 96, 128)]


@pytest.mark.parametrize("cr", [1.2, 2.0, 4.0, 9.0])
def test_the_text_is_compressed_as_much_as_was_asked_for(handle, texts, cr):
    found = calibration.dial(handle, texts, cr)
    assert found.measured_cr == pytest.approx(cr, rel=0.02)
    assert calibration.measured_cr(handle, texts) == pytest.approx(found.measured_cr)
    assert handle.config.offset == pytest.approx(found.threshold)  # it was 0


def test_a_ratio_that_no_threshold_gives_is_told(handle, texts, caplog):
    for predictor in handle.predictors.values():
        torch.nn.init.zeros_(predictor.weight)  # all decisions are alike: everything is kept, or the window alone
    found = calibration.dial(handle, texts, 3.0)
    assert abs(found.measured_cr / 3.0 - 1) > 0.01
    assert f"cr=3 was not met: the nearest threshold compresses the calibration text {found.measured_cr:.3f}" in caplog.text


def test_more_than_was_learned_is_told_and_less_is_not(handle, texts, caplog):
    as_it_is = calibration.measured_cr(handle, texts)
    calibration.dial(handle, texts, 0.9 * as_it_is)
    assert caplog.text == ""
    now = calibration.measured_cr(handle, texts)
    calibration.dial(handle, texts, as_it_is)  # more than what was set before
    assert f"cr={as_it_is:g} is above the {now:.2f} times that this text is compressed" in caplog.text


def test_the_compact_cache_holds_what_was_measured(handle, texts):
    calibration.dial(handle, texts, 3.0)
    live = 0.0
    for ids in texts:
        cache = CompactCache(handle.policy())
        handle.model(input_ids=torch.tensor([ids]), past_key_values=cache)
        live += float(cache.live_slots().float().mean())
    assert sum(map(len, texts)) / live == pytest.approx(calibration.measured_cr(handle, texts))


@pytest.mark.parametrize("cr", [0.5, 24.0, 1000.0])  # 288 tokens, 12 of them in windows
def test_a_ratio_out_of_reach_is_refused_and_nothing_has_moved(handle, texts, cr):
    with pytest.raises(ValueError, match=r"out of reach on this text.*below 24.00"):
        calibration.dial(handle, texts, cr)
    assert handle.config.offset == 0.0
    assert all(predictor.offset == 0.0 for predictor in handle.predictors.values())


def test_a_forward_that_fails_leaves_the_threshold_where_it_was(handle, texts):
    with pytest.raises(IndexError):
        calibration.dial(handle, [*texts, [10**9]], 3.0)
    assert handle.config.offset == 0.0


def test_without_text_or_predictors_it_says_what_is_missing(handle, base_folder):
    with pytest.raises(ValueError, match="at least one document"):
        calibration.dial(handle, [], 2.0)
    plain = retrofit(AutoModelForCausalLM.from_pretrained(base_folder), None)
    with pytest.raises(ValueError, match="has no predictor"):
        calibration.dial(plain, [[5, 6]], 2.0)


def test_a_cache_from_before_refuses_to_go_on(handle, texts):
    cache = CompactCache(handle.policy())
    ids = torch.tensor([texts[0]])
    handle.model(input_ids=ids[:, :8], past_key_values=cache)
    calibration.dial(handle, texts, 2.0)
    with pytest.raises(ValueError, match=r"make the cache with handle\.policy"):
        handle.model(input_ids=ids[:, 8:16], past_key_values=cache)


def test_ratios_are_one_or_several():
    assert ratios(6) == (6.0,)
    assert ratios([3, 4.5]) == (3.0, 4.5)
    for wrong in (0.5, "six", [2, True], float("nan")):
        with pytest.raises(ValueError, match="is not a compression ratio"):
            ratios(wrong)


# -- of a run ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def run(make_config, tmp_path):
    from dms_lab.training.run import train

    config = make_config(out=str(tmp_path / "run"))
    return config, train(config, progress=False).folder


def test_a_dialled_checkpoint_is_another_model_to_the_store(run):
    config, folder = run
    from dms_lab import models

    tokenizer = models.load_tokenizer(config.model)
    (job,) = dialled.dialled_jobs(folder, [3.0], config, None, tokenizer)
    assert job.checkpoint == folder / "checkpoints" / "cr4"  # the highest member
    plain = suite.Job("dms", 4.0, checkpoint=job.checkpoint)
    with suite.loaded(config.model, plain) as handle:
        before = identity_of(handle, plain.checkpoint)
    with suite.loaded(config.model, job) as handle:
        assert identity_of(handle, job.checkpoint) == before | {"offset": handle.config.offset}
        assert handle.config.offset != 5.0
        assert calibration.measured_cr(handle, job.calibration) == pytest.approx(3.0, rel=0.02)


def test_own_text_is_what_the_ratio_is_reached_on(run, tmp_path):
    config, _ = run
    from dms_lab import models

    tokenizer = models.load_tokenizer(config.model)
    (tmp_path / "mine.py").write_text("def f(x):\n    return x + 1\n" * 40)
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({"text": f"x = {i} + {i}\n" * 20}) + "\n" for i in range(5)))
    for name in ("mine.py", "mine.jsonl"):
        rows = dialled.calibration_rows(config, str(tmp_path / name), tokenizer)
        assert rows
        assert max(map(len, rows)) <= config.context
    (tmp_path / "empty.py").write_text("x")
    with pytest.raises(ValueError, match="holds no document of 32 tokens"):
        dialled.calibration_rows(config, str(tmp_path / "empty.py"), tokenizer)
    with pytest.raises(ValueError, match="names its data; give calibrate="):
        dialled.calibration_rows(None, None, tokenizer)


def test_a_fixed_window_has_no_threshold(make_config, tmp_path):
    config = make_config(method="streaming_llm", trained="all")
    with pytest.raises(ValueError, match="has a fixed window"):
        dialled.dialled_jobs(tmp_path, [2.0], config, None, None)
