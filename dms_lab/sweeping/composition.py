"""Configurations composed by Hydra, hundreds in a second or two: what groups decide is composed once.

Hydra's `compose` reads and merges every file for every call, some 100 ms. Here that happens once for each choice of groups
(`model=`, `data=`, ...); `key=value` words are then put into a copy, as Hydra does last of all.
"""

import copy
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import dms_lab

_MARKS = re.compile(r"\$\{|\?\?\?")  # of interpolations, and of what is still to be given


def config_folder() -> Path:
    """The folder of the YAML files, in a checkout and in an installed package."""
    package = Path(dms_lab.__file__).parent
    checkout = package.parent / "conf"
    return checkout if (checkout / "train.yaml").is_file() else package / "conf"


class Composer:
    """Composes configurations of the commands (`train`, `evaluate`) while it is entered."""

    def __init__(self) -> None:
        self._by_groups: dict[tuple[str, ...], DictConfig] = {}
        self._plain: dict[tuple[str, ...], dict[str, Any] | None] = {}

    def __enter__(self) -> "Composer":
        self._before, was = copy.copy(GlobalHydra.instance()), GlobalHydra.instance()
        was.clear()  # within a Hydra application, too
        self._hydra = initialize_config_dir(str(config_folder()), version_base="1.3")
        loader = GlobalHydra.instance().config_loader()
        self._parser = OverridesParser.create(config_loader=loader)
        self._groups = frozenset(loader.list_groups(""))
        return self

    def __exit__(self, *exception: object) -> None:
        GlobalHydra.set_instance(self._before)

    def product(self, words: Sequence[str]) -> list[list[str]]:
        """What `--multirun` would run one after the other: every combination of swept values, the last one fastest."""
        try:
            [combinations] = BasicSweeper.split_arguments(self._parser.parse_overrides(list(words)), None)
        except HydraException as error:
            raise ValueError(_sentence(error)) from error
        return combinations

    def compose(self, command: str, words: Sequence[str]) -> dict[str, Any]:
        """The plain configuration of a command line; `ValueError` with Hydra's reason if it cannot be composed."""
        try:
            overrides = self._parser.parse_overrides(list(words))
            groups = (command, *(o.input_line for o in overrides if not self._sets_a_value(o)))
            if groups not in self._by_groups:
                self._by_groups[groups] = compose(command, overrides=list(groups[1:]))
            values = [o for o in overrides if self._sets_a_value(o)]
            return self._quickly(groups, values) or self._thoroughly(groups, values)
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(_sentence(error)) from error

    def _sets_a_value(self, override: Override) -> bool:
        """Whether it sets a value that is there already, whatever the groups are."""
        is_marked = override.is_add() or override.is_delete() or override.package is not None
        return not is_marked and override.key_or_group not in self._groups

    def _quickly(self, groups: tuple[str, ...], values: Sequence[Override]) -> dict[str, Any] | None:
        """The values put into a plain copy; None where only OmegaConf knows what they come to."""
        if groups not in self._plain:
            found = OmegaConf.to_container(self._by_groups[groups], resolve=False)
            self._plain[groups] = None if _MARKS.search(json.dumps(found)) else found
        if self._plain[groups] is None:
            return None
        found = copy.deepcopy(self._plain[groups])
        for override in values:
            *path, name = override.key_or_group.split(".")
            node, value = found, override.value()
            for key in path:
                node = node.get(key) if isinstance(node, dict) else None
            is_there = isinstance(node, dict) and name in node and not isinstance(node[name], dict)
            if not is_there or isinstance(value, dict) or _MARKS.search(str(value)):
                return None
            node[name] = value
        return found

    def _thoroughly(self, groups: tuple[str, ...], values: Sequence[Override]) -> dict[str, Any]:
        cfg = copy.deepcopy(self._by_groups[groups])
        for override in values:
            OmegaConf.update(cfg, override.key_or_group, override.value(), merge=True)
        return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=groups[0] == "train")


def _sentence(error: Exception) -> str:
    """What Hydra has to say, in one line."""
    return " ".join(str(error).split())
