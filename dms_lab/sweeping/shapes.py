"""How large models are, as far as their cost goes, without their weights."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dms_lab.config import ModelConfig, TrainConfig

_QUERY_NORMS = ("qwen3", "gemma3", "olmo2")  # families whose queries and keys have norms of their own
_EMBEDDED = Path(__file__).parent.parent / "tiny" / "model"


@dataclass(frozen=True)
class Shape:
    """Parameters in all; layers; widths of the residual stream, of all queries, and of keys (as of values); KV heads.

    `mlp` is the inner width of the gated MLP; `tied`: the embeddings are the output head; `query_norm`: queries and keys
    have norms of their own.
    """

    num_parameters: float
    num_layers: int
    hidden: int
    query_width: int
    kv_width: int
    num_kv_heads: int
    mlp: int
    vocabulary: int
    tied: bool = False
    query_norm: bool = False

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embeddings, and as many again of an output head that is not tied to them."""
        return self.vocabulary * self.hidden

    @property
    def layer_parameters(self) -> float:
        """Parameters of one layer."""
        return (self.num_parameters - self.embedding_parameters * (1 if self.tied else 2)) / self.num_layers


# From the models' own config.json and cards.
_KNOWN = {
    "meta-llama/Llama-3.2-1B-Instruct": Shape(1.24e9, 16, 2048, 2048, 512, 8, 8192, 128256, True),
    "meta-llama/Llama-3.2-3B-Instruct": Shape(3.21e9, 28, 3072, 3072, 1024, 8, 8192, 128256, True),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": Shape(1.78e9, 28, 1536, 1536, 256, 2, 8960, 151936),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": Shape(7.62e9, 28, 3584, 3584, 512, 4, 18944, 152064),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": Shape(32.8e9, 64, 5120, 5120, 1024, 8, 27648, 152064),
    "Qwen/Qwen3-0.6B": Shape(0.6e9, 28, 1024, 2048, 1024, 8, 3072, 151936, True, True),
    "Qwen/Qwen3-1.7B": Shape(1.72e9, 28, 2048, 2048, 1024, 8, 6144, 151936, True, True),
    "Qwen/Qwen3-4B": Shape(4.02e9, 36, 2560, 4096, 1024, 8, 9728, 151936, True, True),
    "Qwen/Qwen3-8B": Shape(8.19e9, 36, 4096, 4096, 1024, 8, 12288, 151936, False, True),
}


def shape_of(model: ModelConfig) -> Shape | None:
    """The shape of a model by its hub id, by a config.json at hand, or by a size in its name; None if nothing tells it."""
    if model.path in _KNOWN:
        return _KNOWN[model.path]
    folder = _EMBEDDED if model.path == "embedded" else Path(model.path).expanduser()
    if (folder / "config.json").is_file():
        return _from_config(json.loads((folder / "config.json").read_text()))
    found = re.search(r"(\d+(?:\.\d+)?)[bB]\b", model.path)
    return _guessed(float(found[1]) * 1e9) if found else None


def _from_config(config: dict[str, Any]) -> Shape:
    """The shape of a dense decoder with gated MLPs by its config.json."""
    config = config.get("text_config") or config
    hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    head_dim, kv_heads = config.get("head_dim") or hidden // heads, config.get("num_key_value_heads") or heads
    query, kv = heads * head_dim, kv_heads * head_dim
    layer = hidden * (2 * query + 2 * kv) + 3 * hidden * config["intermediate_size"]
    tied = bool(config.get("tie_word_embeddings"))
    mlp, vocabulary = config["intermediate_size"], config["vocab_size"]
    num_parameters = layers * layer + vocabulary * hidden * (1 if tied else 2)
    has_query_norm = config.get("model_type", "").startswith(_QUERY_NORMS)
    return Shape(num_parameters, layers, hidden, query, kv, kv_heads, mlp, vocabulary, tied, has_query_norm)


def _guessed(num_parameters: float) -> Shape:
    """A usual shape for a number of parameters: 12 * layers * hidden**2 of them, hidden = 128 * layers."""
    layers = max(1, round((num_parameters / (12 * 128**2)) ** (1 / 3)))
    width = 128 * layers
    return Shape(num_parameters, layers, width, width, width // 4, 8, 3 * width, 131072, True)


def num_trained(config: TrainConfig, shape: Shape) -> float:
    """Trained parameters of a run, which its checkpoints hold in float32."""
    if config.trained == "all":
        return shape.num_parameters
    predictors = shape.num_layers * (shape.num_kv_heads * shape.hidden + shape.hidden)
    if config.trained == "adapter":
        return predictors
    widths = 2 * (shape.hidden + shape.query_width) + 2 * (shape.hidden + shape.kv_width)  # q and o, k and v
    return predictors + shape.num_layers * config.lora_rank * widths
