"""Benchmarks through lm-eval: a base model and its checkpoints (or one untrained rule), every task, every W-L point.

    config -> lm-eval tasks + DmsLM -> samples/ (each chain a row) -> points -> results.jsonl, table, figures

The store decides what is left to generate, so the same command goes on where it was stopped, and another choice of widths
and lengths that the chains allow costs no generation.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lm_eval

from dms_lab import models, plots, results, terminal
from dms_lab.comparison.suspicions import longest, score_suspicions, truncation_suspicions
from dms_lab.config import ModelConfig, config_hash
from dms_lab.evaluation import examples, points
from dms_lab.evaluation.attached import Attached, identity_of
from dms_lab.evaluation.benchmarks import BENCHMARKS, Graders, check_graders
from dms_lab.evaluation.dialled import dialled_jobs
from dms_lab.evaluation.hard import Label
from dms_lab.evaluation.lm import DmsLM, UnansweredError
from dms_lab.evaluation.loading import LoadedTask, load_task
from dms_lab.evaluation.report import base_of, load_config, method_name, run_of
from dms_lab.evaluation.sandbox import SandboxLimits
from dms_lab.evaluation.store import SampleStore
from dms_lab.evaluation.suite import Job, checkpoints_of, loaded, policy_of
from dms_lab.evaluation_config import EvaluateConfig
from dms_lab.tracking import evaluation_id, log_evaluations

SAMPLES = "samples"


@dataclass(frozen=True)
class Plan:
    """What a configuration comes to: a model, what is attached to it in turn, where results and samples go."""

    config: EvaluateConfig
    model: ModelConfig
    jobs: list[Job]
    folder: Path
    seed: int
    config_hash: str

    @property
    def model_name(self) -> str:
        """What the model is called in results: its configuration's name, or where it comes from."""
        return slug(self.model.path) if self.model.name == "hf" else self.model.name

    @property
    def samples(self) -> Path:
        """The folder in which chains are kept; one that several runs share draws the unchanged model once."""
        return Path(self.config.store) if self.config.store else self.folder / SAMPLES

    @property
    def writer(self) -> str:
        """The name of this job's file in there."""
        part = "shard-{}-of-{}".format(*self.config.shard)
        return f"{slug(str(self.folder.absolute()))[-80:]}-{part}" if self.config.store else part


