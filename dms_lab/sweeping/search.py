"""A search by Hydra's Optuna sweeper that survives being stopped, and outlives trials that fail.

    trials.json (trials.TrialFile) -> prepare: what is left -> the sweeper's trials -> finish: best_trials.json, sweep.yaml

The sweeper (1.2.0) ends a search at the first trial that fails. So a failed trial returns infinities, which `TrialFile`
takes for what they are: the trial is failed, no sampler learns from it, and the search goes on.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dms_lab.sweep_config import SWEEP
from dms_lab.sweeping.asked import Asked, is_of_all, sweep_of, write_sweep
from dms_lab.sweeping.objectives import NAMES, check_objectives
from dms_lab.sweeping.points import Point, expand

TRIALS, BEST = "trials.json", "best_trials.json"
_DIRECTIONS = ["minimize", "minimize"]


def prepare(config: DictConfig, asked: Asked, folder: Path) -> list[Point]:
    """Sets the sweeper to what is left of the search in `folder`; the point that its trials vary.

    `ValueError` if that point cannot be run or judged, or if the folder or the sweep's file is of another search.
    """
    if asked.command != "train":
        raise ValueError(f"search={asked.search} varies trainings; use it with dms_lab.train")
    if list(config.hydra.sweeper.direction) != _DIRECTIONS:
        raise ValueError(
            f"hydra.sweeper.direction={list(config.hydra.sweeper.direction)}: two things are minimised, {_DIRECTIONS}"
        )
    fixed = _fixed(asked)
    points = expand(sweep_of(asked.command, [f"{key}={value}" for key, value in fixed.items()], asked.name))
    check_objectives(points[0].config)
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


def _fixed(asked: Asked) -> dict[str, str]:
    """The words that are not searched, as the sweeper hands them to each trial."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    overrides = OverridesParser.create().parse_overrides(list(asked.words))
    return {o.get_key_element(): o.get_value_element_as_str() for o in overrides if not o.is_sweep_override()}


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
