"""lm-eval's view of a model under a cache policy: `--model dms`.

    lm-eval requests -> chains not in the store -> generation.Engine (compact cache) -> store -> graded as they end -> Reply
    loglikelihood    -> one forward through a compact cache: evictions are active in what is scored

A request that lm-eval repeats k times becomes the chains 0 to k - 1 of its problem, each with random numbers of its own.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor

from dms_lab.cache.compact import CompactCache
from dms_lab.chains import Generated, Prompt, Settings
from dms_lab.evaluation.attached import Attached, attach
from dms_lab.evaluation.benchmarks import BENCHMARKS, END_THINK, THINK, Graders, Reply, thought_end
from dms_lab.evaluation.checking import read_answer
from dms_lab.evaluation.grading import Grading
from dms_lab.evaluation.progress import Meter
from dms_lab.evaluation.sample import Sample, now
from dms_lab.evaluation.scores import cut
from dms_lab.evaluation.store import SampleStore
from dms_lab.evaluation.verdict import Verdict
from dms_lab.generation import Engine, end_ids
from dms_lab.policies import FullPolicy
from dms_lab.sampling import SamplingConfig

_log = logging.getLogger(__name__)
THINKING = ("auto", "yes", "no")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class UnansweredError(ValueError):
    """Some chains could not be generated; the others were, and are in the store if there is one."""


@dataclass(frozen=True)
class Job:
    """One chain that lm-eval asks for."""

    task: str
    problem: str
    chain: int
    ids: list[int]
    doc: dict[str, Any]
    think_end: str | None
    prompt_hash: str

    @property
    def name(self) -> tuple[str, int]:
        """What tells it from the others of its task."""
        return self.problem, self.chain


@dataclass(frozen=True)
class Asked:
    """The chains of one task that were asked for, by (problem, chain), and the run and limit they were asked with."""

    task: str
    run: str
    max_tokens: int
    jobs: dict[tuple[str, int], Job]


@register_model("dms")
class DmsLM(HFLM):
    """A model under a cache policy. Give `checkpoint`, or `pretrained` (hub id or folder) with `policy` and its `budget`,
    or `attached=Attached.of(model, tokenizer)` for a retrofitted model in memory.

    `samples`: a folder (or store) in which every chain is kept, so that a stopped run goes on; `writer` names this job's
    shard in it. `places` chains decode together; `batch_size` is for loglikelihoods alone. `thinking`: whether answers
    stand after the end of a thought (and templates that can are told so); `auto`: if `</think>` is a token and the prompt
    does not close the thought itself.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        checkpoint: str | None = None,
        policy: str | None = None,
        budget: int | None = None,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        places: int = 16,
        storage: str = "model",
        num_pages: int | None = None,
        page_size: int | None = None,
        prefill_chunk: int = 256,
        reserve: float = 0.05,
        deterministic: bool = False,
        attention: str = "auto",
        step: str = "auto",
        seed: int = 0,
        thinking: str = "auto",
        samples: str | SampleStore | None = None,
        writer: str = "shard-1-of-1",
        max_length: int | None = None,
        attached: Attached | None = None,
        graders: Graders | None = None,
        grader_threads: int = 2,
        **template: Any,
    ) -> None:
        if thinking not in THINKING:
            raise ValueError(f"thinking={thinking!r} is not known; choose one of {', '.join(THINKING)}")
        known = {"enable_thinking", "chat_template_args", "add_bos_token"}
        if not str(batch_size).isdigit():
            raise ValueError(f"batch_size={batch_size} cannot be chosen here; give a number (of sequences scored together)")
        if unknown := sorted(set(template) - known):
            raise ValueError(f"model_args hold {', '.join(unknown)}, which the model dms does not know")
        self.attached = attached or attach(pretrained, checkpoint, policy, budget, dtype, device)
        logger = logging.getLogger("lm_eval.models.huggingface")
        before, level = logger.level, logging.ERROR  # it warns that a model was passed in, which is so on purpose
        logger.setLevel(level)
        think_end = END_THINK if template.get("enable_thinking") else None
        if thinking != "auto":  # templates that know no such switch ignore it
            asked = {"enable_thinking": thinking == "yes"}
            template["chat_template_args"] = asked | (template.get("chat_template_args") or {})
        super().__init__(
            pretrained=self.attached.handle.model,
            tokenizer=self.attached.tokenizer,
            backend="causal",
            batch_size=int(batch_size),
            max_length=max_length,
            think_end_token=think_end,
            **template,
        )
        logger.setLevel(before)
        self.settings = Settings(
            1024, places, num_pages, page_size, storage, prefill_chunk, reserve, deterministic, attention, step
        )
        self.seed, self.thinking = seed, thinking
        self.graders, self.grader_threads = graders or Graders(), grader_threads
        self.store = SampleStore(Path(samples), writer) if isinstance(samples, str) else samples
        self.asked: list[Asked] = []

    # -- loglikelihood -----------------------------------------------------------------------------------------------
    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] of right-padded ids [B, T], evictions active; padding comes last and changes nothing."""
        policy = self.attached.make_policy()
        if isinstance(policy, FullPolicy) and self.settings.storage == "model":
            with torch.no_grad():
                return self.model(inps, use_cache=False).logits
        cache = CompactCache(
            policy,
            self.settings.storage,
            self.settings.page_size,
            chunk=self.settings.prefill_chunk,
            attention=self.settings.attention,
        )
        with torch.no_grad():
            return self.model(inps, past_key_values=cache, use_cache=True).logits

    # -- generation --------------------------------------------------------------------------------------------------
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The reply to every request, in their order; raises `UnansweredError` at the end if some could not be answered."""
        jobs = list(self._jobs(requests))
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            asked = json.dumps([request.task_name, request.args[1]], sort_keys=True, default=str)
            groups.setdefault(asked, []).append(index)
        replies: dict[int, str] = {}
        failures: list[str] = []
        for indices in groups.values():
            found, failed = self._answer([jobs[i] for i in indices], requests[indices[0]].args[1])
            replies |= {i: found.get(jobs[i].name, "") for i in indices}
            failures += failed
        if failures:
            shown = "; ".join(failures[:3]) + (f"; and {len(failures) - 3} more" if len(failures) > 3 else "")
            is_kept = self.store is not None and len(failures) < len(requests)
            kept = f"; the other chains are kept in {self.store.folder}" if is_kept else ""
            raise UnansweredError(f"{len(failures)} of {len(requests)} chains could not be generated: {shown}{kept}")
        return [replies[i] for i in range(len(requests))]

    def _jobs(self, requests: Sequence[Instance]) -> Iterator[Job]:
        counts: dict[tuple[str, str], int] = {}
        encoded: dict[str, list[int]] = {}
        for request in requests:
            text = request.args[0]
            if text not in encoded:
                encoded[text] = self.tok_encode(text)
            ids = encoded[text]
            prompt_hash = hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:12]
            task = request.task_name or "task"
            problem = str(request.doc["id"]) if task in BENCHMARKS else prompt_hash
            chain = counts[task, problem] = counts.get((task, problem), -1) + 1
            think_end = self.think_end(text, task in BENCHMARKS)
            yield Job(task, problem, chain, ids, request.doc, think_end, prompt_hash)

    def think_end(self, prompt: str, is_ours: bool = True) -> str | None:
        """The text after which an answer to this prompt stands; None: the model does not think, or no longer.

        With `auto`, other tasks than this project's are read as texts that may or may not hold a thought, unless the prompt
        opens one.
        """
        if self.thinking != "auto":
            return END_THINK if self.thinking == "yes" else None
        may_think = (is_ours or prompt.rstrip().endswith(THINK)) and END_THINK in self.tokenizer.get_vocab()
        return END_THINK if may_think and END_THINK not in prompt[max(0, prompt.rfind(THINK)) :] else None

    def sampling_of(self, gen_kwargs: dict[str, Any], think_end: str | None) -> tuple[SamplingConfig, int]:
        """How tokens are drawn, and how many at most, by lm-eval's keywords; `ValueError` for others."""
        values = dict(normalize_gen_kwargs(gen_kwargs, self.max_gen_toks))
        most, sampled = values.pop("max_gen_toks"), values.pop("do_sample", False)
        until = [text for text in values.pop("until", None) or [] if text]
        if unknown := sorted(set(values) - set(_SAMPLING)):
            raise ValueError(f"generation_kwargs hold {', '.join(unknown)}; known are until, {', '.join(_SAMPLING)}")
        if not sampled:
            values = {key: value for key, value in values.items() if key == "repetition_penalty"}
        stop_after = think_end if until else None
        if until and think_end is None and self.thinking == "auto" and END_THINK in self.tokenizer.get_vocab():
            _log.warning("stop strings %s hold from the first token; if this model thinks, give thinking=yes", until)
        return SamplingConfig(**values, stop=tuple(until), stop_after=stop_after, seed=self.seed), most

    def run_of(self, sampling: SamplingConfig) -> str:
        """12 hex digits over what decides the tokens of a chain beside its prompt; a longer run has the same."""
        parts: dict[str, Any] = asdict(sampling) | self.attached.identity | {"storage": self.settings.storage}
        if self.settings.deterministic:  # the shapes of the matrices are part of the promise
            parts |= {"deterministic": [self.settings.places, self.settings.prefill_chunk]}
        if self.settings.attention not in ("auto", "torch"):
            parts |= {"attention": self.settings.attention}
        if self.settings.step == "graph":
            parts |= {"step": "graph"}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]

    def _answer(self, jobs: list[Job], gen_kwargs: dict[str, Any]) -> tuple[dict[tuple[str, int], str], list[str]]:
        """Replies by (problem, chain) of the chains of one task, and a sentence for each that failed."""
        task = jobs[0].task
        sampling, most = self.sampling_of(gen_kwargs, jobs[0].think_end)
        run = self.run_of(sampling)
        asked = Asked(task, run, most, {job.name: job for job in jobs})
        self.asked.append(asked)
        replies: dict[tuple[str, int], str] = {}
        failures: list[str] = []
        served: set[tuple[str, int]] = set()
        with self.grading(task, run) as grading, Meter(task, [job.problem for job in jobs], most) as meter:

            def take(job: Job, sample: Sample, is_new: bool) -> None:
                part = cut(sample, most)
                text = sample.text if len(part.ids) == sample.num_tokens else self.text_of(part.ids)
                meter.chain(job.problem, part.truncated, is_new)
                if grading is None:
                    replies[job.name] = read_answer(text, job.think_end or thought_end(text)) or ""
                    return

                def done(verdict: Verdict) -> None:
                    meter.graded(job.problem, verdict.score)
                    replies[job.name] = Reply(text, part.truncated, verdict)

                grading.put(sample, most, job.doc, job.think_end, done)

            for sample in self.stored(asked):
                take(asked.jobs[sample.problem, sample.chain], sample, is_new=False)
                served.add((sample.problem, sample.chain))
            left = [Prompt(job.problem, job.ids, job.chain) for job in jobs if job.name not in served]
            for found in self._generate(left, most, sampling, meter):
                job = asked.jobs[found.problem, found.chain]
                if found.error:
                    failures.append(f"{task}, problem {job.problem}, chain {job.chain}: {found.error}")
                    continue
                sample = self._sample(job, found, run, most)
                if self.store is not None:
                    self.store.add(sample)
                take(job, sample, is_new=True)
        return replies, failures

    def grading(self, task: str, run: str, regrade: bool = False) -> "Grading | nullcontext[None]":
        """What grades the chains of a task; nothing for tasks that are not of this project."""
        if task not in BENCHMARKS:
            return nullcontext()
        where = (self.store, task, run, self.grader_threads, regrade)
        return Grading(BENCHMARKS[task], self.graders, self.text_of, *where)

    def stored(self, asked: Asked) -> Iterator[Sample]:
        """The chains asked for that the store has, to the same prompt and long enough, by problem and chain."""
        for sample in self.store.samples(asked.task, asked.run) if self.store is not None else ():
            job = asked.jobs.get((sample.problem, sample.chain))
            if job is not None and job.prompt_hash == sample.prompt_hash and sample.serves(asked.max_tokens):
                yield sample

    def _generate(self, prompts: list[Prompt], most: int, sampling: SamplingConfig, meter: Meter) -> Iterator[Generated]:
        if not prompts:
            return
        is_fixed = self.settings.deterministic
        places = self.settings.places if is_fixed else min(self.settings.places, len(prompts))
        engine = Engine(
            self.attached.handle,
            self.attached.make_policy(),
            replace(self.settings, max_new_tokens=most, places=places),
            sampling,
            self._end_ids,
            self.tokenizer,
        )
        yield from engine.run(prompts, lambda prompt, ids: meter.token())

    @property
    def _end_ids(self) -> list[int]:
        return end_ids(self.attached.handle.model, self.tokenizer)

    def _sample(self, job: Job, found: Generated, run: str, most: int) -> Sample:
        return Sample(
            task=job.task,
            problem=job.problem,
            chain=job.chain,
            seed=self.seed,
            run=run,
            prompt_hash=job.prompt_hash,
            max_tokens=most,
            num_prompt=len(job.ids),
            text=self.text_of(found.ids),
            ids=tuple(found.ids),
            finish_reason=found.finish_reason,
            trace=found.trace,
            num_heads=self.attached.num_heads,
            seconds=found.seconds,
            created=now(),
        )

    def text_of(self, ids: Sequence[int]) -> str:
        """What generated ids say: special tokens as they are, the one that ended the chain left out."""
        ids = ids[:-1] if ids and ids[-1] in self._end_ids else ids
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
