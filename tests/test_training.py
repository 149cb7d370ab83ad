"""Training goes on where it stopped, bit for bit, and leaves what it promised."""

import dataclasses
import gc
import json
import os
import re
import signal
import time
from pathlib import Path

import compiled_step
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dms_lab import attention_function, distillation
from dms_lab.attention import soft
from dms_lab.attention_function import Relaxation
from dms_lab.training import run
from dms_lab.training.module import Optimizer
from dms_lab.training.run import build_module, train
from dms_lab.training.stopping import GracefulStop


def weights(outcome, cr=4):
    return load_file(outcome.checkpoint(float(cr)) / "dms.safetensors")


def assert_same(one, two):
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


MIXED = {"trained": "all", "precision": "bf16-mixed"}
NEURON = {"predictor": "neuron", "trained": "all", "neuron_zeroing_steps": 3, "cr_family": (4.0,), "scale": 10.0}


@pytest.mark.parametrize(
    "changes",
    [
        *({"average": 0.5}, {"accumulate": 2}, {"data": "text"}),
        *({"trained": "all"}, {"trained": "lora"}, MIXED, NEURON | {"steps": 5}),
    ],
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_resumes_to_the_same_weights_bit_for_bit(make_config, tmp_path, monkeypatch, changes, number):
    if changes.get("data") == "text":
        from dms_lab.config import DataConfig

        changes = {"data": DataConfig("text", str(Path(run.__file__).parent))}
    whole = train(make_config(out=str(tmp_path / "whole"), **changes), progress=False)

    class Stopped(GracefulStop):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == 3 and not self.stopped_by and not self.path.exists():
                os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(run, "GracefulStop", Stopped)
        first = train(make_config(out=str(tmp_path / "cut"), **changes), progress=False)
    assert not first.finished
    assert first.stopped_by == signal.Signals(number).name
    assert (first.folder / "last.ckpt").is_file()
    second = train(make_config(out=str(tmp_path / "cut"), **changes), progress=False)
    assert second.finished
    assert_same(weights(second), weights(whole))
    for cr in whole.folder.glob("checkpoints/cr*"):
        assert_same(weights(second, cr.name[2:]), weights(whole, cr.name[2:]))


def test_training_leaves_the_signal_handlers_as_they_were(make_config):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(make_config(), progress=False)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_run_that_goes_on_computes_with_as_many_threads_as_before(make_config, monkeypatch):
    set_to = []
    monkeypatch.setattr("dms_lab.training.run.set_threads", lambda asked: set_to.append(asked) or asked or 5)
    folder = train(make_config(), progress=False).folder
    assert json.loads((folder / "config.json").read_text())["threads"] == 5
    (folder / "done.json").unlink()
    train(make_config(), progress=False)
    train(make_config(threads=2, resume=False), progress=False)
    assert set_to == [None, 5, 2]


def test_a_finished_run_is_not_trained_again(make_config):
    outcome = train(make_config(), progress=False)
    before = (outcome.folder / "metrics.jsonl").read_text()
    assert train(make_config(), progress=False).finished
    assert (outcome.folder / "metrics.jsonl").read_text() == before


def test_a_folder_with_a_run_of_another_configuration_is_refused(make_config):
    outcome = train(make_config(), progress=False)
    with pytest.raises(ValueError, match="holds a run of another configuration"):
        train(make_config(seed=1), progress=False)
    before = weights(outcome)
    nowhere = dataclasses.replace(make_config().model, path=str(outcome.folder / "nowhere"))
    with pytest.raises(ValueError, match="no weights for"):
        train(make_config(model=nowhere, resume=False), progress=False)
    assert_same(before, weights(outcome))
    train(make_config(seed=1, resume=False), progress=False)
    assert not all(torch.equal(before[name], tensor) for name, tensor in weights(outcome).items())
    assert len((outcome.folder / "metrics.jsonl").read_text().splitlines()) == 3


def test_metrics_hold_what_is_promised(make_config):
    outcome = train(make_config(), progress=False)
    rows = [json.loads(line) for line in (outcome.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    promised = "kl lm_loss target_cr cr_soft cr_hard evicted_soft evicted_hard retained_per_head tokens_per_second"
    assert {*promised.split(), "peak_memory_bytes"} <= set(rows[0])
    assert len(rows[0]["retained_per_head"]) == 2
    assert rows[-1]["target_cr"] == 4.0


def test_only_predictors_are_trained_and_saved_by_default(make_config):
    module, _ = build_module(make_config())
    assert all("dms_predictor" in name for name in module.trained_names)
    saved = weights(train(make_config(), progress=False))
    assert set(saved) == module.trained_names


@pytest.mark.parametrize("trained", ["adapter", "lora"])
def test_a_frozen_base_stays_in_bfloat16_and_small_steps_of_what_is_trained_are_kept(make_config, monkeypatch, trained):
    config = make_config(trained=trained, lr=3e-5, adapter_lr=3e-5)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))
    seen, before = [], {id(x) for x in gc.get_objects() if issubclass(type(x), torch.Tensor)}

    class Looks(GracefulStop):
        def on_train_batch_end(self, trainer, module, *rest):
            super().on_train_batch_end(trainer, module, *rest)
            base = [p for n, p in module.model.named_parameters() if n not in module.trained_names]
            assert {p.dtype for p in base} == {torch.bfloat16}
            assert not any(p.requires_grad or p.grad is not None for p in base)
            assert {p.dtype for p in module.trained.values()} == {torch.float32}
            [optimizer] = trainer.optimizers
            held = [p for group in optimizer.param_groups for p in group["params"]]
            assert {id(p) for p in held} == {id(p) for p in module.trained.values()}
            assert {m.dtype for state in optimizer.state.values() for m in state.values()} == {torch.float32}
            shapes = {p.shape for p in base if p.ndim > 1}
            alive = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and id(x) not in before]
            assert not [x.shape for x in alive if x.dtype == torch.float32 and x.shape in shapes]
            seen.append(len(base))

    monkeypatch.setattr(run, "GracefulStop", Looks)
    saved = weights(train(config, progress=False))
    assert len(seen) == 6
    norms = [tensor for name, tensor in saved.items() if name.endswith("norm_weight")]
    assert norms
    for norm in norms:  # they begin at 1, beside which bfloat16 has nothing nearer than 0.004
        assert 0 < (norm - 1).abs().max() < 6 * 3e-5 * 1.01
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


