"""What the model is trained on, seen: packed rows with their loss mask.

Every real token is distilled, padding never: completion tokens green, prompt tokens dim, a rule between documents

python -m dms_lab.preview data=jsonl data.path=chats.jsonl
"""

import sys
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.text import Text

from dms_lab.train import CONFIG_PATH, command_line

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

COMPLETION, PROMPT, BORDER = "green", "dim", "bold magenta"


def render(batch: "dict[str, Tensor]", tokenizer: "PreTrainedTokenizerBase") -> Text:
    """The rows of a batch (`training.packing.collate`) as coloured text, with a border before each document."""
    text = Text()
    for index, document in enumerate(batch["document"].tolist()):
        ids, is_completion = batch["ids"][index].tolist(), batch["is_completion"][index].tolist()
        for number in range(max(document) + 1):
            places = [i for i, d in enumerate(document) if d == number]
            learned = sum(is_completion[i] for i in places)
            title = f"row {index}, document {number}: {len(places)} tokens distilled, {learned} of them completion"
            text.append(f"\n--- {title} ---\n", BORDER)
            for flag, run in _runs(places, is_completion):
                piece = tokenizer.decode([ids[i] for i in run], clean_up_tokenization_spaces=False)
                text.append(piece, COMPLETION if flag else PROMPT)
        text.append(f"\n--- row {index}: {document.count(-1)} of {len(document)} padding, not in the loss ---\n", BORDER)
    return text


def _runs(places: list[int], flags: list[bool]) -> list[tuple[bool, list[int]]]:
    """Neighbouring places with the same flag, together: a word of several tokens decodes as a whole."""
    runs: list[tuple[bool, list[int]]] = []
    for place in places:
        if not runs or runs[-1][0] != flags[place]:
            runs.append((flags[place], []))
        runs[-1][1].append(place)
    return runs


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="preview")
def main(cfg: DictConfig) -> None:
    """Prints the first batch that a training run of this configuration would see."""
    from dms_lab import models
    from dms_lab.config import resolve
    from dms_lab.training.data import RetrofitData

    try:
        config = resolve(OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))
        tokenizer = models.load_tokenizer(config.model)
        Console().print(render(RetrofitData(config, tokenizer).batch(0), tokenizer))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    command_line(main)
