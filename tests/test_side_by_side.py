"""Runs side by side end as runs alone, stop together and go on together."""

import dataclasses
import os
import signal
import threading
import time

import pytest
from safetensors.torch import load_file

from dms_lab.training.run import train
from dms_lab.training.side_by_side import train_all


def weights(outcome):
    return load_file(outcome.checkpoint(4) / "dms.safetensors")


@pytest.fixture
def runs(make_config, tmp_path):
    def make(names="abc", **changes):
        return {name: make_config(out=str(tmp_path / name), seed=seed, **changes) for seed, name in enumerate(names)}

    return make


def test_runs_side_by_side_give_the_weights_of_runs_alone(runs, make_config, tmp_path):
    outcomes = train_all(runs("ab"), workers=2)
    assert all(outcome.finished for outcome in outcomes.values())
    for seed, name in enumerate("ab"):
        alone = weights(train(make_config(out=str(tmp_path / f"alone_{name}"), seed=seed), progress=False))
        found = weights(outcomes[name])
        assert all((found[key] == alone[key]).all() for key in alone)


def test_a_signal_reaches_every_run_and_the_same_call_would_go_on(runs, tmp_path):
    configs = runs(steps=4000, log_every=1)

    def stop_when_two_run():
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not all((tmp_path / n / "metrics.jsonl").is_file() for n in "ab"):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_when_two_run, daemon=True).start()
    outcomes = train_all(configs, workers=2)
    assert {outcome.stopped_by for outcome in outcomes.values()} == {"SIGTERM"}
    assert not any(outcome.finished for outcome in outcomes.values())
    assert [(tmp_path / n / "last.ckpt").is_file() for n in "abc"] == [True, True, False]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.slow
def test_a_run_that_fails_ends_the_others_and_is_named(runs, tmp_path):
    configs = runs(steps=4000)
    missing = dataclasses.replace(configs["b"].model, path=str(tmp_path / "nowhere"))
    configs["b"] = dataclasses.replace(configs["b"], model=missing)
    with pytest.raises(ValueError, match="the run b failed"):
        train_all(configs, workers=2)
