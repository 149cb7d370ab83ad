# %% [markdown]
# # Accuracy against memory
#
# A smaller cache is no end in itself. Two questions decide whether it is worth having: what does it *cost* when a
# chain of thought stays as long as it was, and what does it *buy* when the memory saved is spent on more chains?
#
# The numbers are those of the embedded model and its three generated tasks, three training seeds, as committed in
# `experiments/`. Name another folder of results, or a sweep, in the next cell but one, and everything below is about
# that.

# %%
# %matplotlib inline
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML, Markdown, display

from dms_lab import comparison, economics, plots, published, results

plt.rcParams |= {"figure.dpi": 140, "font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
plt.rcParams |= {"legend.frameon": False, "axes.titlesize": 8}

# %%
one_chain = Path("../experiments/tiny_demo")  # one chain a problem, DMS beside its rivals
many_chains = Path("../experiments/hyper_scaling")  # one to eight chains a problem, which vote

# %% [markdown]
# ## 1. What compression costs: one chain, the same length
#
# Every rule below answers the same problems with one chain. **Full attention** keeps everything. **DMS** has learned
# what to keep. The others are rules without training (`StreamingLLM`: the newest tokens; `TOVA`, `H2O`: what had the
# most attention; `KeyDiff`: keys unlike the rest; `Quest`: keeps everything and reads a part), and the fair control, a
# fixed window trained exactly as DMS was. Rules with a budget get as many tokens as DMS was measured to hold.

# %%
frame = results.load(one_chain)
points = comparison.curve_points(frame)
display(plots.accuracy_figure(points, "peak_tokens", "exact match (%)"))

# %% [markdown]
# **Look at** the left edge: with the least memory, only what has learned to evict still answers. Lines join the
# points of one method, the grey band the best of all; bars are 95 % intervals.
#
# **Do not conclude** that these rules are useless. The tasks are hard on them by design: a fact is needed once, long
# after it was read, and nothing tells early which one. On held-out source code, where nearby words suffice, the order
# turns round. The table has the ratio that the *text* was really compressed to (`text_cr`) beside its perplexity: DMS
# keeps more of a text than it was asked to, and still at a ratio of 4 two untrained rules predict it better.

# %%
shares = ["accuracy", "accuracy_low", "accuracy_high"]
table = points[["method", "target_cr", "measured_cr", *shares, "perplexity", "text_cr", "peak_tokens"]]
table = table.assign(method=table["method"].map(plots.display_name))
table[shares] = (100 * table[shares]).round(1)
HTML(table.sort_values(["target_cr", "accuracy"]).round(2).to_html(index=False, float_format="{:.10g}".format))

# %%
best = points[points["method"] == "dms"].sort_values("target_cr").iloc[-1]
full = points[points["method"] == "full"].iloc[0]
rest = points[~points["method"].isin(["dms", "full", "dms_immediate"]) & (points["target_cr"] == best["target_cr"])]
Markdown(
    f"At a ratio of {best['target_cr']:g} (measured {best['measured_cr']:.2f}) DMS answers {best['accuracy']:.1%} "
    f"[{best['accuracy_low']:.1%}, {best['accuracy_high']:.1%}], full attention {full['accuracy']:.1%}; the best method "
    f"that does not evict by a learned decision, {rest['accuracy'].max():.1%}. The perplexity of the text, which it "
    f"compresses {best['text_cr']:.2f} times, rises from {full['perplexity']:.2f} to "
    f"{best['perplexity']:.2f}."
)

# %% [markdown]
# ## 2. What compression buys: more chains for the same memory
#
# Several chains of thought, drawn at random, vote on the answer: more of them, more right answers, and more memory. A
# model whose cache is an eighth can afford more chains. This is *hyper-scaling*. Below, each point is a number of
# chains (1 to 8), a limit of tokens and a ratio. The first figure counts what is **read** over a whole problem
# (time), the second what is **held** at the worst moment (memory).

# %%
frame = results.load(many_chains)
points = comparison.curve_points(frame)
for budget in ("kv_reads", "peak_tokens"):
    display(plots.accuracy_figure(points, budget, "majority vote (%)"))

# %% [markdown]
# **Look at** a vertical line anywhere: who is higher there answers more for the same price. Look at a horizontal one:
# who is further left pays less for the same answers.
#
# ## 3. One number for it: the margin
#
# The **margin** is the mean height of one curve above the other, over the range of budgets that both were measured
# at, on the logarithmic axis of the figures. It is given for DMS as a whole, the best points of all its ratios, and
# for each ratio.

# %%
whole = comparison.margins(frame)
display(plots.margins_figure(whole))
each = comparison.margins(frame, by="target_cr").assign(of=lambda rows: rows["target_cr"].map("CR {:g} alone".format))
columns = ["of", "budget", "margin", "low", "high", "held_share", "margin_unheld", "budget_low", "budget_high", "doublings"]
for rows in (whole.assign(of="all ratios"), each):
    rows["doublings"] = np.log2(rows["budget_high"] / rows["budget_low"]).round(3)
    shares = ["margin", "low", "high", "held_share", "margin_unheld"]
    rows[shares] = (100 * rows[shares]).round(1)
    rows[["budget_low", "budget_high"]] = rows[["budget_low", "budget_high"]].round()
    display(HTML(rows[columns].to_html(index=False, na_rep="", float_format="{:,.10g}".format)))

# %% [markdown]
# **Look at** the range first (`budget_low` to `budget_high`, in doublings): outside it nothing is compared, and a
# margin over a small fraction of a doubling is one point's luck. Then at `held_share`, in percent: in so much of the
# range one of the two curves had no point of its own, and its best is held to the largest budget that was spent on it.
# `margin_unheld` (the tick on a bar) is the margin over the rest alone, as the paper defines it; where it is empty
# there is no rest. **Do not conclude** anything finer than the interval. Where `low` and `high` are empty, the results
# kept no score of single problems: how sure the margin is cannot be said.
#
# ## 4. Equal accuracy, equal budget
#
# The same comparison, read along the two axes, at each point where full attention is at its best for its price. An
# accuracy that `is_held` is that of DMS's last point, for fewer tokens than full attention has there.

# %%
equal = comparison.equal_accuracy(frame)
equal = equal[equal["budget"].isin(plots.TOKEN_BUDGETS)]
table = equal.assign(accuracy=(100 * equal["accuracy"]).round(1), **equal[["ratio", "low", "high"]].round(1))
table[["at", "needed"]] = table[["at", "needed"]].round()
table = table[
    ["budget", "against_width", "against_max_tokens", "accuracy", "at", "needed", "ratio", "low", "high", "status"]
]
names = {"against_width": "chains", "against_max_tokens": "limit", "at": "full attention needs", "needed": "DMS needs"}
HTML(table.rename(columns=names).to_html(index=False, na_rep="", float_format="{:,.10g}".format))

# %%
same = comparison.equal_budget(frame)
same = same[same["budget"].isin(plots.TOKEN_BUDGETS)]
shares = ["against_accuracy", "accuracy", "difference", "low", "high"]
table = same.assign(at=same["at"].round(), **(100 * same[shares]).round(1))
table = table[["budget", "against_width", "against_max_tokens", "at", *shares, "is_held"]]
names = {"against_width": "chains", "against_max_tokens": "limit", "at": "both have"}
names |= {"accuracy": "DMS", "against_accuracy": "full attention"}
display(HTML(table.rename(columns=names).to_html(index=False, na_rep="", float_format="{:,.10g}".format)))
comparable = same[same["difference"].notna()].assign(held=same["is_held"].map({True: " (held)", False: ""}))
gains = [
    f"{100 * row['difference']:+.1f} points in {row['budget']} at {row['at']:.0f}{row['held']}"
    for _, row in comparable.iterrows()
]
cheaper = equal[equal["ratio"].notna()].groupby("budget")["ratio"].agg(["min", "max"])
ratios = [f"{row['min']:.1f} to {row['max']:.1f} times less in {budget}" for budget, row in cheaper.iterrows()]
Markdown(
    f"Equal budget: {'; '.join(gains) or 'no budget that both were measured at'}. Equal accuracy, where it was reached: "
    f"{'; '.join(ratios) or 'nowhere'}."
)

# %% [markdown]
# ## 5. What a gigabyte buys
#
# From here on nothing is measured: it is arithmetic on the shapes of two published models (from their `config.json`),
# in bfloat16. How many chains of 8,192 tokens fit side by side into one GiB of cache?

# %%
geometries = {
    "Qwen3-8B": economics.KVGeometry(num_layers=36, num_kv_heads=8, head_dim=128),
    "Qwen2.5-1.5B (Qwen-R1-1.5B)": economics.KVGeometry(num_layers=28, num_kv_heads=2, head_dim=128),
}
rows = [
    f"| {name} | {geometry.bytes_per_token / 1024:.0f} KiB | "
    + " | ".join(str(economics.chains_that_fit(2**30, geometry, 8192, cr)) for cr in (1, 2, 4, 8))
    + " |"
    for name, geometry in geometries.items()
]
Markdown("| model | one token | CR 1 | CR 2 | CR 4 | CR 8 |\n|---|---|---|---|---|---|\n" + "\n".join(rows))

# %% [markdown]
# Time follows memory. A step of decoding reads the weights once, and the cache of every sequence. The figure shows
# which share of the step's least possible time goes to reading keys and values, on one H100 (a roofline: no program
# can be faster, most are slower). Where weights and cache together are more than its 80 GB, there is no such step on
# one: lines go on pale there, and end in a full circle at the last number of sequences that fits.

# %%
shape = economics.ModelShape(num_layers=36, hidden=4096, mlp=12288, kv_width=1024, vocabulary=151936)  # Qwen3-8B
batches = [2**power for power in range(9)]
figure, panels = plt.subplots(1, 2, figsize=(6.9, 2.5), layout="constrained")
for cr, style in ((1, "k-"), (4, "k--"), (8, "k:")):
    steps = [economics.decode_step(shape, economics.H100_SXM, batch, 8192, cr) for batch in batches]
    shares = [100 * step.kv_share for step in steps]
    rates = [batch / step.seconds for batch, step in zip(batches, steps, strict=True)]
    last = sum(step.fits for step in steps)
    for panel, values in zip(panels, (shares, rates), strict=True):
        panel.plot(batches, values, style, alpha=0.25)
        panel.plot(batches[:last], values[:last], style, label=f"CR {cr}", marker="o", markevery=[-1], markersize=4)
panels[0].set(ylabel="share of the time (%)", ylim=(0, 100), title="reading keys and values")
panels[1].set(ylabel="tokens a second, at most", yscale="log", title="throughput")
for panel in panels:
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:.0f}")
    panel.set_xlabel("sequences side by side, 8,192 tokens each")
    panel.legend(title="pale: more than 80 GB")
