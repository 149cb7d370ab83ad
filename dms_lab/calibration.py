"""One checkpoint, many ratios: the threshold of the decisions is moved until a text is compressed as much as was asked for.

    documents -> hard forwards at a threshold -> live slots at their ends -> ratio; bisection over the threshold

What a checkpoint was trained for is a point on this dial. The ratio falls as the threshold rises, and what is evicted on
the way changes what later layers compute, so each threshold is measured by forwards of its own.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dms_lab.attachment import Retrofit
from dms_lab.cache.masked import MaskedCache

_log = logging.getLogger(__name__)
_FIRST_STEP = 2.0  # in units of the eviction logit; a trained scale of 100 spreads logits over some tens
_WIDEST = 4096.0
_FINEST = 1e-3


@dataclass(frozen=True)
class Setting:
    """Where the dial stands: the decision is `evict_logit > threshold`, and what that came to on the calibration text."""

    threshold: float
    measured_cr: float


@torch.inference_mode()
def measured_cr(handle: Retrofit, documents: Sequence[Sequence[int]]) -> float:
    """Tokens / live slots at the ends of the documents (rows of token ids), both summed; one forward a document."""
    device = handle.model.device
    tokens, live = 0, 0.0
    for ids in documents:
        cache = MaskedCache(handle.policy())
        row = torch.tensor([list(ids)], device=device)
        handle.model.get_decoder()(input_ids=row, past_key_values=cache, use_cache=True)
        tokens += len(ids)
        live += float(cache.live_slots().float().mean())
    return tokens / live


def dial(handle: Retrofit, documents: Sequence[Sequence[int]], cr: float, tolerance: float = 0.01) -> Setting:
    """Moves the threshold of every predictor until `documents` (rows of token ids) are compressed `cr` times.

    `cr` is full / kept at the ends of the documents, the window included, over all layers and KV heads. The handle keeps
    the new threshold, as its policy's `offset`; caches made before refuse to go on. `tolerance` is relative: a threshold
    that no decision lies near may leave more. That is logged as a warning, and so is a ratio above that of the threshold
    before: what was not learned to go goes then. Raises `ValueError` for a policy without
    predictors, no documents, or a ratio that no threshold reaches: the window alone keeps too much, or `cr` is below 1.
    """
    if not handle.predictors:
        raise ValueError("only a learned policy has a threshold to move; this model has no predictor")
    if not documents or not all(len(ids) for ids in documents):
        raise ValueError("a threshold is found on text: give at least one document with a token in it")
    before = handle.config.offset

    def at(threshold: float) -> float:
        handle.set_offset(before + threshold)
        return measured_cr(handle, documents)

    try:
        as_it_was = at(0.0)
        found = _search(at, cr, tolerance, _most(handle, documents))
    except BaseException:
        handle.set_offset(before)
        raise
    if abs(found.measured_cr / cr - 1) > tolerance:
        _log.warning(
            "cr=%g was not met: the nearest threshold compresses the calibration text %.3f times. Its decisions lie too "
            "close together; give more text, or take what was measured for what it is",
            cr,
            found.measured_cr,
        )
    if cr > as_it_was * (1 + tolerance):
        _log.warning(
            "cr=%g is above the %.2f times that this text is compressed without moving the threshold: what was not learned "
            "to go goes too, and accuracy falls (experiments/dial); ask for less, or train to a higher CR",
            cr,
            as_it_was,
        )
    return found


def _most(handle: Retrofit, documents: Sequence[Sequence[int]]) -> float:
    """The ratio of documents of which the window alone is kept."""
    return sum(map(len, documents)) / sum(min(len(ids), handle.config.window) for ids in documents)


def _search(at: Callable[[float], float], cr: float, tolerance: float, most: float) -> Setting:
    """The setting at which `at(threshold)`, which falls, is `cr`; `at` was called for it last."""
    too_much = (
        f"cr={cr:g} is out of reach on this text: full / kept is 1 or more, and below {most:.2f}, where nothing but the "
        "window is kept; ask for less, or give longer documents"
    )
    if not 1 <= cr < most:
        raise ValueError(too_much)
    low, found = _widened(at, -_FIRST_STEP, lambda ratio: ratio >= cr)
    if found < cr * (1 - tolerance):
        raise ValueError(too_much)
    high, _ = _widened(at, _FIRST_STEP, lambda ratio: ratio <= cr)
    while True:
        threshold = (low + high) / 2
        found = at(threshold)
        if abs(found / cr - 1) <= tolerance or high - low < _FINEST:
            return Setting(threshold, found)
        low, high = (threshold, high) if found > cr else (low, threshold)


def _widened(at: Callable[[float], float], step: float, is_beyond: Callable[[float], bool]) -> tuple[float, float]:
    """The first of step, 2 step, 4 step, ... whose ratio is beyond what is wanted (or the widest), and that ratio."""
    threshold = step
    while not is_beyond(ratio := at(threshold)) and abs(threshold) < _WIDEST:
        threshold *= 2
    return threshold, ratio
