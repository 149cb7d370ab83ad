# %% [markdown]
# # The method in pictures
#
# A language model keeps a *key* and a *value* of every token it has read, in every layer and KV head: the KV cache.
# It grows with every token and soon costs more memory and time than the model itself. Dynamic Memory Sparsification
# (DMS) teaches a trained model to say, token by token and head by head, *this one can go*. A slot that is freed takes
# a new token.
#
# Each figure below is drawn by the functions that the code itself runs, those of `dms_lab.eviction`; nothing is
# written anew here. Read from top to bottom: who is seen, who decides, how a yes or no is learned, how many must go.
#
# Source of the method: Łańcucki, Staniszewski, Nawrot, Ponti, *Inference-Time Hyper-Scaling with KV Cache
# Compression*, NeurIPS 2025 (arXiv 2506.05345).

# %%
import math

import matplotlib.pyplot as plt
import pandas as pd
import torch
from IPython.display import Markdown, display
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from dms_lab import eviction
from dms_lab.attention import reference

plt.rcParams |= {"figure.dpi": 90, "figure.constrained_layout.use": True, "font.size": 9, "axes.spines.top": False}
plt.rcParams |= {"axes.spines.right": False, "legend.frameon": False}

# %% [markdown]
# ## 1. Who is seen
#
# One line is the whole definition. Query *i* sees key *j* if
#
#     j <= i   and   ( not evict[j]   or   i - j < window )
#
# A token that was marked for eviction stays in sight until it is `window` tokens old, then its slot is free. That is
# *delayed* eviction; with `window = 1` a marked token is gone at the next step, *immediate* eviction.
#
# Here are 16 tokens of one head, six of them marked. A row is a query (time runs downwards), a column is a key.

# %%
num_tokens = 16
marked = [1, 2, 5, 8, 9, 12]
evict = torch.zeros(1, 1, num_tokens, dtype=torch.bool)  # batch, KV heads, tokens
evict[..., marked] = True
full, immediate, delayed = (
    eviction.visible(torch.zeros_like(evict), 1),
    eviction.visible(evict, 1),
    eviction.visible(evict, 4),
)

# %%
shades = ListedColormap(["white", "#e8e8e8", "#9a9a9a", "#303030"])
names = ["in the future", "gone: its slot is free", "marked, but within the window", "kept"]
figure, panels = plt.subplots(1, 3, figsize=(9.5, 3.6), sharey=True)
titles = ("nothing evicted", "window = 1: immediate", "window = 4: delayed")
for panel, seen, title in zip(panels, (full, immediate, delayed), titles, strict=True):
    is_marked = (evict & (seen is not full))[0, 0].expand(num_tokens, -1)
    code = full[0, 0].int() + seen[0, 0].int() + (seen[0, 0] & ~is_marked).int()
    panel.pcolormesh(code, cmap=shades, vmin=0, vmax=3, edgecolors="white", linewidth=0.8)
    gone = (full & ~seen)[0, 0].nonzero()
    panel.plot(gone[:, 1] + 0.5, gone[:, 0] + 0.5, "x", color="#606060", markersize=4)
    panel.set(title=title, xlabel="key j", xticks=[0.5, 5.5, 10.5, 15.5], xticklabels=[0, 5, 10, 15], aspect="equal")
panels[0].set(ylabel="query i", yticks=[0.5, 5.5, 10.5, 15.5], yticklabels=[0, 5, 10, 15])
panels[0].invert_yaxis()
legend = [Patch(facecolor=shades(i), edgecolor="black", linewidth=0.4, label=name) for i, name in enumerate(names)]
figure.legend(handles=legend[1:], loc="outside lower center", ncols=3)
plt.show()

# %% [markdown]
# **Look at** the grey cells above the crosses in the third panel: a marked token still serves the next queries, which
# can copy from it what they need before it goes. **Do not conclude** that the window is free: its tokens take slots
# whatever was decided. The next figure counts them.

