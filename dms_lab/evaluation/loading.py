"""Tasks as lm-eval has them, with their data, and what of a configuration holds for each.

    name -> TaskManager -> tasks (a leaf, or the leaves of a group) -> repeats, sampling, limits set -> LoadedTask

Whatever cannot be run is refused here, before a model is loaded; a setting that has no effect on a task is refused or said.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from transformers import AutoConfig

from dms_lab.evaluation import ruler
from dms_lab.evaluation.benchmarks import BENCHMARKS, TASKS, Benchmark
from dms_lab.evaluation_config import EvaluateConfig, ReasoningConfig

_SAMPLING = ("temperature", "top_p", "top_k", "min_p")
_DATA = ("prompt_style", "choices_seed", "release", "start", "end", "errata", "num_problems")


@dataclass(frozen=True)
class LoadedTask:
    """A task that was asked for: `tasks` and `groups` of lm-eval, and the `settings` that hold for it.

    `benchmark` is None for tasks that are lm-eval's own. `notices` are sentences for the user.
    """

    name: str
    found: dict[str, Any]
    settings: ReasoningConfig
    benchmark: Benchmark | None
    options: dict[str, Any]
    notices: tuple[str, ...] = ()

    @property
    def leaves(self) -> dict[str, ConfigurableTask]:
        """The tasks themselves, by lm-eval's names."""
        return self.found["tasks"]

    @property
    def thinking(self) -> str:
        """How answers are told from thoughts in this task."""
        asks_at_once = self.benchmark is not None and not self.benchmark.thinks
        return "no" if asks_at_once and self.settings.thinking == "auto" else self.settings.thinking

    def record(self) -> dict[str, Any]:
        """What decides the results beside model, policy and seeds, as plain values."""
        kept = ["storage", "deterministic"]
        kept += ["chat"] if self.benchmark else []  # tasks of lm-eval's own are asked in plain text
        kept += ["places"] if self.settings.deterministic else []
        kept += ["attention"] if self.settings.attention not in ("auto", "torch") else []
        kept += ["step"] if self.settings.step == "graph" else []
        values = {name: getattr(self.settings, name) for name in kept}
        (leaf,) = self.leaves.values() if len(self.leaves) == 1 else (None,)
        generation = dict(leaf.get_config("generation_kwargs") or {}) if leaf is not None else {}
        generation = {key: value for key, value in generation.items() if key not in ("max_gen_toks", "until")}
        data = {key: value for key, value in self.options.items() if key not in ("tokenizer", "source")}
        return values | {"thinking": self.thinking, "generation": generation, "data": data}


def load_task(name: str, config: EvaluateConfig, path: str) -> LoadedTask:
    """A task with its data; `path` is the model's folder or hub id, for its tokenizer and its positions."""
    if name in BENCHMARKS:
        return _load_own(name, config, path)
    if name.endswith(".yaml"):
        if not Path(name).is_file():
            raise ValueError(f"there is no task file {name}")
        found = TaskManager(include_defaults=False, metadata={"tokenizer": path}).load([name])
    else:
        manager = TaskManager(metadata={"tokenizer": path})
        if not manager.match_tasks([name]):
            raise ValueError(f"there is no task {name!r}; tasks=list prints this project's, `lm-eval ls tasks` the others")
        found = manager.load([name])
    return _checked_foreign(name, found, config)


