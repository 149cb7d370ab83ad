"""Exact match by length of the problems: python experiments/extrapolation/lengths.py

results.csv, the tasks of each length -> means over families and seeds with intervals -> a table, lengths.png and .svg
"""

from pathlib import Path

import pandas as pd

from dms_lab import results
from dms_lab.comparison.points import curve_points
from dms_lab.plots import axes, save_figure

FOLDER = Path(__file__).parent
LENGTHS = (512, 1024, 1536)
LOOKS = {
    "full attention": ("black", "-", "s"),
    "retrofitted at 512": ("#0072B2", "-", "o"),
    "retrofitted at 512, dialled to 4": ("#56B4E9", "--", "^"),
    "retrofitted at 1,024": ("#D55E00", "-.", "D"),
}


def name_of(row: dict) -> str:
    """What a row is called in the table."""
    if row["method"] == "full":
        return "full attention"
    if row["method"] == "dms_dialled":
        return f"retrofitted at 512, dialled to {row['target_cr']:g}"
    return f"retrofitted at {'1,024' if 'context=1024' in row['variant'] else '512'}"


def by_length() -> pd.DataFrame:
    """Points of each length, with their names."""
    frame = results.load(FOLDER / "results.csv")
    parts = []
    for length in LENGTHS:
        mine = frame[frame["task"].str.fullmatch(rf"dms_tiny_[a-z]+_{length}")]
        parts.append(curve_points(mine).fillna({"variant": ""}).assign(length=length))
    found = pd.concat(parts)
    return found.assign(name=[name_of(row) for row in found.to_dict("records")])


def figure(found: pd.DataFrame):
    """Exact match, and live tokens at the peak, against length; the highest ratio of each retrofit."""
    shown = found[(found["method"] != "dms") | (found["target_cr"] == 8)]
    with axes.paper():
        drawn, (left, right) = axes.panels(2, curves=len(LOOKS))
        handles = {}
        for name, (colour, line, marker) in LOOKS.items():
            rows = shown[shown["name"] == name].sort_values("length")
            mean = 100 * rows["accuracy"]
            sides = [mean - 100 * rows["accuracy_low"], 100 * rows["accuracy_high"] - mean]
            style = {"color": colour, "linestyle": line, "marker": marker, "markersize": 4, "linewidth": 1.2}
            handles[name] = left.errorbar(rows["length"], mean, yerr=sides, elinewidth=0.8, capsize=2, **style)
            right.plot(rows["length"], rows["peak_tokens"], **style)
        for panel, title in ((left, "exact match (%)"), (right, "peak live tokens")):
            axes.log2_axis(panel, sorted(shown["length"].unique()))
            panel.set_xlabel("tokens of a problem with its answer")
            panel.set_ylabel(title)
        right.set_yscale("log", base=2)
        right.set_yticks([64, 128, 256, 512, 1024], ["64", "128", "256", "512", "1024"])
        axes.legend_below(drawn, handles)
    return drawn


def main() -> None:
    """Prints the table as Markdown and writes the figure."""
    found = by_length()
    print("| model | CR | length | measured | exact match | KV reads | peak |\n|---|---|---|---|---|---|---|")
    for row in found.sort_values(["name", "target_cr", "length"]).to_dict("records"):
        interval = f"{100 * row['accuracy']:.1f} ({100 * row['accuracy_low']:.1f}-{100 * row['accuracy_high']:.1f})"
        cells = (f"{row['measured_cr']:.2f}", interval, f"{row['kv_reads']:,.0f}", f"{row['peak_tokens']:,.0f}")
        print("|", " | ".join((row["name"], f"{row['target_cr']:g}", f"{row['length']:,}", *cells)), "|")
    for path in save_figure(figure(found), FOLDER / "lengths"):
        print(path)


if __name__ == "__main__":
    main()