# %%
figure, panel = plt.subplots(figsize=(6, 2.8))
for seen, style, label in (
    (full, "k:", "nothing evicted"),
    (delayed, "k-", "window = 4"),
    (immediate, "k--", "window = 1"),
):
    panel.step(range(num_tokens), seen.sum(-1)[0, 0], style, where="mid", label=label)
panel.set(xlabel="query i (tokens read so far, less one)", ylabel="slots in use")
panel.legend()
plt.show()
live = {
    name: int(seen[0, 0, -1].sum()) for name, seen in {"full": full, "immediate": immediate, "delayed": delayed}.items()
}
Markdown(
    f"After {num_tokens} tokens, {live['full']} slots without eviction, {live['delayed']} with a window of 4, "
    f"{live['immediate']} with immediate eviction. **Compression ratio (CR)** = full / kept: "
    f"{live['full'] / live['delayed']:.2f} and {live['full'] / live['immediate']:.2f} here."
)

# %% [markdown]
# ## 2. Who decides
#
# Each token computes one number a head, its *eviction logit*; above 0 means *evict*. Which token does it speak about?
# `eviction.govern` moves the number to the token that it decides about. Below it is given the token's own index
# instead of a logit, so that the result names the decider; an infinite one means that nobody has decided yet, so the
# token is kept.

# %%
index = torch.arange(6.0)[None, None]
rules = {"self": "token j itself", "next": "token j + 1", "delayed": "token j + window (here 3)"}
deciders = {rule: eviction.govern(index, rule, window=3)[0, 0].tolist() for rule in rules}
table = pd.DataFrame(
    [[rules[rule], *("nobody yet" if math.isinf(d) else f"{d:.0f}" for d in found)] for rule, found in deciders.items()],
    index=pd.Index(list(rules), name="decided_by"),
    columns=["in words", *(f"about token {j}" for j in range(6))],
)
display(table)

# %% [markdown]
# `next` is the usual one: the following token has seen this one in its context, and the newest token is always kept.
# `delayed` decides only when the token is about to leave the window; the paper uses it as an ablation.
#
# ## 3. Learning a yes or no: noise and temperature
#
# A hard yes or no has no gradient. In training it is replaced by a *relaxed* decision between 0 (keep) and 1 (evict),
# `sigmoid((logit + noise) / tau)`. The noise makes the model try both, and has to be fair: at a logit of 0 the chance
# must be one half. Logistic noise is, because it is the difference of two Gumbel variables; a single Gumbel variable,
# an easy slip, is not.

# %%
generator = torch.Generator().manual_seed(0)
logistic = eviction.logistic_noise((200_000,), generator)
torch.manual_seed(0)
gumbel = torch.distributions.Gumbel(0.0, 1.0).sample((2, 200_000))
figure, panel = plt.subplots(figsize=(6.5, 3))
bins = torch.linspace(-8, 8, 81).numpy()
panel.hist(logistic.numpy(), bins, density=True, color="#c8c8c8", label="the code's noise (logistic)")
panel.hist((gumbel[0] - gumbel[1]).numpy(), bins, density=True, histtype="step", color="black", label="Gumbel - Gumbel")
panel.hist(gumbel[0].numpy(), bins, density=True, histtype="step", color="black", linestyle=":", label="one Gumbel alone")
panel.axvline(0, color="black", linewidth=0.6)
panel.set(xlabel="noise", ylabel="density")
panel.legend()
plt.show()
Markdown(
    f"Means of {len(logistic):,} draws: logistic {logistic.mean():+.3f}, one Gumbel {gumbel[0].mean():+.3f}. With a logit "
    f"of 0, logistic noise evicts {(logistic > 0).float().mean():.1%} of the tokens, one Gumbel "
    f"{(gumbel[0] > 0).float().mean():.1%}: a model trained with it has to undo a bias that is not there at inference."
)

