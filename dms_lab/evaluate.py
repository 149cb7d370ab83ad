"""Repeat the evaluation of a finished run: ``python -m dms_lab.evaluate checkpoint=runs/tiny-cr8-w16-...``."""

import dataclasses
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from dms_lab.train import CONFIG_PATH, command_line


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Evaluates every checkpoint of the run's family and its rivals; appends to the run's `results.jsonl`."""
    from dms_lab.evaluation.report import evaluate_run, load_config, run_of
    from dms_lab.terminal import quiet

    quiet()
    try:
        place = Path(cfg.checkpoint)
        folder = run_of(place)
        config = load_config(folder)
        if cfg.num_problems is not None:
            config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, num_problems=cfg.num_problems))
        evaluate_run(config, folder, checkpoint=place)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    command_line(main, ("checkpoint", "num_problems"))
