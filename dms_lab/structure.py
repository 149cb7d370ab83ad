"""What a Hugging Face causal LM must look like to be retrofitted, read off its modules; what does not fit is refused.

model.get_decoder().layers[i] -> one softmax attention each (layer_idx, o_proj) -> query projection or norm
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def find_attentions(model: PreTrainedModel) -> list[nn.Module]:
    """The self-attention modules of a causal LM in layer order; raises `ValueError` where eviction would be wrong."""
    name = type(model).__name__
    config = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder model; DMS retrofits decoder-only models with one KV cache")
    if getattr(config, "kv_lora_rank", None):
        raise ValueError(f"{name} uses multi-head latent attention, which caches a shared latent: no KV head to evict in")
    if getattr(config, "num_kv_shared_layers", 0):
        raise ValueError(f"{name} shares keys and values between layers; one layer's eviction would change another's")
    layers = decoder_layers(model.get_decoder())
    found = [m for layer in layers for m in layer.modules() if hasattr(m, "layer_idx") and hasattr(m, "o_proj")]
    if len(found) != len(layers):
        kinds = sorted({type(layer).__name__ for layer in layers})
        raise ValueError(
            f"{name} has {len(layers)} decoder layers ({', '.join(kinds)}) but {len(found)} softmax attention modules; "
            "models with linear-attention, state-space or other layers without keys and values cannot be retrofitted"
        )
    if not getattr(type(model), "_supports_attention_backend", True):
        raise ValueError(f"{name} does not take registered attention functions in this version of transformers")
    return sorted(found, key=lambda attention: attention.layer_idx)


def num_kv_heads(attention: nn.Module) -> int:
    """KV heads of an attention module."""
    config = attention.config
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def output_head(model: PreTrainedModel):
    """The function from hidden states to logits, with the soft-cap or scale that some families apply to logits."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    cap = getattr(config, "final_logit_softcapping", None)
    divisor = getattr(config, "logits_scaling", None) or 1.0

    def logits(hidden: Tensor) -> Tensor:
        out = head(hidden) / divisor if divisor != 1.0 else head(hidden)
        return cap * torch.tanh(out / cap) if cap else out

    return logits


def decoder_layers(base: nn.Module) -> list[nn.Module]:
    """The decoder layers of a base model, in order; raises `ValueError` where there is no such list."""
    layers = getattr(base, "layers", None)
    if layers is None:
        raise ValueError(f"{type(base).__name__} has no list of decoder layers named `layers`; it cannot be retrofitted")
    return list(layers)


def query_source(attention: nn.Module) -> nn.Module:
    """The module whose output holds the queries before RoPE: the query norm where there is one, else the projection."""
    for name in ("q_norm", "q_proj", "qkv_proj"):
        if hasattr(attention, name):
            return getattr(attention, name)
    raise ValueError(f"{type(attention).__name__} has no query projection that the neuron predictor knows of")


def query_projection(attention: nn.Module) -> nn.Linear:
    """The linear layer whose first H * D outputs are the queries; a fused one holds keys and values behind them."""
    return attention.q_proj if hasattr(attention, "q_proj") else attention.qkv_proj


def projections(attention: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of an attention module by name: queries, keys, values and output."""
    return {name: module for name, module in attention.named_children() if isinstance(module, nn.Linear)}