# %% [markdown]
# The temperature `tau` says how far from yes and no the relaxed decision may stay. Left: no noise. Right: averaged
# over the noise, where the curves almost fall together on `sigmoid(logit)`: however sharp a single draw is, the
# *average* decision moves smoothly with the logit, and that is what gradient descent can follow.

# %%
logit = torch.linspace(-6, 6, 241)
styles = {1.0: ":", 0.3: "--", 0.1: "-"}
figure, panels = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
for tau, style in styles.items():
    panels[0].plot(
        logit, eviction.evict_probability(logit, torch.tensor(0.0), tau), "k", linestyle=style, label=f"tau = {tau}"
    )
    mean = eviction.evict_probability(logit[:, None], logistic[None, :20_000], tau).mean(1)
    panels[1].plot(logit, mean, "k", linestyle=style, label=f"tau = {tau}")
panels[1].plot(logit, torch.sigmoid(logit), color="#a0a0a0", linewidth=5, alpha=0.6, zorder=0, label="sigmoid(logit)")
panels[0].set(title="without noise", xlabel="eviction logit", ylabel="relaxed decision (0 keep, 1 evict)")
panels[1].set(title="mean over the noise", xlabel="eviction logit")
for panel in panels:
    panel.legend(loc="upper left")
plt.show()
start = torch.tensor(-5.0)
chance = eviction.evict_probability(start, logistic, 0.1).mean()
Markdown(
    f"A fresh predictor says {start:.0f} for every token (the offset of the recipe): {chance:.1%} of the relaxed decisions "
    "then say *evict*, so that training starts close to the original model and still explores."
)

# %% [markdown]
# ## 4. What attention does with a relaxed decision
#
# In training nothing is removed. The score of an older key gets `log(1 - decision)` added: 0 for a decision to keep,
# and ever more negative the surer the decision to evict is, until its weight vanishes. Within the window nothing is
# added. The picture is the bias that the dense reference of the project (`attention.reference.soft_bias`) adds to the
# scores, shown as the factor `exp(bias)` on each key's weight.

# %%
logits = torch.full((1, 1, num_tokens), -1.0)
logits[..., marked] = torch.tensor([0.02, 0.05, 0.1, 0.2, 0.4, 1.0])
log_keep = eviction.log_keep(logits, torch.tensor(0.0), tau=0.1)
factor = reference.soft_bias(log_keep, window=4).exp()[0, 0]
figure, panel = plt.subplots(figsize=(5, 3.8))
future = ~full[0, 0]
image = panel.pcolormesh(
    factor.masked_fill(future, math.nan), cmap="Greys", vmin=0, vmax=1, edgecolors="white", linewidth=0.8
)
panel.invert_yaxis()
panel.set(xlabel="key j (marked ones: logit)", ylabel="query i", aspect="equal", yticks=[0.5, 5.5, 10.5, 15.5])
panel.set_yticklabels([0, 5, 10, 15])
panel.set_xticks([j + 0.5 for j in marked], [f"{logits[0, 0, j]:.2f}" for j in marked], rotation=60)
figure.colorbar(image, label="factor on the key's weight")
plt.show()

# %% [markdown]
# **Look at** the first four cells of each marked column: full weight, whatever the decision. Below them the weight
# falls with the logit. At inference the logit alone counts (no noise), and a marked key is gone for good.
#
# ## 5. How many must go: the schedule
#
# The model is not thrown into the cold water. The ratio asked of it rises linearly over a share of the steps
# (`ramp`), then holds. Because it passes every ratio in between, one run leaves a family of checkpoints: here those
# of CR 2, 4 and 8.

# %%
steps, ramp, cr, length, window = 440, 0.8, 8.0, 512, 16
asked = [eviction.cr_at(step, cr, steps, ramp) for step in range(steps)]
passed = {wanted: next(step for step, now in enumerate(asked) if now >= wanted) for wanted in (2.0, 4.0, 8.0)}
figure, panels = plt.subplots(1, 2, figsize=(9, 3))
panels[0].plot(asked, "k")
panels[0].plot(list(passed.values()), list(passed), "ko", markerfacecolor="white", label="checkpoint")
panels[0].set(xlabel="step", ylabel="compression ratio asked for")
panels[0].legend(loc="upper left")
for count, style in (("live", "k-"), ("decisions", "k--")):
    target = [eviction.evict_target(now, length, length - window, count) for now in asked]
    panels[1].plot(target, style, label=f"count = {count}")
