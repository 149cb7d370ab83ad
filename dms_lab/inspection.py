"""What a retrofitted model keeps of a chain, token by token: decisions, summaries of them, coloured text.

    handle, ids --kept--> Decisions --tidy--> one row a token and head --kept_share--> by type, by layer and head, by place
                                   --coloured_html--> text in a notebook
                                   --save, load-----> a line of JSON a chain

Shapes: L layers, K KV heads, T tokens. Nothing here decides anything: decisions are those of the masked cache.
"""

import html
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dms_lab.tiny import tasks

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

    from dms_lab.attachment import Retrofit

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Decisions:
    """The decisions about one chain of T tokens, the first `num_prompt` of them the prompt.

    `evict` [L, K, T] is True where a token goes once it is `window` tokens old, False where it stays or where nobody has
    decided yet. `texts` are the tokens as text; a character of several tokens shows as U+FFFD in each. `about`: where the
    chain comes from, plain values by name.
    """

    evict: np.ndarray
    window: int
    texts: list[str]
    num_prompt: int = 0
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def visible_until(self) -> np.ndarray:
        """The last position whose query sees each token, [L, K, T]; T - 1 for all that is there at the end."""
        position = np.arange(len(self.texts))
        return np.where(self.evict, np.minimum(position + self.window - 1, len(self.texts) - 1), len(self.texts) - 1)

    @property
    def live(self) -> np.ndarray:
        """Slots in use after each token, window included, [L, K, T]."""
        freed = np.zeros(self.evict.shape, dtype=np.int64)
        freed[..., self.window :] = self.evict.cumsum(-1)[..., : max(0, len(self.texts) - self.window)]
        return np.arange(1, len(self.texts) + 1) - freed

    @property
    def measured_cr(self) -> np.ndarray:
        """Logical tokens / live slots after each token, live slots averaged over layers and heads, [T]."""
        return np.arange(1, len(self.texts) + 1) / self.live.mean((0, 1))


# -- from a model --------------------------------------------------------------------------------------------------------
def kept(
    handle: "Retrofit",
    ids: Sequence[int],
    tokenizer: "PreTrainedTokenizerBase",
    num_prompt: int = 0,
    about: dict[str, Any] | None = None,
) -> Decisions:
    """What the model's own policy decides about the tokens `ids`, from one forward through the masked cache.

    Raises `ValueError` for a model without a policy of its own, for layers with a sliding window (their tokens go for
    another reason), and for ids that are none, unknown, or more than the model's positions.
    """
    import torch

    from dms_lab.cache.masked import MaskedCache
    from dms_lab.chains import Prompt, unfit

    policy, ids = handle.policy(), list(ids)
    if problem := unfit(Prompt("to inspect", ids), 0, handle.model):
        raise ValueError(problem)
    if any(getattr(a, "sliding_window", getattr(a.config, "sliding_window", None)) for a in handle.attentions):
        raise ValueError(
            f"{type(handle.model).__name__} has layers with a sliding window, which hide tokens whatever was decided; "
            "inspection shows models whose layers all see the whole text"
        )
    device = next(handle.model.parameters()).device
    cache = MaskedCache(policy)
    with torch.inference_mode():
        handle.model.get_decoder()(input_ids=torch.tensor([ids], device=device), past_key_values=cache, use_cache=True)
    evict = torch.cat([policy.evict(layer.state, layer.keys) for layer in cache.layers])
    return Decisions(evict.cpu().numpy(), policy.window, [tokenizer.decode([i]) for i in ids], num_prompt, about or {})


def inspect_checkpoint(
    checkpoint: Path, lengths: Sequence[int] = (512,), families: Sequence[str] = tasks.FAMILIES, problem_seed: int = 0
) -> list[Decisions]:
    """Held-out problems of the embedded model, answered greedily by a checkpoint of it: one chain a family and length.

    `about` has the checkpoint's provenance, the task, the length asked for and whether the answer was right.
    """
    from dms_lab.checkpoint import read_metadata
    from dms_lab.evaluation import hard
    from dms_lab.evaluation.attached import attach
    from dms_lab.generation import generate_greedy
    from dms_lab.tiny.corpus import encode_prompt

    metadata = read_metadata(Path(checkpoint))
    model = attach(None, str(checkpoint), None, None)
    problems = [(hard.make_problems(f, 1, length, problem_seed)[0], length) for length in lengths for f in families]
    prompts = [encode_prompt(problem, model.tokenizer) for problem, _ in problems]
    end = model.tokenizer.eos_token_id
    answers = generate_greedy(model.handle.model, model.make_policy, prompts, max_new_tokens=96, end_id=end)
    chains = []
    for (problem, length), prompt, answer in zip(problems, prompts, answers, strict=True):
        right = hard.is_right(answer, problem, model.tokenizer)
        about = metadata.provenance | {"task": problem.family, "length": length, "right": right}
        chains.append(kept(model.handle, prompt + answer.ids, model.tokenizer, len(prompt), about))
    return chains


