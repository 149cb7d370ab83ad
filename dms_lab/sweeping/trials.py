"""Optuna's trials in a JSON file that is whole after every change. One process writes it, as Hydra's sweeper does."""

import json
import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState


class TrialFile(InMemoryStorage):
    """A storage of one study. Trials that were at work when the file was left are asked for again, unchanged.

    A trial whose values are not finite is failed. (Optuna's SQL storage would do for the file, but this version's needs
    SQLAlchemy 1; and its sweeper can tell Optuna of no failure without ending the search.)
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self._path = Path(path)
        self._failed: set[int] = set()
        self._is_loading = False

    def set_study_directions(self, study_id: int, directions: Sequence[StudyDirection]) -> None:
        """Sets the directions, with which the trials of the file can be told apart, and loads these."""
        super().set_study_directions(study_id, directions)
        self._is_loading = True
        for values in json.loads(self._path.read_text()) if self._path.is_file() else ():
            if (trial := _from_plain(values)) is not None:
                self.create_new_trial(study_id, trial)
        self._is_loading = False

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        trial_id = super().create_new_trial(study_id, template_trial)
        self._save(trial_id)
        return trial_id

    def set_trial_param(self, trial_id: int, name: str, value: float, distribution: BaseDistribution) -> None:
        super().set_trial_param(trial_id, name, value, distribution)
        self._save(trial_id)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        super().set_trial_user_attr(trial_id, key, value)
        self._save(trial_id)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        super().set_trial_system_attr(trial_id, key, value)
        self._save(trial_id)

    def set_trial_values(self, trial_id: int, values: Sequence[float]) -> None:
        if all(map(math.isfinite, values)):
            super().set_trial_values(trial_id, values)
        else:
            self._failed.add(trial_id)

    def set_trial_state(self, trial_id: int, state: TrialState) -> bool:
        is_set = super().set_trial_state(trial_id, TrialState.FAIL if trial_id in self._failed else state)
        self._save(trial_id)
        return is_set

    def _save(self, trial_id: int) -> None:
        """Writes all trials of the study that this one is of, unless they are being read."""
        if self._is_loading:
            return
        trials = self.get_all_trials(self.get_study_id_from_trial_id(trial_id), deepcopy=False)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps([_plain(trial) for trial in trials], indent=1) + "\n")
        temporary.replace(self._path)


def _plain(trial: FrozenTrial) -> dict[str, Any]:
    return {
        "number": trial.number,
        "state": trial.state.name,
        "params": trial.params,
        "values": trial.values,
        "distributions": {name: json.loads(distribution_to_json(d)) for name, d in trial.distributions.items()},
        "user_attrs": trial.user_attrs,
        "system_attrs": trial.system_attrs,
        "started": trial.datetime_start.isoformat() if trial.datetime_start else None,
        "ended": trial.datetime_complete.isoformat() if trial.datetime_complete else None,
    }


def _from_plain(values: dict[str, Any]) -> FrozenTrial | None:
    """A trial as it was; one that had not ended waits, with its parameters fixed. None if it had none yet."""
    state = TrialState[values["state"]]
    if not state.is_finished():
        return _waiting(values["params"] or values["system_attrs"].get("fixed_params"))
    distributions = {name: json_to_distribution(json.dumps(d)) for name, d in values["distributions"].items()}
    started, ended = (datetime.fromisoformat(values[name]) for name in ("started", "ended"))
    return FrozenTrial(
        number=values["number"],
        trial_id=-1,
        state=state,
        value=None,
        values=values["values"],
        datetime_start=started,
        datetime_complete=ended,
        params=values["params"],
        distributions=distributions,
        user_attrs=values["user_attrs"],
        system_attrs=values["system_attrs"],
        intermediate_values={},
    )


def _waiting(params: dict[str, Any] | None) -> FrozenTrial | None:
    if not params:
        return None
    none: dict[str, Any] = {"params": {}, "distributions": {}, "user_attrs": {}, "intermediate_values": {}}
    asked = {"system_attrs": {"fixed_params": params}, "datetime_start": None, "datetime_complete": None}
    return FrozenTrial(number=-1, trial_id=-1, state=TrialState.WAITING, value=None, **none, **asked)
