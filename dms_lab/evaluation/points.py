"""From stored chains to results: every width and every limit of tokens that they allow, without generating.

    store -> chains of a problem, cut at each L -> graded where they are cut -> scores.point for each (W, L) -> Result

Chains of one problem are in memory at a time: their traces are by far the largest thing there is.
"""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dms_lab import accounting, pareto
from dms_lab.evaluation import scores
from dms_lab.evaluation.benchmarks import BENCHMARKS
from dms_lab.evaluation.hard import Label
from dms_lab.evaluation.lm import Asked, DmsLM
from dms_lab.evaluation.loading import LoadedTask
from dms_lab.evaluation.sample import Key
from dms_lab.evaluation.scores import Chain, Point
from dms_lab.evaluation.verdict import Verdict
from dms_lab.evaluation_config import ReasoningConfig
from dms_lab.results import Result


def results_of(
    task: str,
    lms: Sequence[DmsLM],
    settings: ReasoningConfig,
    label: Label,
    record: dict[str, Any],
    budget: int | None = None,
    regrade: bool = False,
) -> list[Result]:
    """A result for each width and limit, from the chains that `lms` (one a seed) answered `task` with.

    `record` is what decided them; with a `budget` of live tokens the target CR is that of the prompts and the limit.
    Prompts of several lengths are tasks of their own.
    """
    benchmark = BENCHMARKS[task]
    headline = benchmark.headline if settings.headline == "auto" else settings.headline
    draws = [_Draw(lm, settings, regrade) for lm in lms]
    prompts = sorted({job.prompt_hash for draw in draws for job in draw.asked.jobs.values()})
    record = record | {"prompts": hashlib.sha256("".join(prompts).encode()).hexdigest()[:12]}
    found = []
    for part, problems in draws[0].parts().items():
        for limit, width in itertools.product(draws[0].limits, settings.width):
            peaks = [draw.peaks[width, limit][problem] for draw in draws for problem in problems]
            chains = [{problem: draw.chains[limit][problem] for problem in problems} for draw in draws]
            point = scores.point(chains, width, limit, headline, sum(peaks) / len(peaks))
            metrics = {name: getattr(point, name) for name in scores.ACCURACIES if name != "maj" or benchmark.votes}
            row = _result(task + part, point, label, record)
            found.append(
                replace(
                    row,
                    target_cr=_target_cr(chains, limit, budget) if budget else row.target_cr,
                    seconds=sum(draw.seconds for draw in draws),
                    metrics={name: [m.value, m.low, m.high] for name, m in metrics.items()},
                    sampling_seeds=[lm.seed for lm in lms],
                )
            )
    return found


def _target_cr(draws: Sequence[dict[str, list[Chain]]], limit: int, budget: int) -> float:
    """(prompt + limit) / budget, mean over prompts: the compression that a budget of live tokens means."""
    requests = [chain.request for draw in draws for chains in draw.values() for chain in chains]
    prompts = [request.num_tokens - request.num_generated + 1 for request in requests]
    return round((sum(prompts) / len(prompts) + limit) / budget, 2)


def _result(task: str, point: Point, label: Label, record: dict[str, Any]) -> Result:
    return Result(
        **vars(label),
        task=task,
        measured_cr=point.measured_cr,
        num_problems=point.num_problems,
        accuracy=point.accuracy.value,
        accuracy_low=point.accuracy.low,
        accuracy_high=point.accuracy.high,
        perplexity=None,
        kv_reads=point.kv_reads,
        peak_tokens=point.peak_tokens,
        kv_bytes_peak=point.kv_bytes_peak,
        tokens_generated=round(point.tokens_generated * point.width * point.num_problems),
        seconds=0.0,
        width=point.width,
        max_tokens=point.max_tokens,
        headline=point.headline,
        truncation_rate=point.truncated,
        num_samples=point.num_chains,
        settings=record,
        problem_scores=list(point.problem_scores),
    )


def grade(lm: DmsLM, settings: ReasoningConfig, regrade: bool) -> None:
    """Grades the chains that `lm` was asked for, as they stand at each limit, for a later run to find."""
    for asked in lm.asked:
        verdicts_of(lm, asked, limits_of(asked, settings), regrade)


def limits_of(asked: Asked, settings: ReasoningConfig) -> list[int]:
    """The limits of tokens of the points, in order; the task's own where none are given."""
    return sorted(settings.max_tokens or (asked.max_tokens,))


def verdicts_of(lm: DmsLM, asked: Asked, limits: Sequence[int], regrade: bool) -> dict[tuple[Key, int], Verdict]:
    """The verdict on each chain as it stands at each limit."""
    verdicts: dict[tuple[Key, int], Verdict] = {}
    with lm.grading(asked.task, asked.run, regrade) as grading:
        for sample in lm.stored(asked):
            job = asked.jobs[sample.problem, sample.chain]
            for limit in limits:

                def done(verdict: Verdict, key: Any = (sample.key, limit)) -> None:
                    verdicts[key] = verdict

                grading.put(sample, limit, job.doc, job.think_end, done)
    return verdicts