# -- on disk -------------------------------------------------------------------------------------------------------------
def save(chains: Iterable[Decisions], path: Path) -> None:
    """Writes one line of JSON a chain; `evict` of a layer and head in hexadecimal, 4 tokens a digit, the first on top."""
    lines = []
    for chain in chains:
        bits = [[head.tobytes().hex() for head in layer] for layer in np.packbits(chain.evict, axis=-1)]
        lines.append(json.dumps(asdict(chain) | {"evict": bits, "schema_version": SCHEMA_VERSION}, ensure_ascii=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def load(path: Path) -> list[Decisions]:
    """The chains of a file that `save` wrote; raises `ValueError` with file and line for a line that is none."""
    chains = []
    lines = Path(path).read_text().split("\n")  # not splitlines: texts hold other line ends
    for number, line in enumerate(lines if lines[-1] else lines[:-1], 1):
        try:
            row = json.loads(line)
            if (version := row.pop("schema_version")) != SCHEMA_VERSION:
                raise ValueError(f"schema version {version!r} is not {SCHEMA_VERSION}")
            chain = Decisions(**(row | {"evict": _unpacked(row["evict"], len(row["texts"]))}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}:{number} holds no decisions ({error}); write the file again") from error
        chains.append(chain)
    return chains


def _unpacked(digits: list[list[str]], num_tokens: int) -> np.ndarray:
    packed = np.array([[list(bytes.fromhex(head)) for head in layer] for layer in digits], dtype=np.uint8)
    if packed.ndim != 3 or packed.shape[-1] != -(-num_tokens // 8):
        raise ValueError("heads and texts have different numbers of tokens")
    return np.unpackbits(packed, axis=-1, count=num_tokens).astype(bool)


# -- kinds of tokens -----------------------------------------------------------------------------------------------------
def lexical_types(texts: Sequence[str]) -> list[str]:
    """What each token looks like: special, number, word, name (a word with a capital), punctuation or space."""
    return [_lexical_type(text) for text in texts]


def _lexical_type(text: str) -> str:
    word = text.strip()
    if text.startswith("<") and text.endswith(">") and len(text) > 2:
        return "special"
    if not word:
        return "space"
    if any(c.isdigit() for c in word):
        return "number"
    if any(c.isalpha() for c in word):
        return "name" if word[0].isupper() else "word"
    return "punctuation"


_REGIONS = {"<think>": "thought", "</think>": "answer"}  # what a special token opens; tiny.tokenizer takes long to import


def task_roles(texts: Sequence[str]) -> list[str]:
    """What each token of a chain of the embedded model's tasks is for; the parts are those of `tiny.tasks`.

    template, prose, fact: keyword, fact: name, fact: value, fact: full stop, question, thought, answer.
    """
    roles, region, place = [], "template", 0
    is_start = False  # of a sentence: `road` is a noun elsewhere
    for text in texts:
        word = text.strip()
        if text in _REGIONS or (text.startswith("<|") and text.endswith("|>")):
            region = _REGIONS.get(text, "template")
            roles.append("template")
            continue
        if region == "template":
            roles.append("template")
            region, is_start = ("prose", True) if "\n" in text else (region, False)
            continue
        if region == "prose" and is_start and word in ("coin", "road", "jump"):
            region, place = "fact", 0
        elif region == "prose" and "\n" in text:
            region = "question"
        parts = ("keyword", "name", "value")
        roles.append(f"fact: {'full stop' if word == '.' else parts[min(place, 2)]}" if region == "fact" else region)
        place, is_start = place + 1, word == "."
        if region == "fact" and word == ".":
            region = "prose"
    return roles


# -- tables --------------------------------------------------------------------------------------------------------------
def tidy(
    chains: Iterable[Decisions], classify: Callable[[Sequence[str]], list[str]] = lexical_types, block: int = 32
) -> "pd.DataFrame":
    """One row per chain, layer, head and token: `kept`, `type` by `classify`, `block` (where its block of tokens begins).

    Beside them what the chain is `about`, and its number in `chain`.
    """
    import pandas as pd

    frames = []
    for number, chain in enumerate(chains):
        num_layers, num_heads, _ = chain.evict.shape
        layer, head, position = (x.ravel() for x in np.indices(chain.evict.shape))
        columns = {"chain": number, "layer": layer, "head": head, "position": position, "kept": ~chain.evict.ravel()}
        columns |= {name: np.tile(values, num_layers * num_heads) for name, values in _of_tokens(chain, classify).items()}
        frames.append(pd.DataFrame(columns | {"block": position // block * block}).assign(**chain.about))
    return pd.concat(frames, ignore_index=True)


def _of_tokens(chain: Decisions, classify: Callable[[Sequence[str]], list[str]]) -> dict[str, np.ndarray]:
    position = np.arange(len(chain.texts))
    texts, types = np.array(chain.texts, dtype=object), np.array(classify(chain.texts), dtype=object)
    return {"text": texts, "type": types, "is_prompt": position < chain.num_prompt}


def kept_share(frame: "pd.DataFrame", by: str | Sequence[str]) -> "pd.DataFrame":
    """The share of decisions to keep in each group of a `tidy` frame, and how many decisions that were."""
    groups = frame.groupby(by, as_index=False, sort=True)["kept"]
    return groups.agg(kept="mean", num_decisions="size")


def cr_by_length(chains: Iterable[Decisions]) -> "pd.DataFrame":
    """One row per chain and length: `num_tokens` read so far, mean `live` slots then, `measured_cr`; and `about`."""
    import pandas as pd

    frames = []
    for number, chain in enumerate(chains):
        columns = {"chain": number, "num_tokens": np.arange(1, len(chain.texts) + 1)}
        columns |= {"live": chain.live.mean((0, 1)), "measured_cr": chain.measured_cr}
        frames.append(pd.DataFrame(columns).assign(**chain.about))
    return pd.concat(frames, ignore_index=True)


# -- text ----------------------------------------------------------------------------------------------------------------
# From kept by none to kept by all: each step darker and with another underline, so that it reads in grey and in print.
_STEPS = (
    ("none", "background:#fff;color:#6b6b6b"),
    ("under a third", "background:#e3edf7;color:#111;text-decoration:underline dotted"),
    ("under two thirds", "background:#a9c8e6;color:#111;text-decoration:underline"),
    ("most", "background:#5b93c9;color:#000;text-decoration:underline 2px"),
    ("all", "background:#08306b;color:#fff;font-weight:bold;text-decoration:underline double"),
)
_BOX = "background:#fff;color:#111;padding:.6em;font:13px/1.9 monospace;white-space:pre-wrap;overflow-wrap:anywhere"


def coloured_html(
    chain: Decisions, heads: Sequence[tuple[int, int]] | None = None, start: int = 0, stop: int | None = None
) -> str:
    """The tokens from `start` to before `stop` as HTML, each marked by how many of `heads` keep it.

    `heads` are pairs (layer, head), None: all. Colour, underline and weight say the same; the title of a token names the
    heads that keep it, as layer.head. The styles are its own, nothing is loaded. Raises `ValueError` for unknown heads.
    """
    num_layers, num_heads, num_tokens = chain.evict.shape
    known = [(layer, head) for layer in range(num_layers) for head in range(num_heads)]
    heads = known if heads is None else list(heads)
    if not heads or not set(heads) <= set(known):
        raise ValueError(f"heads={heads}: name pairs of a layer below {num_layers} and a head below {num_heads}")
    spans, used = [], set()
    for position in range(*slice(start, stop).indices(num_tokens)):
        keepers = [f"{layer}.{head}" for layer, head in heads if not chain.evict[layer, head, position]]
        step = _step(len(keepers), len(heads))
        used.add(step)
        where = f": {' '.join(keepers)}" if 0 < len(keepers) < len(heads) else ""
        title = f"{position}: kept by {len(keepers)} of {len(heads)}{where}"
        spans.append(f'<span class="k{step}" title="{title}">{_shown(chain.texts[position])}</span>')
    styles = "".join(f".dms-kept .k{step}{{{_STEPS[step][1]};unicode-bidi:isolate}}" for step in range(len(_STEPS)))
    names = {0: "evicted", len(_STEPS) - 1: "kept"} if len(heads) == 1 else dict(enumerate(name for name, _ in _STEPS))
    legend = " ".join(f'<span class="k{step}"> {names[step]} </span>' for step in sorted(used))
    who = f"layer {heads[0][0]}, head {heads[0][1]}:" if len(heads) == 1 else f"kept by how many of {len(heads)} heads:"
    return f'<div class="dms-kept" style="{_BOX}"><style>{styles}</style><div>{who} {legend}</div>{"".join(spans)}</div>'


def _step(count: int, out_of: int) -> int:
    if count in (0, out_of):
        return 0 if count == 0 else len(_STEPS) - 1
    return 1 + min(2, 3 * count // out_of)


def _shown(text: str) -> str:
    """A token's text for HTML, what cannot be seen made visible."""
    return html.escape(text.replace("\n", "\u21b5\n").replace("\t", "\u21e5").replace("\r", "\u240d"))
