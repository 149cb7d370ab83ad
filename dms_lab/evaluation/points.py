"""From stored chains to results: every width and every limit of tokens that they allow, without generating.

    store -> chains of a problem, cut at each L -> graded where they are cut -> scores.point for each (W, L) -> Result

Chains of one problem are in memory at a time: their traces are by far the largest thing there is.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dms_lab import accounting, pareto
from dms_lab.evaluation import scores
from dms_lab.evaluation.benchmarks import BENCHMARKS
from dms_lab.evaluation.hard import Label
from dms_lab.evaluation.lm import Asked, DmsLM
from dms_lab.evaluation.sample import Key, Sample
from dms_lab.evaluation.scores import Chain
from dms_lab.evaluation.verdict import Verdict
from dms_lab.evaluation_config import ReasoningConfig
from dms_lab.results import Result


def results_of(task: str, lms: Sequence[DmsLM], settings: ReasoningConfig, label: Label, regrade: bool) -> list[Result]:
    """A result for each width and limit, from the chains that `lms` (one a seed) answered `task` with."""
    benchmark = BENCHMARKS[task]
    headline = benchmark.headline if settings.headline == "auto" else settings.headline
    draws = [_Draw(lm, next(asked for asked in lm.asked if asked.task == task), settings, regrade) for lm in lms]
    found = []
    for limit, width in itertools.product(draws[0].limits, settings.width):
        point = scores.point(
            [draw.chains[limit] for draw in draws], width, limit, headline, _mean_peaks(draws, width, limit)
        )
        metrics = {name: getattr(point, name) for name in scores.ACCURACIES}
        found.append(
            Result(
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
                tokens_generated=round(point.tokens_generated * width * point.num_problems),
                seconds=sum(draw.seconds for draw in draws),
                width=width,
                max_tokens=limit,
                headline=headline,
                metrics={name: [m.value, m.low, m.high] for name, m in metrics.items()},
                truncation_rate=point.truncated,
                num_samples=point.num_chains,
                sampling_seeds=[lm.seed for lm in lms],
            )
        )
    return found


def _mean_peaks(draws: "Sequence[_Draw]", width: int, limit: int) -> float:
    peaks = [peak for draw in draws for peak in draw.peaks[width, limit]]
    return sum(peaks) / len(peaks)


class _Draw:
    """The chains of one seed: for each limit, those of each problem in the order that they were asked in."""

    def __init__(self, lm: DmsLM, asked: Asked, settings: ReasoningConfig, regrade: bool) -> None:
        self.lm, self.asked = lm, asked
        self.limits = sorted(settings.max_tokens or (asked.max_tokens,))
        self.seconds = 0.0
        verdicts = self._verdicts(regrade)
        order = dict.fromkeys(problem for problem, _ in asked.jobs)
        by_limit: dict[int, dict[str, list[Chain]]] = {limit: {} for limit in self.limits}
        peaks: dict[tuple[int, int], dict[str, float]] = {(w, limit): {} for w in settings.width for limit in self.limits}
        for problem, samples in self._by_problem():
            self.seconds += sum(sample.seconds for sample in samples)
            for limit in self.limits:
                chains = [scores.judged(sample, verdicts[sample.key, limit], limit) for sample in samples]
                by_limit[limit][problem] = [replace(chain, live=None) for chain in chains]
                lives = [chain.live for chain in chains]
                for width in settings.width:
                    peaks[width, limit][problem] = scores.peak_of(lives, scores.subsets(len(lives), width))
        self.chains: dict[int, Mapping[str, Sequence[Chain]]] = {
            limit: {problem: found[problem] for problem in order} for limit, found in by_limit.items()
        }
        self.peaks = {key: [found[problem] for problem in order] for key, found in peaks.items()}

    def _samples(self) -> Iterator[Sample]:
        """The chains that were asked for, by problem and chain."""
        return self.lm.stored(self.asked)

    def _by_problem(self) -> Iterator[tuple[str, list[Sample]]]:
        for problem, samples in itertools.groupby(self._samples(), key=lambda sample: sample.problem):
            yield problem, sorted(samples, key=lambda sample: sample.chain)

    def _verdicts(self, regrade: bool) -> dict[tuple[Key, int], Verdict]:
        """The verdict on each chain as it stands at each limit."""
        verdicts: dict[tuple[Key, int], Verdict] = {}
        with self.lm.grading(self.asked.task, self.asked.run, regrade) as grading:
            for sample in self._samples():
                job = self.asked.jobs[sample.problem, sample.chain]
                for limit in self.limits:

                    def done(verdict: Verdict, key: Any = (sample.key, limit)) -> None:
                        verdicts[key] = verdict

                    grading.put(sample, limit, job.doc, job.think_end, done)
        return verdicts


def foreign_results(task: str, found: dict[str, Any], lm: DmsLM, label: Label) -> list[Result]:
    """A result for a task (or group) of lm-eval's own, by its first metric; costs where chains were generated."""
    if task not in found["results"]:
        raise ValueError(f"lm-eval gives no result named {task}; name one of {', '.join(found['results'])}")
    samples = found["n-samples"]
    number = samples[task]["effective"] if task in samples else sum(n["effective"] for n in samples.values())
    values = {
        name: float(value)
        for name, value in found["results"][task].items()
        if isinstance(value, int | float) and "," in name and "_stderr," not in name
    }
    metrics = {name: [value, *_interval(name, value, number)] for name, value in values.items()}
    headline, (value, low, high) = next(iter(metrics.items()))
    is_share = low is not None
    chains = [sample for asked in lm.asked for sample in lm.stored(asked)]
    usage = accounting.usage(sample.trace.request(sample.num_prompt) for sample in chains) if chains else None
    return [
        Result(
            **vars(label),
            task=task,
            measured_cr=usage.measured_cr if usage else None,
            num_problems=number,
            accuracy=value if is_share else None,
            accuracy_low=low,
            accuracy_high=high,
            perplexity=None if is_share else value,
            kv_reads=usage.kv_reads if usage else None,
            peak_tokens=usage.peak_tokens if usage else None,
            kv_bytes_peak=usage.kv_bytes_peak if usage else None,
            tokens_generated=usage.tokens_generated if usage else 0,
            seconds=sum(sample.seconds for sample in chains),
            headline=headline,
            metrics=metrics,
            truncation_rate=sum(s.finish_reason == "length" for s in chains) / len(chains) if chains else None,
        )
    ]


def _interval(name: str, value: float, number: int) -> tuple[float, float] | tuple[None, None]:
    """Wilson's interval of a share of `number` problems; none for perplexities and the like, which are no shares."""
    if "perplexity" in name or "bits_per" in name or not 0 <= value <= 1:
        return None, None
    return pareto.wilson_interval(value * number, number)