def slug(path: str) -> str:
    """A hub id or path as a name."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", path).strip("_")


def plan(config: EvaluateConfig) -> Plan:
    """The jobs of a configuration; `ValueError` if there is no such checkpoint, or nothing to evaluate."""
    full = [Job("full", 1.0)] if config.eval.full else []
    if config.checkpoint is None:
        # The compression of a rule with a budget depends on the lengths of prompts and chains: known when they are.
        jobs = [*full, Job(config.policy, 0.0, budget=config.budget)] if config.budget else [Job("full", 1.0)]
        made = Plan(config, config.model, jobs, Path(), 0, "")
        name = f"{made.model_name}-{config.policy}" + (f"-{config.budget}" if config.budget else "")
        return replace(made, folder=Path(config.out or f"runs/{name}"))
    place = Path(config.checkpoint)
    run = run_of(place)
    is_run = (run / "config.json").is_file()
    trained = load_config(run) if is_run else None
    checkpoints = checkpoints_of(place, method_name(trained) if is_run else "dms")
    model = config.model or base_of(next(iter(checkpoints.values())))
    jobs = full + [Job(method, cr, checkpoint=folder) for (method, cr), folder in sorted(checkpoints.items())]
    if config.cr:
        jobs = full + dialled_jobs(place, config.cr, trained, config.calibrate, models.load_tokenizer(model))
    hashed = (trained.seed, config_hash(trained)) if is_run else (0, "")
    return Plan(config, model, jobs, Path(config.out) if config.out else run, *hashed)


def evaluate_benchmarks(config: EvaluateConfig) -> list[int]:
    """Generates what is missing, grades it, appends every point to `results.jsonl`, prints the table, draws figures.

    Returns the numbers of the lines, from 0, on which the points stand. A shard generates and grades its part, and leaves
    the results to the run without `shard`. Raises `ValueError` for
    what cannot be loaded or run; and, after all else is done, for chains that could not be generated.
    """
    what = plan(config)
    settings = config.eval
    graders = Graders(config.sandbox, SandboxLimits(settings.seconds_per_test, settings.seconds_per_problem))
    check_graders(settings.tasks, graders)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # of what it warns, the loaders here raise
    path = what.folder / results.RESULTS
    if path.is_file() and path.stat().st_size:
        results.load(path)  # a bad line is told before anything is generated
    source = models.resolve_path(what.model.path)
    tasks = [load_task(name, config, source) for name in settings.tasks]
    console = terminal.console()
    for notice in (notice for task in tasks for notice in task.notices):
        console.print(f"note: {notice}", highlight=False)
    found: list[results.Result] = []
    lines: list[int] = []
    failures: list[str] = []
    with SampleStore(what.samples, what.writer) as store:
        for job in what.jobs:
            for rows in _evaluate_job(what, job, tasks, store, graders, failures):
                lines += results.append_new(path, rows)
                found += rows
    part, parts = config.shard
    if parts > 1:
        console.print(f"part {part} of {parts} is in {what.samples}; when all are, run without shard= for the results")
    elif found:
        _show(found, what)
        if config.tracking == "wandb":
            log_evaluations(path, {evaluation_id(vars(row)) for row in found}, config.sweep)
    if failures:
        raise ValueError("; ".join(failures))
    return lines


def _show(found: list[results.Result], what: Plan) -> None:
    import pandas as pd

    console = terminal.console()
    frame = pd.DataFrame([vars(result) for result in found])
    for task, rows in frame.groupby("task", sort=False):
        console.print(plots.benchmark_table(rows, str(task)))
    for warning in suspicions(found, what):
        console.print(f"[bold red]warning:[/] {warning}", highlight=False)
    for figure in plots.benchmark_figures(frame, what.folder):
        console.print(f"figure: {figure}")
    console.print(f"results: {what.folder / results.RESULTS}, every chain: {what.samples}")


# -- running -----------------------------------------------------------------------------------------------------------
def chosen(num_problems: int, limit: int | None, shard: tuple[int, int]) -> list[int]:
    """The positions of the problems that a job answers: every `shard[1]`-th of the first `limit`."""
    return list(range(num_problems))[:limit][shard[0] - 1 :: shard[1]]


def _evaluate_job(
    what: Plan, job: Job, tasks: Sequence[LoadedTask], store: SampleStore, graders: Graders, failures: list[str]
) -> Iterator[list[results.Result]]:
    """The results of each task for one checkpoint or rule; none of a shard. Failures leave a sentence in `failures`."""
    tokenizer = models.load_tokenizer(what.model)
    with loaded(what.model, job) as handle:
        make_policy, window = policy_of(handle, job)
        identity = identity_of(handle, job.checkpoint, None if job.checkpoint else job.method, job.budget)
        attached = Attached(handle, make_policy, tokenizer, identity)
        label = Label(what.folder.name, what.model_name, job.method, job.target_cr, window, what.seed, what.config_hash)
        for task in tasks:
            try:
                yield _evaluate_task(what, task, attached, store, graders, label, job.budget)
            except UnansweredError as error:
                at = f"with budget={job.budget}" if job.budget else f"at CR {job.target_cr:g}"
                failures.append(f"{job.method} {at}: {error}")


def _evaluate_task(
    what: Plan,
    task: LoadedTask,
    attached: Attached,
    store: SampleStore,
    graders: Graders,
    label: Label,
    budget: int | None,
) -> list[results.Result]:
    settings, config = task.settings, what.config
    lms, scored = [], {}
    for seed in settings.seeds if task.benchmark else settings.seeds[:1]:
        lms.append(_language_model(attached, seed, store, graders, task))
        scored = _run(lms[-1], task, config)
    record = task.record() | {"limit": config.limit, "budget": budget}
    if config.shard[1] > 1:
        for lm in lms if task.benchmark else ():
            points.grade(lm, settings, config.regrade)
        return []
    if task.benchmark is None:
        found = points.foreign_results(task, scored, lms[0], label, record)
    else:
        found = points.results_of(task.name, lms, settings, label, record, budget, config.regrade)
    examples.keep(what.folder / examples.EXAMPLES, examples.examples_of(lms[0], label, record))
    return found


def _language_model(attached: Attached, seed: int, store: SampleStore, graders: Graders, task: LoadedTask) -> DmsLM:
    settings = task.settings
    same = ("places", "storage", "num_pages", "page_size", "prefill_chunk", "reserve", "deterministic", "attention", "step")
    return DmsLM(
        attached=attached,
        seed=seed,
        samples=store,
        graders=graders,
        grader_threads=settings.graders,
        thinking=task.thinking,
        batch_size=settings.places,
        **{name: getattr(settings, name) for name in same},
    )


def _run(lm: DmsLM, task: LoadedTask, config: EvaluateConfig) -> dict[str, Any]:
    """lm-eval's own results of the problems of this part; {} where it has none."""
    positions = {name: chosen(len(leaf.eval_docs), config.limit, config.shard) for name, leaf in task.leaves.items()}
    leaves = {name: leaf for name, leaf in task.leaves.items() if positions[name]}
    if not leaves:
        return {}
    is_whole = all(len(positions[name]) == len(leaf.eval_docs) for name, leaf in task.leaves.items())
    return lm_eval.evaluate(
        lm=lm,
        task_dict=task.found if len(leaves) == len(task.leaves) else {"tasks": leaves},
        samples=None if is_whole else {name: positions[name] for name in leaves},
        apply_chat_template=task.benchmark is not None and config.eval.chat,
        log_samples=False,
        bootstrap_iters=0,  # intervals are made here
        confirm_run_unsafe_code=config.sandbox == "none" and config.i_trust_the_code,
    )


# -- what to make of it ------------------------------------------------------------------------------------------------
def suspicions(found: Sequence[results.Result], what: Plan) -> Iterator[str]:
    """A sentence for each full-attention score that is not what others measured, and for each task cut off too often.

    Both at the longest limit; scores of a part of a task, or of shorter chains than the published ones, are not compared.
    """
    for row in longest(map(vars, found)):
        known = BENCHMARKS.get(row["task"]) if what.config.limit is None else None
        yield from score_suspicions(row, known.full_score(what.model.name, what.model.path) if known else None)
        yield from truncation_suspicions(row)