class _Draw:
    """The chains of one seed: for each limit, those of each problem in the order that they were asked in.

    `peaks`: of each (width, limit) and problem the mean of the most live slots over subsets.
    """

    def __init__(self, lm: DmsLM, settings: ReasoningConfig, regrade: bool) -> None:
        (self.asked,) = lm.asked
        self.limits = limits_of(self.asked, settings)
        self.seconds = 0.0
        verdicts = verdicts_of(lm, self.asked, self.limits, regrade)
        chains: dict[int, dict[str, list[Chain]]] = {limit: {} for limit in self.limits}
        self.peaks: dict[tuple[int, int], dict[str, float]] = {
            (width, limit): {} for width in settings.width for limit in self.limits
        }
        for problem, group in itertools.groupby(lm.stored(self.asked), key=lambda sample: sample.problem):
            samples = sorted(group, key=lambda sample: sample.chain)
            self.seconds += sum(sample.seconds for sample in samples)
            for limit in self.limits:
                found = [scores.judged(sample, verdicts[sample.key, limit], limit) for sample in samples]
                chains[limit][problem] = [replace(chain, live=None) for chain in found]
                lives = [chain.live for chain in found]
                for width in settings.width:
                    self.peaks[width, limit][problem] = scores.peak_of(lives, scores.subsets(len(lives), width))
        order = dict.fromkeys(problem for problem, _ in self.asked.jobs)
        self.chains = {limit: {problem: found[problem] for problem in order} for limit, found in chains.items()}

    def parts(self) -> dict[str, list[str]]:
        """Problems by what is added to the task's name: those of each length apart, where prompts have one."""
        found: dict[str, list[str]] = {}
        for (problem, chain), job in self.asked.jobs.items():
            if chain == 0:
                length = job.doc.get("max_length")
                found.setdefault("" if length is None else f"_{length}", []).append(problem)
        return found


def foreign_results(
    task: LoadedTask, found: dict[str, Any], lm: DmsLM, label: Label, record: dict[str, Any]
) -> list[Result]:
    """A result for a task of lm-eval's own, or for a group; for each of its tasks where lm-eval makes no sum of them."""
    names = [task.name] if _metrics(found["results"].get(task.name, {})) else list(task.leaves)
    return [_foreign_result(name, found, lm, label, record) for name in names]


# Metrics of lm-eval that are shares of the problems. Others may run to 100, or have no upper end.
_SHARES = {"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "em", "avg", "maj", "pass_all"}


def _metrics(row: dict[str, Any]) -> dict[str, float]:
    numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and "," in name}
    return {name: float(value) for name, value in numbers.items() if "_stderr," not in name}


def _foreign_result(name: str, found: dict[str, Any], lm: DmsLM, label: Label, record: dict[str, Any]) -> Result:
    samples, values = found["n-samples"], _metrics(found["results"][name])
    number = samples[name]["effective"] if name in samples else sum(n["effective"] for n in samples.values())
    if not values:
        raise ValueError(f"lm-eval computed no metric of {name}; look into its file")
    metrics = {key: [value, *_interval(key, value, number)] for key, value in values.items()}
    headline, (value, low, high) = next(iter(metrics.items()))
    requests, seconds, truncated = [], 0.0, 0
    for asked in (asked for asked in lm.asked if asked.task == name or name not in samples):
        for sample in lm.stored(asked):
            requests.append(sample.trace.request(sample.num_prompt))
            seconds += sample.seconds
            truncated += sample.finish_reason == "length"
    usage = accounting.usage(requests) if requests else None
    if record.get("budget") and requests:
        tokens = sum(request.num_tokens for request in requests) / len(requests)
        label = replace(label, target_cr=round(tokens / record["budget"], 2))
    return Result(
        **vars(label),
        task=name,
        measured_cr=usage.measured_cr if usage else None,
        num_problems=number,
        accuracy=value if low is not None else None,
        accuracy_low=low,
        accuracy_high=high,
        perplexity=value if "perplexity" in headline else None,
        kv_reads=usage.kv_reads if usage else None,
        peak_tokens=usage.peak_tokens if usage else None,
        kv_bytes_peak=usage.kv_bytes_peak if usage else None,
        tokens_generated=usage.tokens_generated if usage else 0,
        seconds=seconds,
        headline=headline,
        metrics=metrics,
        truncation_rate=truncated / len(requests) if requests else None,
        settings=record,
    )


def _interval(name: str, value: float, number: int) -> tuple[float, float] | tuple[None, None]:
    """Wilson's interval of a share of `number` problems; none for what is no share."""
    if name.partition(",")[0] not in _SHARES or not 0 <= value <= 1:
        return None, None
    return pareto.wilson_interval(value * number, number)
