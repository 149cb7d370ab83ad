# %% [markdown]
# # What is kept
#
# A retrofitted model decides about every token, in every layer and KV head, whether it stays in the cache or goes.
# Here are its decisions, token by token: the text, then the counts.
#
# The model is the embedded one, trained for the demo to a compression ratio (CR) of 4 and of 8 with three seeds
# (`experiments/tiny_demo`). Its tasks hide facts such as `coin Mia 4.` among sentences that nobody will ask about;
# the question comes last. Whoever reads the facts does not know yet which of them will be asked for.
#
# **To run this on a checkpoint**, name its folder below: all is then computed anew. Without one, the decisions are
# those that `experiments/tiny_demo/decisions.py` wrote down from the demo's checkpoints, which are too large to keep
# here.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import HTML, Markdown, display

from dms_lab import inspection

plt.rcParams |= {"figure.dpi": 90, "figure.constrained_layout.use": True, "font.size": 9, "axes.spines.top": False}
plt.rcParams |= {"axes.spines.right": False, "legend.frameon": False}

# %%
checkpoint = None  # such as "../runs/demo/<hash>/dms/checkpoints/cr8"

# %%
if checkpoint is None:
    chains = inspection.load(Path("../experiments/tiny_demo/decisions.jsonl"))
else:
    chains = inspection.inspect_checkpoint(Path(checkpoint), (512,))
    chains += inspection.inspect_checkpoint(Path(checkpoint), (1024,), ("ledger",))
crs = sorted({chain.about["cr"] for chain in chains})
seeds = sorted({chain.about["seed"] for chain in chains})

# %% [markdown]
# These chains are all there is: one problem a task, read and answered by every checkpoint. `measured` is the ratio at
# the end of the chain, tokens / slots in use.

# %%
columns = ["cr", "seed", "task", "length", "right"]
table = pd.DataFrame([{name: chain.about[name] for name in columns} for chain in chains])
table["tokens"] = [len(chain.texts) for chain in chains]
table["measured"] = [round(float(chain.measured_cr[-1]), 2) for chain in chains]
HTML(table.rename(columns={"cr": "CR asked"}).to_html(index=False))

# %% [markdown]
# ## One chain, all heads
#
# Each token is marked by how many heads keep it: the darker, and the heavier underlined, the more. Hold the pointer
# over a token to see which (as layer.head).

# %%
at_512 = [chain for chain in chains if chain.about["length"] == 512]
chain = next(c for c in at_512 if c.about["task"] == "program" and c.about["cr"] == crs[-1])
HTML(inspection.coloured_html(chain))

# %% [markdown]
# **Look at** the facts (`jump Mia Ben 4.`) standing out from the sentences around them. The sentences fade almost
# everywhere, although one in eight begins with a name too.
#
# ## The same text, head by head
#
# The beginning of that chain as each head keeps it: underlined and dark is kept, grey is evicted. An evicted token is
# still seen by the next few queries (the window), then its slot is used again.

# %%
num_layers, num_heads, _ = chain.evict.shape
for layer in range(num_layers):
    for head in range(num_heads):
        display(HTML(inspection.coloured_html(chain, [(layer, head)], 0, 64)))

# %% [markdown]
# **Look at** how unlike the heads are. There is no quota a head: the loss asks for one ratio of them all. Some heads
# live on the window alone; others carry the facts.
#
# ## By kind of token
#
# The share of decisions to keep, over the chains of 512 tokens. Each dot is one training seed.

# %%
frame = inspection.tidy(at_512, inspection.task_roles)
by_type = inspection.kept_share(frame, ["cr", "seed", "type"])
order = by_type.groupby("type")["kept"].mean().sort_values().index.tolist()
figure, panel = plt.subplots(figsize=(6.5, 3.2))
for cr, face, marker in zip(crs, ("white", "black"), ("o", "D"), strict=False):
    rows = by_type[by_type["cr"] == cr]
    panel.plot(rows["kept"], rows["type"].map(order.index), marker, color="black", markerfacecolor=face, label=f"CR {cr:g}")
panel.set(yticks=range(len(order)), yticklabels=order, xlabel="share of decisions to keep, mean over heads", xlim=(0, 1))
panel.grid(axis="y", linewidth=0.4)
panel.legend(loc="lower right")
plt.show()
mean = by_type.groupby(["cr", "type"])["kept"].mean()
high = crs[-1]
Markdown(
    f"At CR {high:g} the name in a fact stays in {mean[high, 'fact: name']:.0%} of the heads, a word of prose in "
    f"{mean[high, 'prose']:.0%}; at CR {crs[0]:g}, in {mean[crs[0], 'fact: name']:.0%} and {mean[crs[0], 'prose']:.0%}."
)

# %% [markdown]
# **Look at** what a tighter budget gives up: prose first, and the thought, of which each step needs the newest sum
# only. **Do not conclude** that a token kept by few heads is half lost. One head that has it can serve all that
# follow: see the next figure.
#
# ## By layer and head
#
# The same shares for each head (column, as layer.head) at the highest ratio, one panel a seed.

