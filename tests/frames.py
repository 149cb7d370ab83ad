"""Small frames as `dms_lab.comparison` and `dms_lab.published` return them, made up."""

import pandas as pd

METHODS = [  # method, variant, CR, accuracy at width 1
    ("full", "", 1.0, 0.60),
    ("dms", "decided_by=next window=16", 4.0, 0.58),
    ("dms", "decided_by=next window=16", 8.0, 0.52),
    ("dms", "decided_by=next window=4", 4.0, 0.55),
    ("dms", "decided_by=next window=4", 8.0, 0.46),
    ("dms_immediate", "window=1", 4.0, 0.44),
    ("dms_immediate", "window=1", 8.0, 0.30),
    ("streaming_llm_tuned", "method=streaming_llm", 8.0, 0.12),
    ("tova", "", 4.0, 0.24),
    ("tova", "", 8.0, 0.10),
    ("h2o", "", 4.0, 0.20),
    ("h2o", "", 8.0, 0.16),
    ("quest", "", 8.0, 0.40),
    ("kvpress/KeyDiffPress", "", 4.0, 0.50),
    ("kvpress/PrefillDecodingPress(KeyDiffPress)", "", 4.0, 0.53),
    ("my_method", "", 4.0, 0.35),
]


def points(model="qwen_r1_1_5b", methods=METHODS, widths=(1, 2, 4, 8)):
    """A frame like that of `comparison.curve_points`: costs grow with the width, accuracy with its logarithm."""
    rows = []
    for method, variant, cr, accuracy in methods:
        for power, width in enumerate(widths):
            height = min(0.98, accuracy + 0.07 * power)
            rows.append(
                {
                    "model": model,
                    "method": method,
                    "variant": variant,
                    "tasks": "dms_aime24",
                    "target_cr": cr,
                    "width": width,
                    "max_tokens": 32768,
                    "accuracy": height,
                    "accuracy_low": height - 0.04,
                    "accuracy_high": min(1.0, height + 0.04),
                    "interval_over": "seeds and problems",
                    "perplexity": None,
                    "text_cr": None,
                    "measured_cr": 0.98 * cr,
                    "kv_reads": 12000.0 * width / cr,
                    "peak_tokens": 500.0 * width / cr,
                    "kv_bytes_peak": 1.1e6 * width / cr,
                    "num_seeds": 3,
                    "num_problems": 64,
                    "is_frontier_kv_reads": False,
                    "is_frontier_peak_tokens": False,
                }
            )
    return pd.DataFrame(rows)


def margins(model="qwen_r1_1_5b", methods=METHODS):
    """A frame like that of `comparison.margins` over full attention; `h2o` shares no budget with it."""
    curves = dict.fromkeys((method, variant) for method, variant, _, _ in methods if method != "full")
    rows = []
    for place, (method, variant) in enumerate(curves):
        for budget in ("kv_reads", "peak_tokens", "kv_bytes_peak"):
            value = float("nan") if method == "h2o" else 0.15 - 0.03 * place
            rows.append(
                {
                    "model": model,
                    "method": method,
                    "variant": variant,
                    "tasks": "dms_aime24",
                    "budget": budget,
                    "margin": value,
                    "low": value - 0.05,
                    "high": value + 0.05,
                    "held_share": float("nan") if method == "h2o" else 0.25,
                    "margin_unheld": value / 2,
                    "area": 2.0 * value,
                    "budget_low": 1000.0,
                    "budget_high": 4000.0,
                    "against": "full",
                }
            )
    return pd.DataFrame(rows)


def published(model="qwen_r1_1_5b"):
    """A frame like that of `published.scores`."""
    rows = [("full", 1.0, 0.63), ("dms", 4.0, 0.61), ("dms", 8.0, 0.57), ("tova", 4.0, 0.45)]
    return pd.DataFrame(
        [
            {
                "task": "dms_aime24",
                "model": model,
                "method": method,
                "compression_ratio": cr,
                "window": None,
                "width": 1,
                "max_tokens": 32768,
                "accuracy": accuracy,
                "source": "a paper, Table 1",
            }
            for method, cr, accuracy in rows
        ]
    )
