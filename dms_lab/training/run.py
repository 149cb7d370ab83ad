"""One retrofit from a configuration: build, fit, keep checkpoints. Used by `train`, `demo` and tests alike."""

import copy
import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import lightning as L
import torch

from dms_lab import models
from dms_lab.attachment import retrofit
from dms_lab.checkpoint import fingerprint
from dms_lab.config import TrainConfig, config_hash, run_folder
from dms_lab.policies.dms import DmsConfig
from dms_lab.tracking import Tracker
from dms_lab.training.callbacks import (
    LAST,
    FamilyCheckpoints,
    GracefulStop,
    JsonlMetrics,
    ProgressBar,
    WeightAverage,
    handlers_restored,
)
from dms_lab.training.data import RetrofitData, check_reachable, held_out_documents
from dms_lab.training.module import Objective, Optimizer, RetrofitModule

_log = logging.getLogger(__name__)
DONE = "done.json"  # in the folder of a finished run


@dataclass(frozen=True)
class Outcome:
    """What a run left behind. `finished` is False when a signal ended it early; the same command goes on from there."""

    folder: Path
    finished: bool
    stopped_by: str | None = None

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
        lm_loss_every=config.log_every,
    )
    optimizer = Optimizer(
        config.lr, config.adapter_lr, config.betas, config.weight_decay, config.warmup_steps, config.decay
    )
    return RetrofitModule(handle, teacher, config.trained, objective, optimizer), base


def _check_folder(folder: Path, config: TrainConfig) -> None:
    path = folder / "config.json"
    if path.is_file() and (found := config_hash(json.loads(path.read_text()))) != config_hash(config):
        raise ValueError(
            f"out={folder} holds a run of another configuration (hash {found}, this one is {config_hash(config)}); give "
            "another out, leave it to the configuration (out=null), or add resume=false to replace that run"
        )


def _clear(folder: Path) -> None:
    """Removes what an earlier run left in its folder; anything else stays."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    for name in ("config.json", "metrics.jsonl", "results.jsonl", LAST, DONE):
        (folder / name).unlink(missing_ok=True)


def train(config: TrainConfig, progress: bool = True) -> Outcome:
    """Trains, or goes on where an earlier run of the same configuration stopped; a finished run returns at once.

    Raises `ValueError` if the folder holds a run of another configuration, and `resume=false` does not say to replace it.
    """
    folder = Path(run_folder(config))
    done = folder / DONE
    if config.resume:
        _check_folder(folder, config)
    if config.resume and done.is_file():
        _log.info("%s is finished already", folder)
        return Outcome(folder, True)
    L.seed_everything(config.seed, verbose=False)
    if config.threads:
        torch.set_num_threads(config.threads)
    tokenizer = models.load_tokenizer(config.model)
    if config.eval_after:
        held_out_documents(config, tokenizer, 1)  # an error in it is told now, not after hours
    data = RetrofitData(config, tokenizer)  # before the weights: what is wrong with the data costs no minutes
    if data.packed is not None:
        check_reachable(data.packed.rows, config)
    module, base = build_module(config)
    if not config.resume:
        _clear(folder)  # now that nothing else can be wrong: an earlier run is not lost to a typing error
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=2, sort_keys=True) + "\n")
    provenance = {
        "config_hash": config_hash(config),
        "seed": config.seed,
        "steps": config.steps,
        "method": config.method,
    }
    stop = GracefulStop(folder)
    tracker = Tracker(config, folder) if config.tracking == "wandb" else None
    average = WeightAverage(config.average)
    callbacks = [
        JsonlMetrics(folder, config.log_every, tracker),
        average,
        FamilyCheckpoints(folder / "checkpoints", config, base, provenance, average),
        stop,
        *([ProgressBar()] if progress else []),
    ]
    trainer = L.Trainer(
        max_steps=config.steps,
        accumulate_grad_batches=config.accumulate,
        gradient_clip_val=config.clip,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=1,
        use_distributed_sampler=False,
    )
    last = folder / LAST
    with handlers_restored():
        trainer.fit(module, datamodule=data, ckpt_path=str(last) if last.is_file() else None)
    if tracker is not None:
        tracker.finish()
    if stop.stopped_by and trainer.global_step < config.steps:
        return Outcome(folder, False, stop.stopped_by)
    _tell_a_missed_target(folder, config)
    done.write_text(json.dumps(provenance) + "\n")
    last.unlink(missing_ok=True)
    return Outcome(folder, True)


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