@pytest.mark.parametrize("changes", [{}, {"predictor": "neuron"}, {"attention": "reference"}])
def test_in_mixed_precision_products_are_low_and_the_loss_is_near_that_in_float32(make_config, monkeypatch, changes):
    attend, diverge, seen, losses = attention_function.soft_attention, distillation._forward_kl, {}, []

    def noted(name, function):
        def call(*x, **settings):
            seen.setdefault(name, []).append([y.dtype for y in x if isinstance(y, torch.Tensor) and y.is_floating_point()])
            return function(*x, **settings)

        return call

    monkeypatch.setattr(attention_function, "soft_attention", noted("attention", attend))
    monkeypatch.setattr(distillation, "_forward_kl", noted("loss", diverge))
    for precision, product in (("auto", torch.float32), ("bf16-mixed", torch.bfloat16)):
        seen.clear()
        module, _ = build_module(config := make_config(trained="all", precision=precision, **changes))
        module.on_fit_start()
        batch = run.RetrofitData(config, run.models.load_tokenizer(config.model)).batch(0)
        [teacher] = module.teacher_handles
        with torch.no_grad():
            hidden = [module._hidden(x.model, batch, x.off(batch["document"])) for x in (teacher, module.handle)]
            assert torch.equal(*hidden)
            start = module.loss(batch, 0)
            assert "predictor" in changes or start < 1e-5  # a neuron that is taken away leaves a gap
            for predictor in module.handle.predictors.values():
                predictor.offset = 0.0
        loss = module.loss(batch, 3)
        loss.backward()
        off, student = [product] * 3, [product] * 3 + [torch.float32]
        assert seen["attention"] == [off] * 4 + [off, off, student, student] * 2
        assert {dtype for call in seen["loss"] for dtype in call} == {torch.float32}
        assert {p.dtype for p in module.trained.values()} == {torch.float32}
        assert {p.grad.dtype for p in module.trained.values() if p.grad is not None} == {torch.float32}
        assert {m.weight.dtype for m in teacher.model.modules() if isinstance(m, torch.nn.Linear)} == {product}
        losses.append(float(loss.detach()))
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.02)


