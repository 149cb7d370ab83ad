"""What a multirun's command line asks for, as the sweep that it is, and the file that it leaves of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from dms_lab.sweep_config import COMMANDS, SWEEP, SweepConfig, build_sweep, load_sweep
from dms_lab.sweeping.evaluations import OF_ALL
from dms_lab.sweeping.points import Point, expand


@dataclass(frozen=True)
class Asked:
    """The command and words of the points, the sweep they are, where they run, and what searches among them, if any."""

    command: str
    words: tuple[str, ...]
    name: str | None
    cluster: str
    resources: dict[str, Any]
    search: str | None

    @property
    def is_other(self) -> bool:
        """Whether it is no sweep's: runs' own evaluations once more, or a list of tasks."""
        return self.command == "evaluate" and self.name is None and not any(w.startswith("eval=") for w in self.words)

    @property
    def sweep(self) -> SweepConfig:
        """The sweep of all words."""
        return sweep_of(self.command, self.words, self.name, self.cluster, self.resources)


def sweep_of(
    command: str,
    words: Sequence[str],
    name: str | None,
    cluster: str = "local",
    resources: dict[str, Any] | None = None,
) -> SweepConfig:
    """A sweep of one part, in `experiments/<name>`."""
    values = {"parts": [{"command": command, "overrides": list(words)}], "cluster": cluster, "resources": resources or {}}
    return build_sweep(values, name or "unnamed", Path("experiments", name or "unnamed"))


def is_of_all(word: str) -> bool:
    """Whether an override is said of all points together."""
    return word.lstrip("+~").partition("=")[0].split(".")[0] in OF_ALL


def read_asked(config: DictConfig) -> Asked:
    """What the composed configuration of a multirun was asked; `ValueError` if a sweep cannot be that."""
    command = config.hydra.job.config_name
    if command not in COMMANDS:
        raise ValueError(f"dms_lab.{command} does one thing at a time; -m is for dms_lab.train and dms_lab.evaluate")
    words, resources = [], OmegaConf.create({})
    for override in OverridesParser.create().parse_overrides(list(config.hydra.overrides.task)):
        if not is_of_all(override.input_line):
            words.append(override.input_line)
        elif override.is_sweep_override():
            key = override.key_or_group
            raise ValueError(f"{override.input_line}: {key} is said of all points together, and cannot be swept itself")
        elif inner := override.key_or_group.partition(".")[2]:
            OmegaConf.update(resources, inner, override.value(), force_add=True)
    choices = config.hydra.runtime.choices
    return Asked(
        command=command,
        words=tuple(words),
        name=config.sweep,
        cluster=choices.cluster,
        resources=OmegaConf.to_container(resources),
        search=choices.get("search"),
    )


def keep_sweep(sweep: SweepConfig, points: Sequence[Point]) -> None:
    """Leaves `sweep.yaml` in the sweep's folder; `ValueError` if one is there that has other points."""
    path = sweep.folder / SWEEP
    if not path.is_file():
        write_sweep(sweep, [{"command": part.command, "overrides": list(part.overrides)} for part in sweep.parts])
        return
    known = expand(load_sweep(path))
    if any(point.then for point in known):
        raise ValueError(
            f"{path} has evaluations that follow (then:), which -m does not run; use python -m dms_lab.sweep submit "
            f"{sweep.folder}, or another sweep="
        )
    mine, its = ({point.hash for point in them} for them in (points, known))
    if mine != its:
        raise ValueError(
            f"{path} is another sweep: it has {len(its)} points, this one {len(mine)}, of which {len(mine & its)} are the "
            "same; give another sweep=, or change or remove that file"
        )


def write_sweep(sweep: SweepConfig, parts: list[dict[str, Any]]) -> None:
    """Writes `sweep.yaml` of these parts, whole or not at all."""
    plain: dict[str, Any] = {"parts": parts, "cluster": sweep.cluster}
    if sweep.resources:
        plain["resources"] = sweep.resources
    sweep.folder.mkdir(parents=True, exist_ok=True)
    temporary = (sweep.folder / SWEEP).with_suffix(".tmp")
    temporary.write_text(OmegaConf.to_yaml(OmegaConf.create(plain)))
    temporary.replace(sweep.folder / SWEEP)
