"""Presses of kvpress at the live tokens that DMS was measured at: python experiments/rivals/presses.py

    results.csv -> what each seed's DMS kept, and on which problems -> experiments/peers/kvpress/run.py, once a seed, ratio
      and press (`make kvpress` builds its environment) -> presses.csv, rows as in results.csv

Done ones are not run again: the lines are kept in runs/peers/rivals.jsonl until presses.csv is written. Remove that file to
measure anew.
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
# Cut the prompt to the budget, then cut again every 4 tokens; KVCompose knows no decoding, so its chains come on top.
DECODING = ("--decoding", "--prefill", "--interval", "4")
PRESSES = {"KeyDiffPress": DECODING, "TOVAPress": DECODING, "SnapKVPress": DECODING, "KVComposePress": ()}


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
            if is_measured(press, seed, live):
                continue
            common = ["--model", "dms_lab/tiny/model", "--name", "tiny", "--prompts", prompts, "--out", LINES]
            run([PYTHON, PEER / "run.py", *common, "--press", press, "--cr", cr, "--budget", live, "--seed", seed, *words])
    results.save_csv(results.load(LINES), FOLDER / "presses.csv")


def is_measured(press: str, seed: int, live: int) -> bool:
    """Whether the lines hold this press at this budget."""
    if not LINES.is_file():
        return False
    rows = results.load(LINES).to_dict("records")
    return any(press in r["method"] and r["seed"] == seed and r["settings"].get("live_tokens") == live for r in rows)


if __name__ == "__main__":
    main()
