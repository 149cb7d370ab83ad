"""Steps and settings of the retrofit at CR 8: python experiments/data_efficiency/figure.py

results.csv -> exact match and perplexity against steps; the same by setting, at 20 steps a unit of CR -> figure.png, .svg
"""

from pathlib import Path

import pandas as pd

from dms_lab import results
from dms_lab.comparison.points import curve_points
from dms_lab.plots import axes, save_figure

FOLDER = Path(__file__).parent
CR, STEPS, RECIPE = 8.0, 140, 440
ACCURACY, TEXT = "#0072B2", "#D55E00"
_SAME = ("cr_family=[8]", f"steps={STEPS}", "steps=200", "neuron_zeroing_steps=60")  # of all settings, or implied


def points() -> pd.DataFrame:
    """One row a variant at the CR trained for, and full attention."""
    found = curve_points(results.load(FOLDER / "results.csv"))
    return found[(found["method"] == "full") | (found["target_cr"] == CR)]


def steps_of(variant: str) -> int | None:
    """The steps of a variant that differs from the recipe in them alone; None for one that differs in more."""
    words = [word for word in variant.split() if word != "cr_family=[8]"]
    if not words:
        return RECIPE
    return int(words[0].removeprefix("steps=")) if len(words) == 1 and words[0].startswith("steps=") else None


def setting_of(variant: str) -> str | None:
    """What a variant of `STEPS` steps differs in from the recipe; None for one of other steps."""
    words = [word for word in variant.split() if word not in _SAME]
    if steps_of(variant) == STEPS:
        return "as the recipe"
    has_other_steps = steps_of(variant) is not None or any(word.startswith("steps=") for word in words)
    return None if has_other_steps else ", ".join(words)


def figure(found: pd.DataFrame):
    """Accuracy with its interval, and perplexity with what the text was compressed to, by steps and by setting."""
    dms = found[found["method"] != "full"].fillna({"variant": ""})
    full = found[found["method"] == "full"].iloc[0]
    by_steps = dms.assign(steps=dms["variant"].map(steps_of)).dropna(subset="steps").sort_values("steps")
    by_setting = dms.assign(setting=dms["variant"].map(setting_of)).dropna(subset="setting").sort_values("accuracy")
    with axes.paper():
        drawn, (left, middle, right) = axes.panels(3, height=2.9)
        _accuracy(left, by_steps["steps"], by_steps, "x")
        left.axhline(100 * full["accuracy"], color="0.4", linewidth=0.8)
        axes.log2_axis(left, by_steps["steps"].tolist())
        left.set_xlabel("steps")
        left.set_ylabel("exact match (%)")
        places = list(range(len(by_setting)))
        _accuracy(middle, places, by_setting, "y")
        middle.axvline(100 * full["accuracy"], color="0.4", linewidth=0.8)
        middle.set_yticks(places, by_setting["setting"])
        middle.set_xlabel(f"exact match (%), {STEPS} steps")
        right.plot(by_setting["perplexity"], places, "s", color=TEXT, markersize=4)
        for place, row in zip(places, by_setting.to_dict("records"), strict=True):
            right.annotate(f"{row['text_cr']:.1f}x", (row["perplexity"], place), xytext=(5, -2), textcoords="offset points")
        right.axvline(full["perplexity"], color="0.4", linewidth=0.8)
        right.set_yticks(places, [""] * len(places))
        right.margins(x=0.25)
        right.set_xlabel("perplexity of held-out source")
    return drawn


def _accuracy(panel, places, rows: pd.DataFrame, along: str) -> None:
    """Means with their intervals, in percent, `along` an axis of places."""
    mean = 100 * rows["accuracy"]
    sides = [mean - 100 * rows["accuracy_low"], 100 * rows["accuracy_high"] - mean]
    style = {"color": ACCURACY, "markersize": 4, "elinewidth": 1.0, "capsize": 2}
    if along == "x":
        panel.errorbar(places, mean, yerr=sides, fmt="o-", linewidth=1.0, **style)
    else:
        panel.errorbar(mean, places, xerr=sides, fmt="o", **style)


def main() -> None:
    """Writes the figure."""
    for path in save_figure(figure(points()), FOLDER / "accuracy"):
        print(path)


if __name__ == "__main__":
    main()
