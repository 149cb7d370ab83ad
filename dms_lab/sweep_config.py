"""What a sweep is: `experiments/<name>/sweep.yaml`, its schema and validation. No heavy imports, as in `config`.

question: Does delayed eviction need a window?      one sentence, optional
parts:                                              each a product of Hydra's sweep syntax
  - overrides: [model=tiny, trained=all, "window=1,4,16", "seed=range(3)"]
    then: [[eval=reasoning, tasks=dms_tiny_ledger]] words of dms_lab.evaluate, on the run of each point
  - command: evaluate                               no training: words of dms_lab.evaluate, swept
    overrides: [eval=reasoning, model=tiny, "policy=tova,h2o", budget=128]
cluster: local                                      local | slurm, as conf/cluster/
workers: 2                                          local: points at a time
resources: {timeout_min: 60}                        what differs from conf/cluster/<cluster>.yaml
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dms_lab.typed_config import build

COMMANDS = ("train", "evaluate")
CLUSTERS = ("local", "slurm")
SWEEP = "sweep.yaml"


@dataclass(frozen=True)
class Part:
    """A product of overrides for one command; `then` are evaluations of each point's run after its training."""

    overrides: tuple[str, ...]
    command: str = "train"
    name: str | None = None
    then: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Resources:
    """What a job asks Slurm for. `mem_gb` and `gpus_per_node` a node, `cpus_per_task` a process, nulls Slurm's default.

    `nodes` is the run's `num_nodes`, as null is. A job is told `signal_delay_s` seconds before `timeout_min` minutes are
    over, saves, and is queued again, `max_num_timeout` times. `setup`: shell lines before it. `additional_parameters`: of
    sbatch. `gpu_memory_gb` of 1e9 bytes is what a plan compares a training with; Slurm is not asked for it.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gpus_per_node: int | None = None
    gpu_memory_gb: float | None = None
    nodes: int | None = None
    cpus_per_task: int | None = None
    mem_gb: float | None = None
    timeout_min: int = 720
    array_parallelism: int = 16
    max_num_timeout: int = 100
    signal_delay_s: int = 180
    setup: tuple[str, ...] = ()
    additional_parameters: dict | None = None


@dataclass(frozen=True)
class SweepConfig:
    """A sweep: its name, the folder it is described in, its parts, and where they run."""

    name: str
    folder: Path
    parts: tuple[Part, ...]
    question: str | None = None
    cluster: str = "local"
    workers: int = 1
    resources: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def records(self) -> Path:
        """The folder of its jobs: what was submitted, and their logs."""
        return Path("runs/sweeps") / self.name

    @property
    def results(self) -> Path:
        """Where `collect` writes the results of all points."""
        return self.folder / ("results.csv" if self.name == self.folder.absolute().name else f"{self.name}.csv")


@dataclass(frozen=True)
class _File:
    """The plain members of a sweep file."""

    question: str | None = None
    cluster: str = "local"
    workers: int = 1


_NESTED = ("parts", "resources")
RESOURCE_KEYS = (*(f.name for f in dataclasses.fields(Resources)), "sizes.*", "size_of.*", "additional_parameters.*")


def load_sweep(place: str | Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """The sweep described in a folder's `sweep.yaml`, or in the file given; `ValueError` for the first thing wrong in it.

    `overrides` are `cluster=`, `workers=` and `resources.<key>=` of a command line. A sweep is called as its folder; one in
    another file, `experiments/windows/full.yaml`, is `windows-full`.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = Path(place)
    path = path / SWEEP if path.is_dir() or path.suffix not in (".yaml", ".yml") else path
    if not path.is_file():
        raise ValueError(f"no {path}: give a sweep's folder with a {SWEEP} in it, or its file, e.g. experiments/windows")
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OmegaConfBaseException, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # a YAML error of whatever parser OmegaConf brings
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no sweep; it needs parts:, each with overrides:")
    name = path.absolute().parent.name
    name = name if path.name == SWEEP else f"{name}-{path.stem}"
    try:
        return build_sweep(_overridden(values, overrides), name, path.parent)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def build_sweep(values: dict[str, Any], name: str, folder: Path) -> SweepConfig:
    """A sweep from plain values; `ValueError` for the first thing that is wrong."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"a sweep is called as its folder, and {name!r} is no name of letters, digits, '.', '_' and '-'")
    values = dict(values)
    nested = {key: values.pop(key) for key in _NESTED if key in values}
    plain = _build(_File, values, "", _NESTED)
    if plain.cluster not in CLUSTERS:
        raise ValueError(f"cluster={plain.cluster!r} is not known; choose one of {', '.join(CLUSTERS)}")
    if plain.workers < 1:
        raise ValueError(f"workers={plain.workers} must be at least 1")
    parts = nested.get("parts")
    if not isinstance(parts, list) or not parts:
        raise ValueError("parts is missing or empty; a sweep has at least one part, with overrides: [key=value, ...]")
    resources = nested.get("resources") or {}
    check_resources(resources, "resources.")
    made = tuple(_part(part, f"parts[{index}]") for index, part in enumerate(parts))
    return SweepConfig(name, folder, made, plain.question, plain.cluster, plain.workers, resources)


def _build(schema: type, values: dict[str, Any], where: str, also: Sequence[str] = ()) -> Any:
    """`typed_config.build` whose error names the members `also` as well."""
    from dms_lab.typed_config import check_overrides

    known = [where + f.name for f in dataclasses.fields(schema)] + [where + name for name in also]
    check_overrides([f"{where}{key}=" for key in values], sorted(known))
    return build(schema, values, where)


def _part(values: Any, where: str) -> Part:
    if not isinstance(values, dict):
        raise ValueError(f"{where}={values!r} must be a mapping with overrides: [key=value, ...]")
    values = dict(values)
    then = values.pop("then", None) or []
    _build(Part, {k: v for k, v in values.items() if k != "overrides"} | {"overrides": ()}, f"{where}.", ("then",))
    part = Part(
        overrides=_words(values.get("overrides"), f"{where}.overrides"),
        command=values.get("command", "train"),
        name=values.get("name"),
        then=tuple(_words(words, f"{where}.then[{index}]") for index, words in enumerate(then)),
    )
    if part.command not in COMMANDS:
        raise ValueError(f"{where}.command={part.command!r} is not known; choose one of {', '.join(COMMANDS)}")
    if part.then and part.command != "train":
        raise ValueError(f"{where}.then is for what follows a training; give that evaluation a part of its own")
    return part


def _words(value: Any, where: str) -> tuple[str, ...]:
    """A list of `key=value`; a comma that YAML took for the list's own is told of."""
    if not isinstance(value, list):
        raise ValueError(f'{where}={value!r} must be a list of key=value, e.g. [model=tiny, "window=1,4"]')
    for word in value:
        if not isinstance(word, str) or "=" not in word:
            raise ValueError(
                f"{where} holds {word!r}, which is no key=value; a value with commas must stand in quotes, as "
                '"window=1,4,16"'
            )
    return tuple(value)


