"""Which token a chain takes next.

    logits [R, V] -> penalty, temperature, top-k, top-p, min-p -> inverse CDF at a chain's own uniform -> tokens [R]

A chain's token is a function of its logits, its tokens so far and its uniform, and a uniform is a function of (seed,
problem, chain, step). Shapes: R rows (running chains), V vocabulary.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from dms_lab.sampling.config import SamplingConfig, is_int
from dms_lab.sampling.stopping import StopRule, id_set

# Probabilities are whole multiples of 2^-43 of the likeliest token's. Sums of whole numbers do not depend on the order of
# adding, so neither a batch nor a device changes what is drawn; 2^19 tokens' worth of them fit in an int64.
_LIKELIEST, _MOST_TOKENS = 2**43, 2**19


@dataclass(frozen=True)
class ChainGenerator:
    """The random numbers of one chain: SHA-256 in counter mode, so that no draw depends on another having been made."""

    key: bytes

    def uniform(self, step: int) -> float:
        """The uniform number of token `step` (0 is the first generated one), a multiple of 2^-53 in [0, 1)."""
        digest = hashlib.sha256(self.key + step.to_bytes(8, "big")).digest()
        return (int.from_bytes(digest[:8], "big") >> 11) * 2.0**-53


def chain_generator(seed: int, problem: int | str, chain: int) -> ChainGenerator:
    """The numbers of chain `chain` of a problem: equal in every process, and other for any other of the three.

    The problems 1 and "1" are two problems.
    """
    if not (is_int(seed) and (is_int(problem) or isinstance(problem, str)) and is_int(chain)):
        raise ValueError(
            f"seed={seed!r}, problem={problem!r}, chain={chain!r} do not name a chain: seed and chain must be of type int, "
            "problem of type int or str; convert other integers with int()"
        )
    return ChainGenerator(hashlib.sha256(json.dumps([seed, problem, chain]).encode()).digest())


class Sampler:
    """Chooses the next token of every running chain, and makes the rules that end them.

    Raises `ValueError` if `config` asks for texts to stop at and there is no tokenizer.
    """

    def __init__(
        self, config: SamplingConfig, eos_ids: Iterable[int], tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        self.config = config
        self.eos_ids = id_set(eos_ids)
        self.tokenizer = tokenizer
        self.stop_rule()  # what no rule can follow fails here, before anything is generated
        self._processors = []  # in the order of transformers' `generate`; each works by element or takes maxima
        if config.repetition_penalty != 1:
            self._processors.append(RepetitionPenaltyLogitsProcessor(float(config.repetition_penalty)))
        if config.temperature not in (0, 1):
            self._processors.append(TemperatureLogitsWarper(float(config.temperature)))
        if config.temperature and config.top_k:
            self._processors.append(TopKLogitsWarper(config.top_k))

    def stop_rule(self) -> StopRule:
        """A fresh rule for one chain."""
        return StopRule(self.config, self.eos_ids, self.tokenizer)

    @torch.no_grad()
    def choose(
        self, logits: Tensor, histories: Sequence[Sequence[int]], uniforms: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """The next token of every row and whether the row is sound: tokens [R] long, valid [R] bool, on the logits' device.

        `logits` [R, V] of any floating dtype, computed on in float32, not changed. `histories`: R lists of the tokens so
        far, prompt included, of any lengths. `uniforms`: R numbers in [0, 1), not read if greedy. A row depends, bit for
        bit, on its own logits, history and uniform alone. A row with NaN or +inf, or with nothing but -inf, is not valid;
        its token is 0 and means nothing. A token of probability 0, or of at most 2^-44 of the likeliest, is never chosen.
        """
        _check_rows(logits, histories, uniforms)
        drawn = torch.tensor([float(x) for x in uniforms], dtype=torch.float64, device=logits.device)
        return self._chosen(logits, self._context(histories, logits), drawn)

    def check_draws(self) -> None:
        """Raises `ValueError` unless `draw` can choose as this configuration says."""
        if self.config.repetition_penalty != 1:
            raise ValueError(
                f"step=graph chooses tokens on the device, where a chain's past is not known: repetition_penalty="
                f"{self.config.repetition_penalty} needs step=eager"
            )

    @torch.no_grad()
    def draw(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """As `choose`, to the bit, for `uniforms` [R] in float64 on the logits' device; checks and waits for nothing."""
        return self._chosen(logits, None, uniforms)

    def _chosen(self, logits: Tensor, context: Tensor | None, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.float()
        for process in self._processors:
            scores = process(context, scores)
        top = scores.amax(-1)  # NaN where a row has one
        valid = top.isfinite()
        if not self.config.temperature:
            return scores.argmax(-1).masked_fill(~valid, 0), valid
        tokens = self._drawn(scores.masked_fill(~valid[:, None], 0.0), uniforms)
        return tokens.masked_fill(~valid, 0), valid

    def _context(self, histories: Sequence[Sequence[int]], logits: Tensor) -> Tensor:
        """Token ids [R, longest], padded with V, which the penalty drops; [R, 0] where nothing reads them."""
        num_rows, size = logits.shape
        if self.config.repetition_penalty == 1:
            histories = [()] * num_rows
        context = torch.full((num_rows, max(map(len, histories), default=0)), size, dtype=torch.long)
        for row, history in enumerate(histories):
            context[row, : len(history)] = torch.as_tensor(history, dtype=torch.long)
        return context.to(logits.device)

    def _drawn(self, scores: Tensor, uniforms: Tensor) -> Tensor:
        """The first tokens [R] of `scores` [R, V] with a cumulative probability above `uniforms` [R]; waits for nothing."""
        if scores.shape[1] > _MOST_TOKENS:
            raise ValueError(f"tokens are drawn from at most {_MOST_TOKENS}, not from a vocabulary of {scores.shape[1]}")
        weights = scores.double()  # a copy: in place from here on, [R, V] is large
        weights = weights.sub_(weights.amax(-1, keepdim=True)).exp_().mul_(_LIKELIEST).round_().long()
        if self.config.top_p < 1:
            weights.masked_fill_(_unlikely(scores, weights, self.config.top_p), 0)
        if self.config.min_p:
            weights.masked_fill_(weights < round(self.config.min_p * _LIKELIEST), 0)
        cumulative = weights.cumsum_(-1)
        total = cumulative[:, -1:]
        threshold = (uniforms[:, None] * total).long().minimum(total - 1)  # rounding reaches the total just below 1
        return torch.searchsorted(cumulative, threshold, right=True)[:, 0]


def _unlikely(scores: Tensor, weights: Tensor, top_p: float) -> Tensor:
    """False [R, V] for the fewest tokens, likeliest first, of at least `top_p` of a row's weight; of equals, the first."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    ordered = weights.gather(-1, order)
    cumulative = ordered.cumsum(-1)
    dropped = cumulative - ordered >= (top_p * cumulative[:, -1:]).ceil().long()
    return torch.empty_like(dropped).scatter_(-1, order, dropped)


def _check_rows(logits: Tensor, histories: Sequence[Sequence[int]], uniforms: Sequence[float]) -> None:
    if logits.dim() != 2 or not logits.is_floating_point() or not logits.shape[1]:
        raise ValueError(
            f"logits have shape {list(logits.shape)} and dtype {logits.dtype}; expected floating point [rows, vocabulary], "
            "e.g. output.logits[:, -1]"
        )
    if not len(histories) == len(uniforms) == len(logits):
        raise ValueError(
            f"logits have {len(logits)} rows, but there are {len(histories)} histories and {len(uniforms)} uniforms; "
            "give one of each per row"
        )
    for row, uniform in enumerate(uniforms):
        if not 0 <= uniform < 1:
            raise ValueError(f"uniform {row} is {float(uniform)}; uniforms are at least 0 and below 1")
