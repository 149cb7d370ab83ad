"""How much of its KV cache can a language model learn to do without, and what does that cost in accuracy?

    handle = dms_lab.retrofit(model, dms_lab.DmsConfig(window=256))     a policy on any Hugging Face causal LM
    handle = dms_lab.load_checkpoint(folder, model)                     the same, trained
    model.generate(ids)                                                 decodes on a compact cache, which frees memory

The names load torch when first used, so that the commands' `--help` need not.
"""

_HOMES = {
    "retrofit": "attachment",
    "Retrofit": "attachment",
    "DmsConfig": "policies.dms",
    "CompactCache": "cache.compact",
    "MaskedCache": "cache.masked",
    "load_checkpoint": "checkpoint",
    "save_checkpoint": "checkpoint",
}
__all__ = [*_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'dms_lab' has no attribute {name!r}; it has {', '.join(_HOMES)}")
    from importlib import import_module

    return getattr(import_module(f"dms_lab.{_HOMES[name]}"), name)