# -- this project's ----------------------------------------------------------------------------------------------------
def _load_own(name: str, config: EvaluateConfig, path: str) -> LoadedTask:
    settings, benchmark = config.eval, BENCHMARKS[name]
    if settings.headline == "maj" and not benchmark.votes:
        raise ValueError(f"eval.headline=maj: there is no vote in {name}; it has avg, pass_at_k and pass_all")
    options = {key: getattr(settings, key) for key in _DATA}
    options |= {"source": dict(entry.partition(":")[::2] for entry in settings.sources).get(name), "tokenizer": path}
    if benchmark.kind == "ruler":
        options |= _lengths(name, settings, path)
    notices = []
    if benchmark.kind == "embedded" and settings.lengths:
        options["lengths"] = list(settings.lengths)
        if too_long := [length for length in settings.lengths if length > _positions(path)]:
            notices.append(f"{name}: {too_long[0]} tokens are more than the {_positions(path)} positions of the model")
    options = {key: value for key, value in options.items() if value is not None}
    found = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=options).load([name])
    task = found["tasks"][name]
    settings = _set_generation(task, name, settings)
    if settings.num_samples < config.eval.num_samples or settings.seeds != config.eval.seeds:
        notices.append(
            f"{name} is greedy: its chains are all alike, so one a problem is drawn; eval.temperature=... samples"
        )
    task.set_config("repeats", settings.num_samples)
    return LoadedTask(name, found, settings, benchmark, options, tuple(notices))


def _set_generation(task: ConfigurableTask, name: str, settings: ReasoningConfig) -> ReasoningConfig:
    """Sets how tokens are drawn; returns the settings, with one chain a problem where all would be alike."""
    _prepare(task)
    asked = {key: getattr(settings, key) for key in _SAMPLING if getattr(settings, key) is not None}
    if "temperature" in asked:
        asked["do_sample"] = asked["temperature"] > 0
    if settings.max_tokens:
        asked["max_gen_toks"] = max(settings.max_tokens)
    task.set_config("generation_kwargs", asked, update=True)
    if task.get_config("generation_kwargs").get("do_sample"):
        return settings
    if useless := [f"eval.{key}" for key in _SAMPLING if key in asked and key != "temperature"]:
        raise ValueError(f"{', '.join(useless)} has no effect on {name}, which is greedy; add eval.temperature=0.6, say")
    return replace(settings, samples=1, width=(1,), seeds=settings.seeds[:1])


def _prepare(task: ConfigurableTask) -> None:
    """What lm-eval's own entry does before it evaluates."""
    task.set_fewshot_seed(seed=1234)
    if task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)


def _positions(path: str) -> int:
    return AutoConfig.from_pretrained(path).get_text_config().max_position_embeddings


def _lengths(name: str, settings: ReasoningConfig, path: str) -> dict[str, Any]:
    positions = _positions(path)
    lengths = settings.lengths or ruler.LENGTHS
    if too_long := [length for length in lengths if length > positions]:
        fit = ",".join(str(length) for length in lengths if length <= positions) or "<shorter ones>"
        raise ValueError(
            f"{name}: prompts of {', '.join(map(str, too_long))} tokens exceed the model's {positions} positions; give "
            f"eval.lengths={fit}"
        )
    return {"lengths": list(lengths), "answer_tokens": max(settings.max_tokens) if settings.max_tokens else None}


# -- lm-eval's own -----------------------------------------------------------------------------------------------------
_OWN_KEYS = ("samples", "max_tokens", *_SAMPLING)


def _checked_foreign(name: str, found: dict[str, Any], config: EvaluateConfig) -> LoadedTask:
    for leaf, task in found["tasks"].items():
        _prepare(task)
        if getattr(task, "UNSAFE_CODE", False) and not (config.sandbox == "none" and config.i_trust_the_code):
            raise ValueError(
                f"{leaf} is lm-eval's own and runs what a model wrote without this project's sandbox; add sandbox=none "
                "i_trust_the_code=true if nothing here can be harmed"
            )
        if config.shard[1] > 1 and task.OUTPUT_TYPE != "generate_until":
            raise ValueError(
                f"{leaf} is scored by likelihood, of which nothing is kept: run it without shard=, or leave it out"
            )
    notices = []
    settings = config.eval
    given = [f"eval.{key}" for key in _OWN_KEYS if getattr(settings, key) is not None]
    given += ["eval.width"] if settings.width != (1,) else []
    given += ["eval.seeds"] if len(settings.seeds) > 1 else []
    given += ["eval.headline"] if settings.headline != "auto" else []
    if given:
        notices.append(f"{name} is lm-eval's own and runs as its file says: {', '.join(given)} has no effect on it")
    return LoadedTask(name, found, settings, None, {}, tuple(notices))
