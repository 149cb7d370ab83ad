"""Retrofit a model and evaluate it: ``python -m dms_lab.train model=qwen3_8b cr=8 window=256``.

compose (Hydra) -> resolve and validate -> find the weights -> train -> evaluate -> table, results.jsonl, figures
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

CONFIG_PATH = "../conf" if (Path(__file__).parent.parent / "conf" / "train.yaml").is_file() else "conf"


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="train")
def main(cfg: DictConfig) -> None:
    """Trains, or goes on with, the run that the configuration describes; ends with the evaluation."""
    from dms_lab.config import resolve

    try:
        config = resolve(OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))
        from dms_lab import models
        from dms_lab.terminal import quiet

        quiet()
        models.resolve_path(config.model.path)
        from dms_lab.training.run import train

        outcome = train(config)
        if not outcome.finished:
            print(f"stopped by {outcome.stopped_by}; the same command goes on from {outcome.folder}")
            sys.exit(130)
        print(f"checkpoints: {outcome.folder / 'checkpoints'}")
        if config.eval_after:
            from dms_lab.evaluation.report import evaluate_run

            evaluate_run(config, outcome.folder)
    except ValueError as error:
        sys.exit(f"error: {error}")


def command_line(entry: Callable[[], None], keys: Sequence[str] | None = None) -> None:
    """Runs a Hydra main after a look at its keys: an unknown one ends with a sentence that lists the valid ones.

    `keys` are the command's own; None: those of training.
    """
    from dms_lab.config import check_overrides, valid_keys

    try:
        check_overrides(sys.argv[1:], valid_keys() if keys is None else keys)
    except ValueError as error:
        sys.exit(f"error: {error}")
    entry()


if __name__ == "__main__":
    command_line(main)