def test_mixed_precision_keeps_small_steps_and_saves_float32(make_config, monkeypatch, base_folder):
    states = []

    class Looks(GracefulStop):
        def on_train_batch_end(self, trainer, module, *rest):
            super().on_train_batch_end(trainer, module, *rest)
            [optimizer] = trainer.optimizers
            states.extend(m.dtype for state in optimizer.state.values() for m in state.values())

    monkeypatch.setattr(run, "GracefulStop", Looks)
    saved = weights(train(make_config(lr=1e-6, adapter_lr=1e-6, **MIXED), progress=False))
    assert set(states) == {tensor.dtype for tensor in saved.values()} == {torch.float32}
    before = dict(AutoModelForCausalLM.from_pretrained(base_folder).named_parameters())
    for name in ("model.layers.0.mlp.up_proj.weight", "lm_head.weight"):
        assert 0 < (saved[name] - before[name]).abs().max() < 6 * 1e-6 * 1.01


def test_lora_leaves_the_teacher_what_it_was_and_is_saved_with_the_predictors(make_config, base_folder):
    from dms_lab.checkpoint import load_checkpoint

    base = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    ids = torch.arange(5, 45)[None]
    before = base(ids).logits
    outcome = train(make_config(trained="lora", lr=1e-2), progress=False)
    saved = weights(outcome)
    assert {name.split(".")[-1] for name in saved if "lora" not in name} == {"weight", "norm_weight"}
    assert any(".lora_B." in name and tensor.abs().sum() > 0 for name, tensor in saved.items())
    handle = load_checkpoint(outcome.checkpoint(4), base)
    assert all(torch.equal(dict(base.named_parameters())[name], tensor) for name, tensor in saved.items())
    with handle.disabled():
        assert torch.equal(base(ids).logits, before)
    assert not torch.equal(base(ids).logits, before)
    handle.detach()
    assert torch.equal(base(ids).logits, before)


def test_the_neuron_fades_first_and_evicts_afterwards(make_config):
    changes = NEURON | {"steps": 20, "neuron_zeroing_steps": 8, "log_every": 1, "ramp": 0.5, "lr": 3e-3}
    outcome = train(make_config(**changes), progress=False)
    rows = [json.loads(line) for line in (outcome.folder / "metrics.jsonl").read_text().splitlines()]
    assert all(row["cr_soft"] == 1 and row["target_cr"] == 1 for row in rows[:8])
    assert [row["target_cr"] for row in rows[8:]] == pytest.approx([1 + 3 * min(1, i / 6) for i in range(12)])
    assert rows[8]["cr_hard"] == 1  # what the base had in the element is no decision
    assert rows[-1]["cr_soft"] > 1


