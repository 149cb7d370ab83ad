"""What the model is trained on, seen: packed rows with their loss mask.

completion tokens green, prompt tokens dim, a rule between documents, padding counted

python -m dms_lab.preview data=jsonl data.path=chats.jsonl
"""

from typing import Any

from rich.console import Console
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

COMPLETION, PROMPT, BORDER = "green", "dim", "bold magenta"


def render(batch: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase) -> Text:
    """The rows of a batch (`training.packing.collate`) as coloured text, with a border before each document."""
    text = Text()
    for index, document in enumerate(batch["document"].tolist()):
        ids, is_completion = batch["ids"][index].tolist(), batch["is_completion"][index].tolist()
        for number in range(max(document) + 1):
            places = [i for i, d in enumerate(document) if d == number]
            learned = sum(is_completion[i] for i in places)
            title = f"row {index}, document {number}: {len(places)} tokens, {learned} completion"
            text.append(f"\n--- {title} ---\n", BORDER)
            for flag, run in _runs(places, is_completion):
                piece = tokenizer.decode([ids[i] for i in run], clean_up_tokenization_spaces=False)
                text.append(piece, COMPLETION if flag else PROMPT)
        text.append(f"\n--- row {index}: {document.count(-1)} of {len(document)} padding ---\n", BORDER)
    return text


def _runs(places: list[int], flags: list[bool]) -> list[tuple[bool, list[int]]]:
    """Neighbouring places with the same flag, together: a word of several tokens decodes as a whole."""
    runs: list[tuple[bool, list[int]]] = []
    for place in places:
        if not runs or runs[-1][0] != flags[place]:
            runs.append((flags[place], []))
        runs[-1][1].append(place)
    return runs


def main(cfg: Any) -> None:
    """Prints the first batch of a composed configuration (a plain dict or an OmegaConf one)."""
    from omegaconf import OmegaConf

    from dms_lab import models
    from dms_lab.config import resolve
    from dms_lab.training.data import RetrofitData

    plain = OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg
    plain.pop("experiment", None)
    config = resolve(plain)
    tokenizer = models.load_tokenizer(config.model)
    Console().print(render(RetrofitData(config, tokenizer).batch(0), tokenizer))