plt.show()

# %%
alone, crowd = (economics.decode_step(shape, economics.H100_SXM, batch, 8192) for batch in (1, 64))
small = economics.decode_step(shape, economics.H100_SXM, 64, 8192, 8)
fitting = "fit" if crowd.fits else "do not fit"
Markdown(
    f"One sequence alone spends {alone.kv_share:.0%} of its time on the cache: the weights rule, compression gains little. "
    f"64 side by side spend {crowd.kv_share:.0%}, and a ratio of 8 makes their step at best "
    f"{crowd.seconds / small.seconds:.1f} times as fast, in time alone: uncompressed, their cache and the weights, "
    f"{crowd.total_bytes / 1e9:.0f} GB, {fitting} into the {economics.H100_SXM.memory_bytes / 1e9:.0f} GB of one H100."
)

# %% [markdown]
# **Do not conclude** that eight times less memory is eight times the speed. The weights still have to be read, and
# programs have overheads that a roofline has not.
#
# What does the retrofit itself take? The published recipes train for each unit that the ratio rises, seven of them to
# get from 1 to 8:

# %%
costs = published.retrofit_costs()
totals = [
    economics.retrofit_cost(8, row["steps"], row["batch_size_sequences"], row["context_tokens"], row["h100_hours"])
    for row in costs.to_dict("records")
]
rows = [
    f"| {model} | {total.steps} | {total.tokens / 1e9:.1f} | {total.hours:.0f} |"
    for model, total in zip(costs["model"], totals, strict=True)
]
Markdown("| model, to CR 8 | steps | 10⁹ tokens | H100 hours |\n|---|---|---|---|\n" + "\n".join(rows))

# %% [markdown]
# ## 6. What to doubt
#
# The library looks for reasons not to trust a comparison. Of the results of section 2 it says:

# %%
Markdown("\n".join(f"- {sentence}" for sentence in comparison.warnings_of(frame)) or "Nothing.")

# %% [markdown]
# And beyond what a program can see: this is a model of about a million weights, on tasks made for it. That learned
# eviction beats fixed rules *here* says that the code does what the method describes. How much it gains on a large
# model and real problems is in the paper (Łańcucki et al. 2025), and can be measured with the same commands.
