"""Presses of kvpress at the live tokens that DMS was measured at: python experiments/rivals/presses.py

    results.csv -> what each seed's DMS kept, and on which problems -> experiments/peers/kvpress/run.py, once a seed, ratio
      and press (`make kvpress` builds its environment) -> presses.csv, rows as in results.csv

What was measured is kept in runs/peers/rivals.jsonl and not run again; remove that file to measure anew.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from dms_lab import results

FOLDER = Path(__file__).parent
PEER = FOLDER.parent / "peers" / "kvpress"
PYTHON = PEER / ".venv" / "bin" / "python"
LINES = Path("runs/peers/rivals.jsonl")
# Cut the prompt to the budget, then cut again every 4 tokens. SnapKV and expected attention cannot (they look at more
# queries than that): their prompt is cut once, and the chain comes on top.
DECODING = ("--decoding", "--prefill", "--interval", "4")
PRESSES = {
    "KeyDiffPress": DECODING,
    "TOVAPress": DECODING,
    "SnapKVPress": ("--set", "window_size=16"),
    "ExpectedAttentionPress": (),
}


def budgets(frame: pd.DataFrame) -> Iterator[tuple[int, float, int, int, int]]:
    """Seed, target CR, live tokens, problems a family and their length, wherever rivals of DMS were measured."""
    rivals = frame[frame["settings"].map(lambda settings: "live_tokens" in settings)]
    found = {
        (row["seed"], row["target_cr"], row["settings"]["live_tokens"], row["num_problems"], row["settings"]["length"])
        for row in rivals[rivals["accuracy"].notna()].to_dict("records")
    }
    if not found:
        raise SystemExit(f"error: {FOLDER / 'results.csv'} has no rivals at live tokens; run and collect the sweep first")
    yield from sorted(found)


def run(words: list[str]) -> None:
    """One command, whose failure ends this one; what it says goes to the terminal."""
    subprocess.run([str(word) for word in words], check=True)


def main() -> None:
    """Measures what is missing and writes `presses.csv`."""
    if not PYTHON.is_file():
        raise SystemExit("error: the environment of kvpress is not built; run `make kvpress`")
    LINES.parent.mkdir(parents=True, exist_ok=True)
    for seed, cr, live, count, length in budgets(results.load(FOLDER / "results.csv")):
        prompts = LINES.parent / f"rivals-{seed}-{count}-{length}.jsonl"
        made = ["--count", count, "--length", length, "--seed", seed, "--out", prompts]
        run([sys.executable, PEER / "prompts.py", *made])
        for press, words in PRESSES.items():
            if lines_of(press, seed, cr, live, count, length):
                continue
            common = ["--model", "dms_lab/tiny/model", "--name", "tiny", "--prompts", prompts, "--out", LINES, *words]
            run([PYTHON, PEER / "run.py", *common, "--press", press, "--cr", cr, "--budget", live, "--seed", seed])
    asked = budgets(results.load(FOLDER / "results.csv"))
    found = [row for case in asked for press in PRESSES for row in lines_of(press, *case)]
    results.save_csv(pd.DataFrame(found), FOLDER / "presses.csv")


def lines_of(press: str, seed: int, cr: float, live: int, count: int, length: int) -> list[dict]:
    """The rows of a press at a budget, on so many problems of a length; [] before they are measured."""
    if not LINES.is_file():
        return []
    asked = {"live_tokens": live, "length": length}
    return [
        row
        for row in results.load(LINES).to_dict("records")
        if press in row["method"]
        and (row["seed"], row["target_cr"], row["num_problems"], row["settings"]) == (seed, cr, count, asked)
    ]


if __name__ == "__main__":
    main()
