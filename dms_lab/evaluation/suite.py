"""The whole comparison: full attention, each member of a DMS family, and the rivals at the budget it was measured at."""

import functools
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from dms_lab import models
from dms_lab.attachment import Retrofit, retrofit
from dms_lab.cache.policy import Policy
from dms_lab.calibration import dial
from dms_lab.checkpoint import load_checkpoint, read_metadata
from dms_lab.config import EvalConfig, ModelConfig
from dms_lab.evaluation import hard
from dms_lab.policies import HEURISTICS, FullPolicy, StreamingLLMPolicy
from dms_lab.results import Result
from dms_lab.tiny import tasks
from dms_lab.tiny.corpus import Document


@dataclass(frozen=True)
class Subject:
    """What is evaluated, on what: a base model and its checkpoints by (method, target CR), tasks and held-out text.

    `knows_tasks` is for models that know the embedded tasks; `held_out` text gives perplexity where there is any.
    """

    model: ModelConfig
    checkpoints: dict[tuple[str, float], Path]
    run_id: str
    seed: int
    config_hash: str
    settings: EvalConfig
    held_out: list[Document]
    knows_tasks: bool
    text: dict[str, Any] = field(default_factory=dict)  # what the held-out text is: its data, the length of its documents


@dataclass(frozen=True)
class Job:
    """One point of the comparison: a trained checkpoint, or an untrained rule at a budget, or (neither) full attention.

    With `calibration` documents (rows of token ids) the checkpoint is dialled until they are compressed `target_cr` times.
    """

    method: str
    target_cr: float
    checkpoint: Path | None = None
    budget: int | None = None
    calibration: tuple[tuple[int, ...], ...] = ()


class Kept(Protocol):
    """Measurements of jobs that outlive the process; `evaluation.partial` has one in a file."""

    def __contains__(self, job: Job) -> bool: ...
    def __getitem__(self, job: Job) -> tuple[list[Result], float]: ...
    def add(self, job: Job, measured: tuple[list[Result], float]) -> None: ...


def evaluate(subject: Subject, rivals_at: tuple[float, ...], kept: Kept | None = None) -> Iterator[list[Result]]:
    """Yields the results of one method and budget after the other, `settings.workers` of them measured at a time.

    Rivals are run at the live tokens that the method `dms` was measured at, for the target CRs in `rivals_at`. What is in
    `kept` is not measured again, and what is measured is added to it.
    """
    checkpoints = sorted(subject.checkpoints.items(), key=lambda item: (item[0][0] != "dms", item[0]))
    trained = [Job("full", 1.0), *(Job(method, cr, checkpoint=folder) for (method, cr), folder in checkpoints)]
    budgets: dict[float, int] = {}
    for job, (found, live) in not_measured_yet(subject, trained, kept):
        if job.method == "dms" and subject.knows_tasks:
            budgets[job.target_cr] = max(8, round(live))
        if found:
            yield found
    rivals = [Job(name, cr, budget=budgets[cr]) for cr in rivals_at if cr in budgets for name in subject.settings.rivals]
    for _, (found, _) in not_measured_yet(subject, rivals, kept):
        yield found


def not_measured_yet(
    subject: Subject, jobs: list[Job], kept: Kept | None
) -> Iterator[tuple[Job, tuple[list[Result], float]]]:
    """As `measured`, but what is in `kept` is not measured again, and what is measured is added to it; in order."""
    if kept is None:
        yield from measured(subject, jobs)
        return
    new = measured(subject, [job for job in jobs if job not in kept])
    for job in jobs:
        if job not in kept:
            kept.add(*next(new))
        yield job, kept[job]


def measured(subject: Subject, jobs: list[Job]) -> Iterator[tuple[Job, tuple[list[Result], float]]]:
    """Each job with what `measure` found, in order; in processes of one thread each where there are several workers."""
    if subject.settings.workers == 1 or models.default_device() == "cuda":
        yield from ((job, measure(subject, job)) for job in jobs)
        return
    with ProcessPoolExecutor(
        subject.settings.workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)
    ) as pool:
        yield from zip(jobs, pool.map(partial(measure, subject), jobs), strict=True)


def measure(subject: Subject, job: Job) -> tuple[list[Result], float]:
    """The results of one job, and the mean live tokens at the end of its requests (0 without tasks)."""
    tokenizer, settings = models.load_tokenizer(subject.model), subject.settings
    with loaded(subject.model, job) as handle:
        make_policy, window = policy_of(handle, job)
        label = hard.Label(
            subject.run_id, subject.model.name, job.method, job.target_cr, window, subject.seed, subject.config_hash
        )
        found, live = [], 0.0
        if subject.knows_tasks:
            problems = {
                family: hard.make_problems(family, settings.num_problems, settings.length, subject.seed)
                for family in tasks.FAMILIES
            }
            found, live = hard.evaluate_tasks(handle, make_policy, tokenizer, problems, label, settings.batch_size)
            found = [replace(result, settings={"length": settings.length}) for result in found]
        if subject.held_out:
            text = (handle, make_policy, subject.held_out, label, "held_out_text", settings.batch_size)
            found.append(replace(hard.evaluate_perplexity(*text), settings=subject.text))
        asked = _asked(job, handle)
    return [replace(result, settings=result.settings | asked) for result in found], live


def _asked(job: Job, handle: Retrofit) -> dict[str, Any]:
    """What decided a job's results beside its method, ratio and data."""
    if job.budget is not None:
        return {"live_tokens": job.budget}
    if job.calibration:
        moved = handle.config.offset - read_metadata(job.checkpoint).policy["offset"]
        return {"dialled_from": str(job.checkpoint), "threshold": moved}
    return {}


_base = functools.lru_cache(maxsize=1)(models.load_base)


@contextmanager
def loaded(model: ModelConfig, job: Job) -> Iterator[Retrofit]:
    """The model with what the job attaches to it, taken off again; one copy of the base serves every job it can."""
    device = models.default_device()
    if job.checkpoint is None:
        handle = retrofit(_base(model, device), None)
    else:
        if read_metadata(job.checkpoint).trained == "all":
            _base.cache_clear()  # its weights are replaced, and two copies may not fit
        handle = load_checkpoint(job.checkpoint, _base(model, device))
    try:
        if job.calibration:
            dial(handle, job.calibration, job.target_cr)
        yield handle
    finally:
        handle.detach()
        if job.checkpoint is not None and read_metadata(job.checkpoint).trained == "all":
            _base.cache_clear()


def policy_of(handle: Retrofit, job: Job) -> tuple[Callable[[], Policy], int | None]:
    """What makes the policy of a request batch, and its window."""
    if job.budget is not None:
        return partial(HEURISTICS[job.method], job.budget), None
    if job.checkpoint is None:
        return FullPolicy, None
    config = handle.config
    if config.predictor == "sinks":
        return partial(StreamingLLMPolicy, config.window + config.num_sinks, config.num_sinks), config.window
    return handle.policy, config.window


def checkpoints_of(folder: Path, method: str = "dms") -> dict[tuple[str, float], Path]:
    """The checkpoints below a run's folder (or the one that `folder` itself is) by (method, target CR)."""
    places = [folder] if (folder / "dms.json").is_file() else sorted((folder / "checkpoints").glob("cr*"))
    if not places:
        raise ValueError(f"no checkpoint in {folder}: give a folder with dms.json in it, or a finished run's folder")
    return {(method, float(read_metadata(p).provenance.get("cr", 0))): p for p in places}