@pytest.mark.parametrize(("notice_seconds", "saved_at"), [(600.0, 4), (0.5, 3)])
def test_a_step_is_ended_before_a_job_is_handed_over_only_where_the_time_suffices(
    make_config, tmp_path, monkeypatch, notice_seconds, saved_at
):
    config = make_config(out=str(tmp_path / "cut"), accumulate=4)
    whole = train(make_config(out=str(tmp_path / "whole"), accumulate=4), progress=False)
    micro_batches = []

    class Slow(GracefulStop):
        """Steps of a second; the signal comes in the second micro-batch of the fourth."""

        def __init__(self, folder, **options):
            super().__init__(folder, every=1, **options)

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            micro_batches.append((trainer.global_step, batch_idx % 4))
            time.sleep(0.25)
            if micro_batches[-1] == (3, 1):
                os.kill(os.getpid(), signal.SIGUSR2)

    handed_over = []
    before = signal.signal(signal.SIGUSR2, lambda *_: handed_over.append(micro_batches[-1]))
    try:
        with monkeypatch.context() as patch:
            patch.setattr(run, "GracefulStop", Slow)
            patch.setattr("dms_lab.training.stopping._LONG_STEP_SECONDS", 0.5)
            first = train(config, progress=False, notice_seconds=notice_seconds)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert (first.finished, first.stopped_by) == (False, "SIGUSR2")
    assert handed_over == [(3, 3) if saved_at == 4 else (3, 1)]
    assert torch.load(first.folder / "last.ckpt", weights_only=False)["global_step"] == saved_at
    second = train(config, progress=False)
    assert second.finished
    assert_same(weights(second), weights(whole))


def test_training_raises_the_evicted_share_towards_the_target(make_config):
    outcome = train(make_config(steps=40, cr=3.0, cr_family=(3.0,), ramp=0.5, log_every=40), progress=False)
    row = json.loads((outcome.folder / "metrics.jsonl").read_text())
    assert row["evicted_soft"] > 0.5 * row["evict_target"]


def test_a_checkpoint_holds_the_average_and_training_goes_on_with_the_newest(make_config, tmp_path, monkeypatch):
    newest = []

    class Noted(run.GracefulStop):
        def on_train_batch_end(self, trainer, module, *rest):
            newest.append({name: p.detach().clone() for name, p in module.model.named_parameters() if p.requires_grad})
            super().on_train_batch_end(trainer, module, *rest)

    monkeypatch.setattr(run, "GracefulStop", Noted)
    plain = train(make_config(out=str(tmp_path / "plain")), progress=False)
    steps, newest[:] = list(newest), []
    averaged = train(make_config(out=str(tmp_path / "averaged"), average=0.75), progress=False)
    for one, two in zip(steps, newest, strict=True):
        assert_same(one, two)
    assert_same(weights(plain), steps[-1])
    for name, found in weights(averaged).items():
        wanted = steps[0][name]
        for step in steps[1:]:
            wanted = 0.75 * wanted + 0.25 * step[name]
        torch.testing.assert_close(found, wanted)
    assert not torch.equal(found, steps[-1][name])


def test_the_rates_rise_stay_and_fall_to_nothing():
    rates = Optimizer(warmup_steps=4, decay=0.5)
    found = [rates.factor(step, 20) for step in range(20)]
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[4:11] == [1.0] * 7
    assert found[11:] == pytest.approx([0.9 - 0.1 * i for i in range(9)])
    assert [Optimizer().factor(step, 3) for step in range(3)] == [1.0] * 3


def test_activations_are_recomputed_where_the_model_says_so(make_config, monkeypatch):
    from transformers.modeling_layers import GradientCheckpointingLayer

    config = make_config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, gradient_checkpointing=True))
    module, _ = build_module(config)
    module.on_fit_start()
    layers = [m for m in module.model.modules() if isinstance(m, GradientCheckpointingLayer)]
    calls = []
    for layer in layers:
        original = layer._gradient_checkpointing_func
        layer._gradient_checkpointing_func = lambda *a, original=original, **k: calls.append(1) or original(*a, **k)
    data = run.RetrofitData(config, run.models.load_tokenizer(config.model))
    module.loss(data.batch(0), 0).backward()
    assert len(calls) == 2 * len(layers)  # teacher and student
    assert not any(m.training for layer in layers for m in layer.modules() if m is not layer)
    plain, _ = build_module(make_config())
    plain.on_fit_start()
    plain.loss(data.batch(0), 0).backward()
    for one, two in zip(module.handle.predictors.values(), plain.handle.predictors.values(), strict=True):
        torch.testing.assert_close(one.weight.grad, two.weight.grad)