panels[1].set(xlabel="step", ylabel="share of decisions\nthat must be evictions", ylim=(0, 1))
panels[1].legend(loc="lower right")
plt.show()

# %% [markdown]
# ## 6. The window has a price: the correction of the target
#
# To end with one slot in eight, 7/8 of the tokens must be *gone*. But the last `window` tokens are there whatever was
# decided about them. If 7/8 of the *decisions* are evictions (`count=decisions`, as in the papers), a short text is
# compressed less than asked. `count=live`, the default here, asks for more evictions instead, so that the measured
# ratio at the training length is the one that was asked for. Below: documents whose decisions meet each target
# exactly.

# %%
lengths = list(range(24, 1025, 8))
figure, panels = plt.subplots(1, 2, figsize=(9, 3))
measured = {}
for count, style in (("live", "k-"), ("decisions", "k--")):
    targets = [eviction.evict_target(cr, n, max(0, n - window), count) for n in lengths]
    measured[count] = [
        float(eviction.live_ratio([torch.full((1, 1, n), share)], torch.zeros(1, n, dtype=torch.long), window))
        for n, share in zip(lengths, targets, strict=True)
    ]
    panels[0].plot(lengths, targets, style, label=f"count = {count}")
    panels[1].plot(lengths, measured[count], style, label=f"count = {count}")
panels[0].set(xlabel="length of the document (tokens)", ylabel="target: share of evictions", ylim=(0.8, 1.02))
panels[1].set(xlabel="length of the document (tokens)", ylabel="measured CR at its end", ylim=(0, cr + 1))
for panel in panels:
    panel.legend(loc="lower right")
plt.show()
at_384 = measured["decisions"][lengths.index(384)]
Markdown(
    f"With a window of {window} and a CR of {cr:.0f}, `count=decisions` measures {at_384:.1f} at 384 tokens. The solid "
    f"line falls below {cr:.0f} where even evicting everything does not help: shorter than window x CR = "
    f"{window * cr:.0f} tokens. Training at such a length is refused with that sentence."
)

# %% [markdown]
# ## 7. The push: the retention loss
#
# One number is compared with the target: the mean relaxed decision over all layers, heads and tokens. There is no
# quota a head, so heads share the budget as they like. The published loss is one-sided, it pushes while too few
# tokens go and is silent after; the two-sided one also calls back when too many go, which short trainings on mixed
# texts turned out to need (`experiments/tiny_demo` has the figures).

# %%
target = eviction.evict_target(cr, length, length - window)
means = torch.linspace(0, 1, 101)
real = torch.ones(1, 8, dtype=torch.bool)
figure, panel = plt.subplots(figsize=(5.5, 2.8))
for retention, style in (("one_sided", "k-"), ("two_sided", "k--")):
    loss = [eviction.retention_loss([m.expand(1, 1, 8)], real, target, retention) for m in means]
    panel.plot(means, loss, style, label=f"retention = {retention}")
panel.axvline(target, color="black", linewidth=0.6, linestyle=":")
panel.annotate("target", (target, 0.6), xytext=(-6, 0), textcoords="offset points", ha="right")
panel.set(xlabel="mean relaxed decision (share evicted)", ylabel="loss")
panel.legend()
plt.show()

# %% [markdown]
# This loss says *how much* must go. *What* goes is settled by the other half of the training: the compressed model
# must predict the same next tokens as the original (knowledge distillation). What it then chooses to keep is in the
# notebook `what_is_kept`; what it costs and saves, in `accuracy_vs_memory`.
