"""Retrofit a model and evaluate it: ``python -m dms_lab.train model=qwen3_8b cr=8 window=256``.

compose (Hydra) -> resolve and validate -> find the weights -> train -> evaluate -> table, results.jsonl, figures
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

CONFIG_PATH = "../conf" if (Path(__file__).parent.parent / "conf" / "train.yaml").is_file() else "conf"


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="train")
def main(cfg: DictConfig) -> tuple[float, ...] | None:
    """Trains, or goes on with, the run that the configuration describes; ends with the evaluation.

    As a trial of a search it returns what that minimises.
    """
    from dms_lab.multirun import is_multirun, run_point

    if is_multirun():
        return run_point(cfg)
    try:
        run(cfg)
    except ValueError as error:
        sys.exit(f"error: {error}")
    return None


def run(cfg: DictConfig) -> None:
    """Completes one run; `ValueError` for what is wrong, and an exit if a signal stops it. A done run takes a second."""
    from dms_lab.config import resolve, run_folder
    from dms_lab.sweeping.job import locked
    from dms_lab.sweeping.steps import OwnEvaluation, Training
    from dms_lab.training.distributed import is_first_rank

    config = resolve(OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))
    steps = [Training(config), *([OwnEvaluation(config)] if config.eval_after else [])]
    if config.resume and all(step.is_done() for step in steps):
        folder = run_folder(config)
        print(f"{folder} is done; python -m dms_lab.evaluate checkpoint={folder} evaluates it once more")
        return
    from dms_lab import models
    from dms_lab.terminal import quiet

    quiet(trains=True)
    models.resolve_path(config.model.path)
    with locked(Path(run_folder(config)), patience_seconds=2) if is_first_rank() else nullcontext():
        from dms_lab.training.run import train

        outcome = train(config)
        if not outcome.finished:
            print(f"stopped by {outcome.stopped_by}; the same command goes on from {outcome.folder}")
            sys.exit(130)
        if not is_first_rank():
            return
        print(f"checkpoints: {outcome.folder / 'checkpoints'}")
        for step in steps[1:]:
            step.run()


def command_line(entry: Callable[[], None], keys: Sequence[str] | None = None) -> None:
    """Runs a Hydra main after a look at its keys: an unknown one ends with a sentence that lists the valid ones.

    `keys` are the command's own; None: those of training.
    """
    from dms_lab.config import valid_keys
    from dms_lab.multirun import Multirun, check_words
    from dms_lab.typed_config import check_overrides

    try:
        check_overrides(sys.argv[1:], valid_keys() if keys is None else keys)
        check_words(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
    try:
        entry()
    finally:
        Multirun.finish_unfinished()


if __name__ == "__main__":
    command_line(main)
