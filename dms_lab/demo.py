"""The demo: retrofit the embedded model, train its controls with the same budget, compare them all.

    dms (window 16)  dms_immediate (window 1)  streaming_llm_tuned (a fixed window)   each: same loss, steps, weights
    -> one evaluation with full attention and the untrained rivals at the measured budgets -> table and figures

A second call finds the finished runs and only repeats what is missing.
"""

import dataclasses
import json
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from dms_lab.train import CONFIG_PATH, command_line

CONTROLS = {
    "streaming_llm_tuned": {"method": "streaming_llm"},
    "dms_immediate": {"window": 1},
}


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="demo")
def main(cfg: DictConfig) -> None:
    """Runs the demo in `out`."""
    from dms_lab.config import resolve

    values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    controls = values.pop("controls")
    try:
        unknown = sorted(set(controls) - set(CONTROLS))
        if unknown:
            raise ValueError(f"controls: {unknown[0]!r} is not known; choose from {', '.join(CONTROLS)}")
        run(resolve(values), {name: CONTROLS[name] for name in controls})
    except ValueError as error:
        sys.exit(f"error: {error}")


def run(config, controls: dict[str, dict]) -> None:
    """Trains `config` and its controls in folders below `config.out`, then evaluates, unless that was done before."""
    from dms_lab import plots, results
    from dms_lab.config import config_hash, validate
    from dms_lab.evaluation.report import evaluate_run
    from dms_lab.terminal import console, quiet
    from dms_lab.training.side_by_side import train_all

    quiet()
    root = Path(config.out) / config_hash(config)
    variants = {
        name: dataclasses.replace(config, out=str(root / name), **changes)
        for name, changes in ({"dms": {}} | controls).items()
    }
    for variant in variants.values():
        validate(variant)
    outcomes = train_all(variants, workers=len(variants))  # on two cores three at once end sooner than two and one
    for outcome in outcomes.values():
        if not outcome.finished:
            print(f"stopped by {outcome.stopped_by}; the same command goes on from {root}")
            sys.exit(130)
    # A fixed window is trained for one budget, that of the full CR; it is no member of a family.
    others = {
        (name, cr): outcome.checkpoint(cr)
        for name, outcome in outcomes.items()
        if name != "dms"
        for cr in ((config.cr,) if name == "streaming_llm_tuned" else config.cr_family)
    }
    folder = root / "dms"
    record, what = folder / "evaluated.json", json.dumps([sorted(controls), dataclasses.asdict(config.eval)])
    if config.resume and record.is_file() and record.read_text() == what:
        frame = results.load(folder / results.RESULTS)
        console().print(plots.summary_table(frame))
        print(f"figures: {folder / 'pareto.png'} and pareto.html (evaluated before; remove {root} to start afresh)")
        return
    (folder / results.RESULTS).unlink(missing_ok=True)
    evaluate_run(config, folder, others)
    record.write_text(what)


if __name__ == "__main__":
    from dms_lab.config import valid_keys

    command_line(main, (*valid_keys(), "controls"))
