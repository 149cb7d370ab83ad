"""Plain values to frozen dataclasses, each of the type that its field has; what is wrong is refused by the name of its key.

{"lr": 1, "betas": [0.9, 0.95]} -> build(schema, values, "model.") -> schema(lr=1.0, betas=(0.9, 0.95))
    and back: deciding(plain values) -> config_digest -> the name of what they decide
"""

import dataclasses
import difflib
import hashlib
import json
import math
import re
import types
from collections.abc import Collection, Mapping, Sequence
from typing import Any, get_args, get_origin, get_type_hints

_KINDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text, a number quoted"}


def check_overrides(overrides: Sequence[str], known: Sequence[str]) -> None:
    """Raises `ValueError` for the first `key=value` whose key is not `known`, with the nearest name and the valid ones.

    For `sys.argv[1:]`, before Hydra composes: Hydra refuses such a key too, but names no valid one. Flags and the `hydra`
    group are left to Hydra. A known `sizes.*` stands for all that `sizes` may hold. Of a key of a group, the group's are
    listed.
    """
    open_groups = tuple(name.removesuffix("*") for name in known if name.endswith(".*"))
    for word in overrides:
        key = word.lstrip("+~").partition("=")[0].partition("@")[0]
        if word.startswith("-") or "=" not in word or key in known or re.split("[./]", key)[0] == "hydra":
            continue
        if key.startswith(open_groups):
            continue
        group = [name for name in known if "." in key and name.startswith(key.partition(".")[0] + ".")]
        raise ValueError(_unknown(key, group or known))


def _unknown(key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"unknown key {key!r}{hint}; the valid keys are {', '.join(known)}"


def typed(key: str, value: Any, hint: Any) -> Any:
    """`value` as `hint` wants it: whole floats become ints, ints become floats, lists become tuples; else `ValueError`."""
    if get_origin(hint) is types.UnionType:
        return None if value is None else typed(key, value, get_args(hint)[0])
    if get_origin(hint) is tuple:
        inner, *others = get_args(hint)
        if not isinstance(value, list | tuple) or (others != [...] and len(value) != 1 + len(others)):
            size = "" if others == [...] else f" of {1 + len(others)}"
            raise ValueError(f"{key}={value!r} must be a list{size}, e.g. {key}=[...]; each member {_KINDS[inner]}")
        return tuple(typed(key, member, inner) for member in value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is float and is_number:
        return float(value)
    if hint is int and is_number and value == int(value):
        return int(value)
    if hint in (bool, str) and isinstance(value, hint):
        return value
    raise ValueError(f"{key}={value!r} must be {_KINDS[hint]}")


def build(schema: type, values: dict[str, Any], where: str) -> Any:
    """`schema` from plain values of the right types, groups built before; unknown and missing keys are refused by name."""
    fields = {f.name: f for f in dataclasses.fields(schema)}
    for name in sorted(set(values) - set(fields)):
        raise ValueError(_unknown(where + name, [where + known for known in sorted(fields)]))
    for name, f in fields.items():
        if name not in values and f.default is dataclasses.MISSING:
            raise ValueError(f"missing key {where + name!r}")
    hints = get_type_hints(schema)
    groups = {name for name, value in values.items() if dataclasses.is_dataclass(value)}  # built already
    return schema(**{n: v if n in groups else typed(where + n, v, hints[n]) for n, v in values.items()})


def deciding(values: Mapping[str, Any], never: Collection[str], unless: Mapping[str, Any]) -> dict[str, Any]:
    """The plain `values` that decide a result: without the keys `never`, and those as in `unless`.

    `unless` holds keys that came later, at the value that computes what was computed before they came: names do not change.
    """
    return {k: v for k, v in values.items() if k not in never and not (k in unless and v == unless[k])}


def config_digest(values: Mapping[str, Any]) -> str:
    """12 hex digits over plain `values`, in any order of keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
