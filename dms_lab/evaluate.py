"""Evaluate: ``python -m dms_lab.evaluate checkpoint=runs/<run>`` repeats a run's own evaluation, and

eval=reasoning                  AIME24, GPQA-Diamond, LiveCodeBench through lm-eval; the same command goes on when stopped
tasks=list                      what tasks there are
"""

import dataclasses
import os
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from dms_lab.train import CONFIG_PATH, command_line


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Lists the tasks, runs benchmarks, or evaluates a run's family and its rivals; appends to `results.jsonl`."""
    from dms_lab.evaluation.sandbox import SandboxError
    from dms_lab.multirun import is_multirun, run_point

    if is_multirun():
        run_point(cfg, run if cfg.get("eval") is None else None)
        return
    try:
        run(cfg)
    except (ValueError, SandboxError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nstopped; the chains that ended are kept, and the same command goes on", file=sys.stderr)
        sys.exit(130)


def run(cfg: DictConfig) -> None:
    """Does what the configuration asks; raises `ValueError` or `SandboxError` for what is wrong."""
    from dms_lab.terminal import quiet

    if cfg.tasks == "list":
        from dms_lab.evaluation.listing import print_tasks

        print_tasks()
        return
    if cfg.get("eval") is None:
        quiet()
        evaluate_again(cfg)
        return
    os.environ["TQDM_DISABLE"] = "1"  # read on import; lm-eval draws a bar for everything, `progress` one that says more
    quiet()
    from dms_lab.evaluation_config import resolve_evaluate

    config = resolve_evaluate(OmegaConf.to_container(cfg, resolve=True))
    from dms_lab.evaluation.reasoning import evaluate_benchmarks
    from dms_lab.threads import set_threads

    set_threads(config.threads)

    evaluate_benchmarks(config)


def evaluate_again(cfg: DictConfig) -> None:
    """The evaluation that a run ends with, once more."""
    from dms_lab.evaluation.report import evaluate_run, load_config, run_of
    from dms_lab.evaluation_config import ratios, tracking_of
    from dms_lab.threads import set_threads

    if cfg.checkpoint is None:
        raise ValueError("give checkpoint=<a run's folder, or one checkpoint in it>, or eval=reasoning for benchmarks")
    unused = {"sandbox": "bubblewrap", "i_trust_the_code": False, "regrade": False}
    unused |= dict.fromkeys(("tasks", "policy", "budget", "limit", "shard", "out", "store", "model"))
    for key, default in unused.items():
        if cfg.get(key) != default:
            raise ValueError(f"{key}={cfg.get(key)} is for benchmarks; add eval=reasoning")
    if cfg.num_problems is not None and (type(cfg.num_problems) is not int or cfg.num_problems < 1):
        raise ValueError(f"num_problems={cfg.num_problems} must be a whole number, at least 1")
    set_threads(cfg.threads)
    place = Path(cfg.checkpoint)
    folder = run_of(place)
    config = dataclasses.replace(load_config(folder), tracking=tracking_of(cfg.tracking))
    if cfg.num_problems is not None:
        config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, num_problems=cfg.num_problems))
    if cfg.cr is not None:
        from dms_lab.evaluation.dialled import evaluate_dialled

        evaluate_dialled(config, folder, place, ratios(OmegaConf.to_container(cfg)["cr"]), cfg.calibrate)
        return
    if cfg.calibrate is not None:
        raise ValueError(f"calibrate={cfg.calibrate} is the text that cr= is reached on; add cr=<ratio>")
    evaluate_run(config, folder, checkpoint=place)


if __name__ == "__main__":
    from dms_lab.evaluation_config import evaluate_keys, with_lists

    sys.argv = with_lists(sys.argv)
    command_line(main, evaluate_keys())
