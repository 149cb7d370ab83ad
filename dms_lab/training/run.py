"""One retrofit from a configuration: build, fit, keep checkpoints. Used by `train`, `demo` and tests alike.

find_world -> joined -> data and weights, checked on all processes -> Trainer.fit -> done.json by the first
"""

import copy
import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from transformers import PreTrainedModel

from dms_lab import models, results
from dms_lab.attachment import retrofit
from dms_lab.checkpoint import fingerprint
from dms_lab.config import TrainConfig, config_hash, is_mixed, run_folder
from dms_lab.evaluation.evaluated import EVALUATED, PART
from dms_lab.policies.dms import DmsConfig
from dms_lab.structure import decoder_layers
from dms_lab.threads import set_threads
from dms_lab.tracking import Tracker, closing
from dms_lab.training.callbacks import FamilyCheckpoints, JsonlMetrics, ProgressBar, WeightAverage
from dms_lab.training.data import RetrofitData, check_reachable
from dms_lab.training.distributed import World, agree, check_same, find_world, gather, in_turn, joined
from dms_lab.training.module import Objective, Optimizer, RetrofitModule
from dms_lab.training.sources import held_out_documents
from dms_lab.training.stopping import LAST, NOTICE_SECONDS, GracefulStop
from dms_lab.training.strategy import build_trainer, make_mesh, shard

_log = logging.getLogger(__name__)
DONE = "done.json"  # in the folder of a finished run


@dataclass(frozen=True)
class Outcome:
    """What a run left behind. `finished` is False when a signal ended it early; the same command goes on from there.

    `is_first` is False in the processes that helped another one: they have nothing to evaluate or to tell.
    """

    folder: Path
    finished: bool
    stopped_by: str | None = None
    is_first: bool = True

    def checkpoint(self, cr: float) -> Path:
        """The checkpoint folder of a member of the CR family."""
        return self.folder / "checkpoints" / f"cr{cr:g}"


def policy_config(config: TrainConfig) -> DmsConfig:
    """The policy of a run. A fine-tuned window of CR c keeps context / c tokens: its sinks and the rest as window."""
    lora_rank = config.lora_rank if config.trained == "lora" else 0
    if config.method == "streaming_llm":
        budget = round(config.context / config.cr)
        return DmsConfig(
            window=budget - config.num_sinks,
            predictor="sinks",
            num_sinks=config.num_sinks,
            tau=config.tau,
            lora_rank=lora_rank,
            lora_alpha=config.lora_alpha,
        )
    return DmsConfig(
        window=config.window,
        predictor=config.predictor,
        granularity=config.granularity,
        decided_by=config.decided_by,
        scale=config.scale,
        offset=config.offset,
        neuron_index=config.neuron_index,
        tau=config.tau,
        lora_rank=lora_rank,
        lora_alpha=config.lora_alpha,
    )


def build_module(config: TrainConfig) -> tuple[RetrofitModule, str]:
    """The training module over a freshly loaded base model, and the fingerprint of its weights."""
    model = models.load_base(config.model)
    base = fingerprint(model)
    teacher = copy.deepcopy(model) if config.trained == "all" else None
    handle = retrofit(model, policy_config(config))
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.compile:
        for each in (model, teacher) if teacher is not None else (model,):
            compile_parts(each)
    objective = Objective(
        cr=config.cr,
        steps=config.steps,
        ramp=config.ramp,
        count=config.count,
        retention=config.retention,
        retention_weight=config.retention_weight,
        kl_direction=config.kl_direction,
        neuron_zeroing_steps=config.neuron_zeroing_steps,
        accumulate=config.accumulate,
        seed=config.seed,
        attention=config.attention,
        mixed=is_mixed(config, torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)),
        keep_attention=config.keep_attention and config.model.gradient_checkpointing,
        measure_every=config.log_every,
    )
    optimizer = Optimizer(
        config.lr, config.adapter_lr, config.betas, config.weight_decay, config.warmup_steps, config.decay
    )
    return RetrofitModule(handle, teacher, config.trained, objective, optimizer), base


def compile_parts(model: PreTrainedModel) -> None:
    """Norms and MLPs of the decoder layers are compiled when they first run.

    Not attention: its plan draws noise from a generator, looks at documents, and has kernels of its own.
    """
    for layer in decoder_layers(model.get_decoder()):
        for part in layer.children():
            if not hasattr(part, "layer_idx"):
                part.compile()


@contextmanager
def compile_time_told() -> Iterator[None]:
    """Logs at the end what `torch.compile` took inside, in seconds."""
    from torch._dynamo.callback import callback_handler

    started, ended = [], []
    start = callback_handler.register_start_callback(lambda _: started.append(time.monotonic()))
    end = callback_handler.register_end_callback(lambda _: ended.append(time.monotonic()))
    try:
        yield
    finally:
        callback_handler.remove_start_callback(start)
        callback_handler.remove_end_callback(end)
        _log.info("compile=true: torch.compile took %.1f s of this run", sum(ended) - sum(started[: len(ended)]))


def _check_folder(folder: Path, config: TrainConfig) -> None:
    path = folder / "config.json"
    if path.is_file() and (found := config_hash(json.loads(path.read_text()))) != config_hash(config):
        raise ValueError(
            f"out={folder} holds a run of another configuration (hash {found}, this one is {config_hash(config)}); give "
            "another out, leave it to the configuration (out=null), or add resume=false to replace that run"
        )


