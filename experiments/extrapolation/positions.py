"""Loss and compression along documents of 4,096 tokens: python experiments/extrapolation/positions.py

    done runs of sweep.yaml -> held-out source code, one forward a document through the masked cache
      -> loss and tokens / live slots by position -> positions.csv, positions.png and .svg

The tasks of the embedded model end at 1,536 tokens, where full attention fails too; text goes on. A model's loss on a token
far into a document is held against that of full attention on the same token.
"""

import argparse
import functools
import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from dms_lab import calibration, models, terminal
from dms_lab.attachment import Retrofit, retrofit
from dms_lab.cache.masked import MaskedCache
from dms_lab.checkpoint import load_checkpoint
from dms_lab.inspection import Decisions
from dms_lab.plots import axes, save_figure
from dms_lab.policies import FullPolicy
from dms_lab.sweep_config import load_sweep
from dms_lab.sweeping.points import Point, expand
from dms_lab.tiny import corpus
from dms_lab.training.documents import text_documents

FOLDER = Path(__file__).parent
LENGTH = 4096
EDGES = [0, 256, 512, 768, 1024, 1536, 2048, 3072, LENGTH]
FULL = "full attention"
COLOURS, LINES = ("#0072B2", "#56B4E9", "#009E73", "#D55E00"), ("-", "--", "-.", ":")


def code(held_out: bool, length: int, count: int, tokenizer) -> list[list[int]]:
    """`count` documents of exactly `length` tokens of the standard library's source, the first that are long enough."""
    found = text_documents(corpus.standard_library_files(held_out), tokenizer, length)
    rows = [list(document.ids) for document in found if len(document.ids) == length][:count]
    if len(rows) < count:
        raise ValueError(f"only {len(rows)} pieces of source have {length} tokens; ask for {len(rows)} or for shorter ones")
    return rows


@torch.inference_mode()
def along(handle: Retrofit, ids: list[int], is_full: bool) -> tuple[np.ndarray, np.ndarray]:
    """The loss of each token but the first in nats [T - 1], and tokens / live slots after each token [T]."""
    policy = FullPolicy() if is_full else handle.policy()
    cache, row = MaskedCache(policy), torch.tensor([ids])
    hidden = handle.model.get_decoder()(input_ids=row, past_key_values=cache, use_cache=True).last_hidden_state[0]
    loss = F.cross_entropy(handle.model.get_output_embeddings()(hidden[:-1]).float(), row[0, 1:], reduction="none").numpy()
    if is_full:
        return loss, np.ones(len(ids))
    evict = torch.cat([policy.evict(layer.state, layer.keys) for layer in cache.layers])
    return loss, Decisions(evict.numpy(), policy.window, [""] * len(ids)).measured_cr


@contextmanager
def attached(point: Point, cr: float | None = None, calibrated_on: Iterable[list[int]] = ()) -> Iterator[Retrofit]:
    """The checkpoint of a run at its highest ratio, dialled to `cr` on these documents if they are given."""
    folder = max((Path(point.folder) / "checkpoints").glob("cr*"), key=lambda path: float(path.name.removeprefix("cr")))
    handle = load_checkpoint(folder, models.load_base(point.config.model, "cpu"))
    if cr is not None:
        calibration.dial(handle, list(calibrated_on), cr)
    yield handle
    handle.detach()


def measured(handle: Retrofit, documents: list[list[int]], **about) -> Iterator[dict]:
    """A row for each stretch of positions: mean loss, and the ratio at its end, means over documents."""
    losses, ratios = zip(*(along(handle, ids, about["variant"] == FULL) for ids in documents), strict=True)
    loss, ratio = np.mean(losses, 0), np.mean(ratios, 0)
    for start, stop in itertools.pairwise(EDGES):
        row = {"first": start, "last": stop - 1, "loss": float(loss[max(0, start - 1) : stop - 1].mean())}
        yield about | row | {"measured_cr": float(ratio[stop - 1]), "num_documents": len(documents)}


def rows(points: list[Point], count: int) -> Iterator[dict]:
    """Every variant of every seed on the same documents."""
    config = points[0].config
    tokenizer = models.load_tokenizer(config.model)
    documents = code(True, LENGTH, count, tokenizer)
    calibrations = {length: code(False, length, 16384 // length, tokenizer) for length in (512, LENGTH)}
    yield from measured(retrofit(models.load_base(config.model, "cpu"), None), documents, variant=FULL, seed=0)
    for point in points:
        run = functools.partial(measured, documents=documents, seed=point.config.seed)
        name = f"retrofitted at {point.config.context:,} tokens"
        with attached(point) as handle:
            yield from run(handle, variant=name)
        for length, pieces in calibrations.items() if point.config.context == 512 else ():
            with attached(point, 3.0, pieces) as handle:
                yield from run(handle, variant=f"{name}, dialled to 3 on {length:,}")


def figure(frame: pd.DataFrame):
    """What a variant loses against full attention, and its ratio, along the document; thin lines are seeds."""
    full = frame[frame["variant"] == FULL].set_index("first")["loss"]
    others = [name for name in frame["variant"].unique() if name != FULL]
    with axes.paper():
        drawn, (left, right) = axes.panels(2, curves=len(others))
        handles = {}
        for colour, line, name in zip(COLOURS, LINES, others, strict=True):
            part = frame[frame["variant"] == name]
            loss, ratio = (part.pivot_table(index="first", columns="seed", values=v) for v in ("loss", "measured_cr"))
            draw(left, [(a + b) / 2 for a, b in itertools.pairwise(EDGES)], loss.sub(full, axis=0), colour, line)
            handles[name] = draw(right, EDGES[1:], ratio, colour, line)
        for panel, title in ((left, "loss over that of full attention, nats"), (right, "tokens / live slots")):
            axes.log2_axis(panel, EDGES[1:])
            panel.set_xlabel("position")
            panel.set_ylabel(title)
        axes.legend_below(drawn, handles)
    return drawn


def draw(panel, places: list[float], values: pd.DataFrame, colour: str, line: str):
    """The seeds as thin lines and their mean as a thick one, which is returned."""
    panel.plot(places, values, color=colour, linestyle=line, linewidth=0.5, alpha=0.6)
    return panel.plot(places, values.mean(axis=1), color=colour, linestyle=line, linewidth=1.6)[0]


def main() -> None:
    """Writes `positions.csv` and the figure, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--draw", action="store_true", help="the figure alone, from positions.csv")
    args = parser.parse_args()
    terminal.quiet()
    path = FOLDER / "positions.csv"
    if not args.draw:
        points = [point for point in expand(load_sweep(FOLDER)) if point.command == "train"]
        missing = [point.folder for point in points if not (Path(point.folder) / "done.json").is_file()]
        if missing:
            raise SystemExit(
                f"error: not trained yet: {', '.join(missing)}; python -m dms_lab.sweep submit experiments/{FOLDER.name}"
            )
        pd.DataFrame(list(rows(points, args.documents))).to_csv(path, index=False, float_format="%.4f")
    frame = pd.read_csv(path)
    save_figure(figure(frame), FOLDER / "positions")
    for column in ("loss", "measured_cr"):
        print(column)
        print(frame.pivot_table(index="variant", columns="last", values=column, sort=False).round(2).to_string())


if __name__ == "__main__":
    main()
