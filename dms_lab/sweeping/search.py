"""A search by Hydra's Optuna sweeper that survives being stopped, and outlives trials that fail.

    trials.json (trials.TrialFile) -> prepare: what is left -> the sweeper's trials -> finish: best_trials.json, sweep.yaml

The sweeper (1.2.0) ends a search at the first trial that fails. So a failed trial returns infinities, which `TrialFile`
takes for what they are: the trial is failed, no sampler learns from it, and the search goes on.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from dms_lab.sweep_config import SWEEP, build_sweep
from dms_lab.sweeping.asked import Asked, is_of_all, write_sweep
from dms_lab.sweeping.objectives import NAMES, check_objectives
from dms_lab.sweeping.points import Point, expand

TRIALS, BEST = "trials.json", "best_trials.json"
_DIRECTIONS = ["minimize", "minimize"]


def prepare(config: DictConfig, asked: Asked, folder: Path) -> list[Point]:
    """Sets the sweeper to what is left of the search in `folder`; points at the ends of what its trials vary.

    `ValueError` if one of these cannot be run or judged, or if the folder or the sweep's file is of another search.
    """
    if asked.command != "train":
        raise ValueError(f"search={asked.search} varies trainings; use it with dms_lab.train")
    if list(config.hydra.sweeper.direction) != _DIRECTIONS:
        raise ValueError(
            f"hydra.sweeper.direction={list(config.hydra.sweeper.direction)}: two things are minimised, {_DIRECTIONS}"
        )
    fixed, points = _points(config, asked)
    for point in points:
        check_objectives(point.config)
    trials = read_trials(folder)
    ended = [trial for trial in trials if trial["state"] in ("COMPLETE", "FAIL")]
    for trial in ended:
        if (its := _of_points(trial["user_attrs"])) != fixed:
            raise ValueError(
                f"{folder / TRIALS} holds a search of {_words(its)}, this one is of {_words(fixed)}; give another sweep="
            )
    if asked.name is not None and not trials and (asked.sweep.folder / SWEEP).exists():
        raise ValueError(f"{asked.sweep.folder / SWEEP} is a sweep, not this search's; give another sweep=")
    config.hydra.sweeper.n_trials = max(0, config.hydra.sweeper.n_trials - len(ended))
    if config.hydra.sweeper.sampler.get("seed") is not None:
        config.hydra.sweeper.sampler.seed += len(ended)  # or it would draw its first trials once more
    return points


def _points(config: DictConfig, asked: Asked) -> tuple[dict[str, str], list[Point]]:
    """The words that are not searched, as the sweeper hands them to each trial; points at the ends of what is searched."""
    params = config.hydra.sweeper.params or {}
    words = [*(f"{key}={value}" for key, value in params.items()), *asked.words]
    overrides = {o.get_key_element(): o for o in OverridesParser.create().parse_overrides(words)}
    fixed = {key: o.get_value_element_as_str() for key, o in overrides.items() if not o.is_sweep_override()}
    searched = {key: _ends(o) for key, o in overrides.items() if key not in fixed}
    first = fixed | {key: ends[0] for key, ends in searched.items()}
    ends = [first, *(first | {key: end} for key, others in searched.items() for end in others[1:])]
    parts = [{"command": asked.command, "overrides": [f"{k}={v}" for k, v in values.items()]} for values in ends]
    name = asked.name or "unnamed"
    return fixed, expand(build_sweep({"parts": parts}, name, Path("experiments", name)))


def _ends(override: Override) -> list[str]:
    """All choices, or the two ends of an interval."""
    if override.is_interval_sweep():
        return [str(override.value().start), str(override.value().end)]
    return list(override.sweep_string_iterator())


def _of_points(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if not is_of_all(key)}


def _words(values: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in values.items()) or "the defaults"


def finish(asked: Asked, folder: Path, knows_tasks: bool) -> None:
    """Writes the best trials, and the sweep's file with a part for each that is complete: `status`, `collect` know it then.

    Best is what no other trial beats in one objective without losing in another.
    """
    complete = [trial for trial in read_trials(folder) if trial["state"] == "COMPLETE"]
    best = [trial for trial in complete if not any(_beats(other["values"], trial["values"]) for other in complete)]
    names = NAMES[knows_tasks]
    plain = [
        {"trial": trial["number"], "params": trial["params"], **dict(zip(names, trial["values"], strict=True))}
        for trial in sorted(best, key=lambda trial: trial["values"])
    ]
    places = [folder]
    if asked.name is not None and complete:
        parts = [
            {"name": f"trial-{trial['number']}", "command": asked.command}
            | {"overrides": [f"{k}={v}" for k, v in (_of_points(trial["user_attrs"]) | trial["params"]).items()]}
            for trial in complete
        ]
        write_sweep(asked.sweep, parts)
        places.append(asked.sweep.folder)
    for place in places:
        (place / BEST).write_text(json.dumps(plain, indent=1) + "\n")
    print(f"{len(best)} best of {len(complete)} complete trials ({', '.join(names)}): {places[-1] / BEST}")


def _beats(values: Sequence[float], others: Sequence[float]) -> bool:
    pairs = list(zip(values, others, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def read_trials(folder: Path) -> list[dict[str, Any]]:
    """The trials of a search so far; [] before there are any."""
    path = folder / TRIALS
    return json.loads(path.read_text()) if path.is_file() else []
