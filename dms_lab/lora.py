"""LoRA on the attention projections (Hu et al. 2021), by peft: the middle way between predictors alone and all weights.

Injected in place and switched with eviction, so that the same module is teacher (off) and student (on).
"""

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from dms_lab.structure import projections


def attach_lora(model: PreTrainedModel, attentions: Sequence[nn.Module], rank: int, alpha: float) -> list[nn.Module]:
    """Adds trainable low-rank updates, in float32 and zero at first, to the projections; returns the wrapped layers."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    wanted = {id(linear) for attention in attentions for linear in projections(attention).values()}
    names = [name for name, module in model.named_modules() if id(module) in wanted]
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=names), model)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable.get(name.replace(".base_layer", ""), True))  # peft froze the base
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    return layers


def switch_lora(layers: Sequence[nn.Module], on: bool) -> None:
    """The wrapped layers compute with their updates, or as they did before they were wrapped."""
    for layer in layers:
        if layer.disable_adapters is on:
            layer.enable_adapters(on)


def detach_lora(attentions: Sequence[nn.Module]) -> None:
    """Puts the original layers back in the place of the wrapped ones."""
    from peft.tuners.lora import LoraLayer

    for attention in attentions:
        for name, module in list(attention.named_children()):
            if isinstance(module, LoraLayer):
                setattr(attention, name, module.get_base_layer())