def _threads_before(folder: Path, config: TrainConfig) -> int | None:
    """The threads of a run that is to go on: with others, its sums would differ in their last digits."""
    path = folder / "config.json"
    return json.loads(path.read_text()).get("threads") if config.resume and path.is_file() else None


def _clear(folder: Path) -> None:
    """Removes what an earlier run left in its folder; anything else stays."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    for name in ("config.json", "metrics.jsonl", "results.jsonl", "examples.jsonl", LAST, DONE, EVALUATED, PART):
        (folder / name).unlink(missing_ok=True)


def train(config: TrainConfig, progress: bool = True, notice_seconds: float = NOTICE_SECONDS) -> Outcome:
    """Trains, or goes on where an earlier run of the same configuration stopped; a finished run returns at once.

    Of several processes all call it; when it returns they have parted. Raises `ValueError`, in all of them, if they are
    not those that the configuration asks for, or if the folder holds a run of another configuration and `resume=false`
    does not say to replace it. After SIGUSR2, the handler that stood before is called last of all (submitit's requeues
    the job and ends the process), at the latest at the end of a micro-batch `notice_seconds` later.
    """
    world = find_world(config)
    folder = Path(run_folder(config))
    stop = GracefulStop(folder, notice_seconds=notice_seconds)
    with joined(world):
        outcome = _train(config, world, folder, stop, progress and world.is_first)
    stop.hand_over()
    return outcome


def _train(config: TrainConfig, world: World, folder: Path, stop: GracefulStop, progress: bool) -> Outcome:
    done, last = folder / DONE, folder / LAST
    if config.resume:
        agree(world, lambda: _check_folder(folder, config))
    if config.resume and any(gather(world, done.is_file())):
        _log.info("%s is finished already", folder)
        return Outcome(folder, True, is_first=world.is_first)
    L.seed_everything(config.seed, verbose=False)
    config = replace(config, threads=set_threads(config.threads or _threads_before(folder, config)))
    data = agree(world, lambda: _load_data(config))  # before the weights: what is wrong with it costs no minutes
    check_same(world, "training rows", data.fingerprint() if world.size > 1 else None)
    module, base = _load_module(config, world)
    provenance = {
        "config_hash": config_hash(config),
        "seed": config.seed,
        "steps": config.steps,
        "method": config.method,
    }
    if world.is_first:
        _open_folder(folder, config)
    gather(world, None)  # nobody looks for a file that the first process is about to remove
    tracker = Tracker(config, folder) if config.tracking == "wandb" and world.is_first else None
    average = WeightAverage(config.average)
    callbacks = [
        JsonlMetrics(folder, config.log_every, tracker),
        average,
        FamilyCheckpoints(folder / "checkpoints", config, base, provenance, average),
        stop,
        *([ProgressBar()] if progress else []),
    ]
    trainer = build_trainer(config, world, callbacks)
    with closing(tracker):  # last of all: it may have to wait for a network
        with stop.listening(), compile_time_told() if config.compile else nullcontext():
            trainer.fit(module, datamodule=data, ckpt_path=str(last) if last.is_file() else None)
        if stop.stopped_by and trainer.global_step < config.steps:
            return Outcome(folder, False, stop.stopped_by, world.is_first)
        if world.is_first:
            _tell_a_missed_target(folder, config)
            _mark_done(folder, provenance)
            last.unlink(missing_ok=True)
    return Outcome(folder, True, is_first=world.is_first)


def _mark_done(folder: Path, provenance: dict[str, Any]) -> None:
    made_by = {"versions": results.versions(), "git_revision": results.git_revision()}
    temporary = (folder / DONE).with_suffix(".tmp")
    temporary.write_text(json.dumps(provenance | made_by) + "\n")
    temporary.replace(folder / DONE)


def _load_data(config: TrainConfig) -> RetrofitData:
    tokenizer = models.load_tokenizer(config.model)
    if config.eval_after:
        held_out_documents(config, tokenizer, 1)  # an error in it is told now, not after hours
    data = RetrofitData(config, tokenizer)
    if data.packed is not None:
        check_reachable(data.packed.rows, config)
    return data


def _load_module(config: TrainConfig, world: World) -> tuple[RetrofitModule, str]:
    """The training module, cut over the processes if the strategy says so, and the fingerprint of the base."""
    is_cut = world.size > 1 and config.strategy == "fsdp"
    mesh = make_mesh(world) if is_cut else None

    def load() -> tuple[RetrofitModule, str, str]:
        module, base = build_module(config)
        start = fingerprint(module.model)  # with what LoRA drew
        if mesh is not None:
            shard(module, mesh)
        return module, base, start

    module, base, start = in_turn(world, load) if is_cut else agree(world, load)
    check_same(world, "weights to start from", start)
    return module, base


def _open_folder(folder: Path, config: TrainConfig) -> None:
    if not config.resume:
        _clear(folder)  # now that nothing else can be wrong: an earlier run is not lost to a typing error
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=2, sort_keys=True) + "\n")


def _tell_a_missed_target(folder: Path, config: TrainConfig) -> None:
    """Logs a warning if, over the last quarter of what was logged, a fifth more or less is live than was asked for."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = rows[-max(1, len(rows) // 4) :]
    found, wanted = (len(rows) / sum(1 / row[name] for row in rows) for name in ("cr_hard", "target_cr"))
    if config.count == "live" and not 0.8 < found / wanted < 1.25:
        _log.warning(
            "%s: the last %d logged batches had a compression ratio of %.2f where %.2f was aimed at; train for more steps, "
            "train more weights (trained=lora or all), or raise retention_weight, which costs accuracy",
            folder,
            len(rows),
            found,
            wanted,
        )
