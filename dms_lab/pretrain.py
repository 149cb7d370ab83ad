"""Recreate the embedded model: ``python -m dms_lab.pretrain out=<folder>`` (about an hour on one core)."""

import hydra
from omegaconf import DictConfig

from dms_lab.train import CONFIG_PATH, command_line


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="pretrain")
def main(cfg: DictConfig) -> None:
    """Trains model and tokenizer from the seed; `out` is then a folder for `AutoModelForCausalLM.from_pretrained`."""
    from pathlib import Path

    import torch

    from dms_lab.tiny.pretrain import Recipe, pretrain

    torch.set_num_threads(cfg.threads)
    recipe = Recipe(cfg.seed, num_tokens=cfg.num_tokens, long_tokens=cfg.long_tokens, batch_tokens=cfg.batch_tokens)
    pretrain(recipe, Path(cfg.out))
    print(f"model, tokenizer, recipe.json and pretrain.jsonl: {cfg.out}")


if __name__ == "__main__":
    command_line(main, ("out", "threads", "seed", "num_tokens", "long_tokens", "batch_tokens"))