# %%
per_head = inspection.kept_share(frame[frame["cr"] == high], ["seed", "type", "layer", "head"])
figure, panels = plt.subplots(1, len(seeds), figsize=(3.4 * len(seeds) + 1, 3.4), sharey=True, squeeze=False)
for seed, panel in zip(seeds, panels[0], strict=True):
    grid = per_head[per_head["seed"] == seed].pivot_table(index="type", columns=["layer", "head"], values="kept")
    grid = grid.loc[order[::-1]]
    panel.imshow(grid, cmap="Greys", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in pd.DataFrame(grid.to_numpy()).stack().items():
        shade = "white" if value > 0.5 else "black"
        panel.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=shade, fontsize=7)
    labels = [f"{layer}.{head}" for layer, head in grid.columns]
    panel.set(title=f"seed {seed}: kept (%)", xticks=range(len(labels)), xticklabels=labels)
    panel.set(yticks=range(len(order)), yticklabels=order[::-1])
plt.show()
facts = per_head[per_head["type"].isin(["fact: name", "fact: value"])].groupby(["layer", "head"])["kept"].mean()
layer, head = facts.idxmax()
overall = inspection.kept_share(frame[frame["cr"] == high], ["layer"]).set_index("layer")["kept"]
Markdown(
    f"Head {layer}.{head} keeps {facts.max():.0%} of the names and values of facts, over all seeds: it is the memory. "
    f"Layer {overall.idxmin()} keeps {overall.min():.1%} of its tokens, and works on what the window holds."
)

# %% [markdown]
# **Do not conclude** that this head would be found in another model. The three seeds start from the same weights;
# only the order of the data and the noise differ between them.
#
# ## By position
#
# Does the model save the beginning, or the end? The share kept in blocks of 32 tokens, mean over seeds and tasks.

# %%
by_place = inspection.kept_share(frame, ["cr", "block"])
question = min(chain.num_prompt for chain in at_512)
figure, panel = plt.subplots(figsize=(6.5, 2.8))
for cr, style in zip(crs, ("k--", "k-"), strict=False):
    rows = by_place[by_place["cr"] == cr]
    panel.plot(rows["block"] + 16, rows["kept"], style, marker="o", markersize=3, label=f"CR {cr:g}")
panel.axvline(question, color="black", linewidth=0.6, linestyle=":")
panel.annotate("the first thought begins", (question, 0.02), xytext=(-4, 0), textcoords="offset points", ha="right")
panel.set(xlabel="position of the token (middle of its block)", ylabel="share kept", ylim=(0, None))
panel.legend(loc="upper center")
plt.show()

# %% [markdown]
# **Look at** the middle, which has no trend: what a token says counts, not where it stands. A little more stays at
# the beginning, where the template of the chat is; the rise at the end is the question and the answer, and the newest
# token, about which nobody has decided yet.
#
# ## The ratio grows with the length
#
# The first tokens of any text are all in the window, so compression starts at 1. Below, the measured ratio after each
# token; the dotted lines are the ratios asked for at the training length.

# %%
growth = inspection.cr_by_length(chains)
figure, panel = plt.subplots(figsize=(6.5, 3.2))
for cr, style in zip(crs, ("--", "-"), strict=False):
    for _, rows in growth[growth["cr"] == cr].groupby("chain"):
        panel.plot(rows["num_tokens"], rows["measured_cr"], color="black", linestyle=style, linewidth=0.8, alpha=0.7)
    panel.axhline(cr, color="black", linewidth=0.8, linestyle=":")
    panel.annotate(f"CR {cr:g} asked", (17, cr), xytext=(0, 3), textcoords="offset points")
panel.axvline(512, color="black", linewidth=0.6, linestyle=":")
panel.annotate("training length", (512, 1), xytext=(-4, 0), textcoords="offset points", ha="right")
panel.set_xscale("log", base=2)
panel.xaxis.set_major_formatter("{x:.0f}")
panel.set(xlabel="tokens read and written", ylabel="measured CR", xlim=(16, 1100))
plt.show()
long = [chain for chain in chains if chain.about["length"] == 1024]
short = [chain for chain in at_512 if chain.about["cr"] == high and chain.about["task"] == "ledger"]
share = [1 - sum(chain.evict.mean() for chain in some) / len(some) for some in (short, long)]
Markdown(
    f"At the end of the `ledger` chains of about 1,024 tokens the ratio is {min(c.measured_cr[-1] for c in long):.1f} to "
    f"{max(c.measured_cr[-1] for c in long):.1f}, of those of 512 {min(c.measured_cr[-1] for c in short):.1f} to "
    f"{max(c.measured_cr[-1] for c in short):.1f}. They keep {share[1]:.1%} and {share[0]:.1%} of their tokens, and "
    f"the window of {chain.window} weighs less and less."
)

# %% [markdown]
# ## Twice the training length: read the thoughts
#
# An answer is a single digit and may be right by luck. These are the thoughts of the chains of 1,024 tokens, which
# the model was never trained on. Their question:

# %%
texts = ["".join(chain.texts) for chain in long]
display(Markdown(f"`{texts[0].split('<|im_end|>')[0].splitlines()[-1].strip()}`"))
for chain, text in zip(long, texts, strict=True):
    thought = text.partition("<think>")[2].removesuffix("<|im_end|>").replace("</think>", " → ")
    display(Markdown(f"seed {chain.about['seed']} ({'right' if chain.about['right'] else 'wrong'}): `{thought.strip()}`"))

# %% [markdown]
# **Do not conclude** from one right answer that a longer text is safe: see whether every name that was asked for was
# looked up. How far a model carries beyond its training length has to be measured, on many problems.
