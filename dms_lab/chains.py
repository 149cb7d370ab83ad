"""What generation is asked and what it answers: prompts, settings, chains, results."""

from dataclasses import dataclass, field

from transformers import PreTrainedModel

from dms_lab.accounting import Request, Tally, Trace
from dms_lab.sampling import ChainGenerator, StopRule

STEPS = ("auto", "eager", "graph")


@dataclass(frozen=True)
class Prompt:
    """A problem to continue in one chain: its name, token ids, and which of its chains this is."""

    problem: int | str
    ids: list[int]
    chain: int = 0


@dataclass(frozen=True)
class Settings:
    """How chains are run. `places` decode together; `num_pages` of `page_size` slots and `attention` as in `CompactCache`.

    A chain is admitted while the pages that its prompt may need and the share `reserve` of the pool are free. `step`:
    "eager", the host follows every decode step; "graph", it launches them in a fixed form (`decode_step`, with
    attention="triton" alone); "auto" is eager, as no GPU was measured yet.
    """

    max_new_tokens: int = 1024
    places: int = 8
    num_pages: int | None = None
    page_size: int | None = None
    storage: str = "model"
    prefill_chunk: int = 256
    reserve: float = 0.05
    deterministic: bool = False
    attention: str = "auto"
    step: str = "auto"

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "places", "prefill_chunk", "num_pages", "page_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.step not in STEPS:
            raise ValueError(f"step={self.step!r} is not known; choose one of {', '.join(STEPS)}")
        if not 0 <= self.reserve < 1:
            raise ValueError(f"reserve={self.reserve} is a share of the pool; use 0 to below 1, 0.05 is usual")


@dataclass(frozen=True)
class Generated:
    """One answered chain.

    `finish_reason`: `eos`, `stop`, `length`, or `error` with the sentence in `error`. `seconds` and
    `seconds_to_first_token` count from its last admission. `preemptions`: how often it had to begin anew for want of pages;
    that work is not in `usage`. `trace`: what it held and read at every step.
    """

    ids: list[int]
    finish_reason: str
    usage: Request
    problem: int | str = 0
    chain: int = 0
    text: str = ""
    seconds_to_first_token: float | None = None
    preemptions: int = 0
    error: str | None = None
    trace: Trace | None = None
    seconds: float = 0.0


@dataclass
class Chain:
    """A chain, waiting or running: `place` is its row in the cache, `next` counts its ids that went through the model."""

    prompt: Prompt
    draws: ChainGenerator
    rule: StopRule
    ids: list[int] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    place: int = -1
    order: int = -1  # of admission
    next: int = 0  # how many of `ids` went through the model
    pages: int = 0  # held when last looked
    preemptions: int = 0
    admitted_at: float = 0.0
    first_token_after: float | None = None

    @property
    def known(self) -> list[int]:
        return self.prompt.ids + self.ids


def unfit(prompt: Prompt, max_new_tokens: int, model: PreTrainedModel) -> str | None:
    """Why a prompt cannot be continued, as a sentence; None if it can."""
    limit = model.config.get_text_config().max_position_embeddings
    if not prompt.ids:
        return f"prompt {prompt.problem} is empty; a prompt needs at least one token"
    size = model.get_input_embeddings().weight.shape[0]
    low, high = min(prompt.ids), max(prompt.ids)
    if low < 0 or high >= size:
        return f"prompt {prompt.problem} has token ids from {low} to {high}; the model knows 0 to {size - 1}"
    if len(prompt.ids) + max_new_tokens > limit:
        return (
            f"prompt {prompt.problem} has {len(prompt.ids)} tokens; with max_new_tokens={max_new_tokens} it exceeds the "
            f"model's {limit} positions: shorten it or lower max_new_tokens"
        )
    return None