@pytest.mark.parametrize("changes", [{}, {"trained": "all"}, MIXED])
def test_attention_is_computed_once_where_its_output_is_kept_and_nothing_else_changes(make_config, monkeypatch, changes):
    calls, kept, found = [], [], []
    compute, keep = soft._chunked_forward, Relaxation.kept
    monkeypatch.setattr(soft, "_chunked_forward", lambda *x: calls.append(1) or compute(*x))
    monkeypatch.setattr(Relaxation, "kept", lambda *x: kept.append(keep(*x)) or kept[-1])
    model = dataclasses.replace(make_config().model, gradient_checkpointing=True)
    for is_kept in (False, True):
        config = make_config(model=model, keep_attention=is_kept, **changes)
        module, _ = build_module(config)
        module.on_fit_start()
        batch = run.RetrofitData(config, run.models.load_tokenizer(config.model)).batch(0)
        calls.clear(), kept.clear()
        loss = module.loss(batch, 3)
        forward = len(calls)
        assert [x and len(x) for x in kept] == [1 if is_kept else None] * 2  # of the two layers of the student
        loss.backward()
        assert len(calls) - forward == (0 if is_kept else 2)
        assert not any(kept)
        found.append({"loss": loss.detach()} | {name: p.grad for name, p in module.trained.items() if p.grad is not None})
    assert_same(*found)
    predictors = [name for name in found[0] if name.endswith("dms_predictor.weight")]
    assert len(predictors) == 2
    assert all(found[0][name].abs().sum() > 0 for name in predictors)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_norms_and_mlps_are_compiled_on_demand_without_a_break_and_the_time_is_told(make_config, backend):
    model = dataclasses.replace(make_config().model, gradient_checkpointing=True)
    configs = [make_config(model=model, trained="all", compile=is_compiled) for is_compiled in (False, True)]
    plain, fast = compiled_step.apart(compiled_step.steps, configs, backend)
    assert [plain[0], fast[0]] == [[], 4 * ["Qwen3MLP", "Qwen3RMSNorm", "Qwen3RMSNorm"]]  # of student and teacher
    none, some = (float(re.search(r"torch.compile took (\d+\.\d) s", said)[1]) for _, said, _ in (plain, fast))
    assert none == 0 < some
    for name, wanted in plain[2].items():
        atol = 1e-4 * float(abs(wanted).max()) + 1e-9
        torch.testing.assert_close(torch.from_numpy(fast[2][name]), torch.from_numpy(wanted), atol=atol, rtol=0)


def test_lines_of_steps_that_come_again_are_dropped_on_resuming(make_config, monkeypatch):
    whole = train(make_config(), progress=False).folder

    class Killed(GracefulStop):
        def on_train_batch_end(self, trainer, *rest):
            super().on_train_batch_end(trainer, *rest)
            if trainer.global_step == 5:
                raise KeyboardInterrupt

    class Kept(Killed):
        def __init__(self, folder, **options):
            super().__init__(folder, every=3, **options)

    config = make_config(out=str(whole.parent / "killed"), log_every=1)
    with monkeypatch.context() as patch:
        patch.setattr(run, "GracefulStop", Kept)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            train(config, progress=False)
    path = whole.parent / "killed" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "kl"')
    assert train(config, progress=False).finished
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


def test_a_target_that_was_missed_is_told(make_config, caplog, tmp_path):
    train(make_config(adapter_lr=1e-9), progress=False)
    assert "the last 1 logged batches had a compression ratio of 1.00 where 4.00 was aimed at" in caplog.text
    caplog.clear()
    train(make_config(steps=60, cr=2.0, cr_family=(2.0,), ramp=0.3, out=str(tmp_path / "met")), progress=False)
    assert "was aimed at" not in caplog.text


def test_a_fine_tuned_window_trains_with_the_same_code(make_config):
    outcome = train(make_config(method="streaming_llm", trained="all", cr_family=(4.0,)), progress=False)
    assert json.loads((outcome.checkpoint(4) / "dms.json").read_text())["policy"]["window"] == 96 / 4 - 4