def check_resources(values: Any, where: str) -> None:
    """Raises `ValueError` unless `values` are members of `Resources`, or `sizes` and `size_of` of conf/cluster."""
    if not isinstance(values, dict):
        raise ValueError(f"{where.rstrip('.')}={values!r} must be a mapping, e.g. {{timeout_min: 60}}")
    values = dict(values)
    sizes, size_of = values.pop("sizes", None) or {}, values.pop("size_of", None) or {}
    build_resources(values, where, ("sizes", "size_of"))
    for size, members in sizes.items():
        build_resources(members, f"{where}sizes.{size}.")
    for model, size in size_of.items():
        if not isinstance(size, str):
            raise ValueError(f"{where}size_of.{model}={size!r} must name one of sizes")


def build_resources(values: dict[str, Any], where: str = "resources.", also: Sequence[str] = ()) -> Resources:
    """Resources of the right types and in range; unknown keys are refused with the nearest name."""
    values = dict(values)
    more = values.pop("additional_parameters", None)
    if not isinstance(more, dict | None):
        raise ValueError(f"{where}additional_parameters={more!r} must be a mapping of sbatch's options, e.g. {{nice: 100}}")
    made = dataclasses.replace(_build(Resources, values, where, also), additional_parameters=more)
    numbers = ("nodes", "cpus_per_task", "mem_gb", "gpu_memory_gb", "timeout_min", "array_parallelism", "signal_delay_s")
    for name in numbers:
        if getattr(made, name) is not None and getattr(made, name) <= 0:
            raise ValueError(f"{where}{name}={getattr(made, name):g} must be above 0")
    if {"timeout_min", "signal_delay_s"} <= set(values) and made.timeout_min * 60 < 2 * made.signal_delay_s:
        raise ValueError(
            f"{where}signal_delay_s={made.signal_delay_s} leaves a job of timeout_min={made.timeout_min} no time to run: "
            "it would be told to stop as it starts; give it at least twice as long"
        )
    return made


def _overridden(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The values of a file with `cluster=`, `workers=` and `resources.<key>=` of a command line put in."""
    from omegaconf import OmegaConf

    from dms_lab.typed_config import check_overrides

    for word in overrides:
        if "=" not in word:
            raise ValueError(f"{word!r} is no key=value; cluster=, workers= and resources.<key>= may be given")
        check_overrides([word], ("cluster", "workers", *(f"resources.{name}" for name in RESOURCE_KEYS)))
    given = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
    more = given.pop("resources", {})
    merged = OmegaConf.merge(values.get("resources") or {}, more)
    return values | given | {"resources": OmegaConf.to_container(merged)}
