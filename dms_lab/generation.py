"""Batched decoding over one page pool: a chain that ends makes room for the next at once.

    prompts -> waiting -> admitted when pages are free -> prefill (chains of one problem: once, then copied) -> decode steps
            -> sampler, stop rule -> Generated, pages given back         pool empty: the youngest chain goes back to waiting

A chain's random numbers depend on (seed, problem, chain) alone. With `deterministic`, every matrix keeps its shape (all
places decode in every step, prefill chunks are padded) and no operation mixes chains: on a CPU, a chain's tokens do not
depend, bit for bit, on what else is in the batch. Without it, only a near-tie that rounding flips may differ.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dms_lab.admission import Admission, Places, Refused
from dms_lab.attachment import Retrofit
from dms_lab.cache.compact import CompactCache
from dms_lab.cache.pages import PoolExhausted
from dms_lab.cache.policy import Policy, RankedRule, ReadingRule
from dms_lab.chains import Chain, Generated, Prompt, Settings, unfit
from dms_lab.decode_step import Ahead, DecodeStep
from dms_lab.sampling import Sampler, SamplingConfig, chain_generator
from dms_lab.structure import num_kv_heads, output_head

_ENTRY_BYTES = 8  # of a page in the table of pages


class Engine:
    """Runs chains through one retrofitted model and one pool; `run` may be called again, with the places empty then."""

    def __init__(
        self,
        handle: Retrofit,
        policy: Policy,
        settings: Settings,
        sampling: SamplingConfig,
        eos_ids: Iterable[int],
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.handle, self.settings, self.sampling, self.tokenizer = handle, settings, sampling, tokenizer
        self.sampler = Sampler(sampling, eos_ids, tokenizer)
        self.model, self.head = handle.model, output_head(handle.model)
        self.device = next(handle.model.parameters()).device
        self.cache = CompactCache(
            policy,
            settings.storage,
            settings.page_size,
            settings.num_pages,
            num_places=settings.places + 1,  # the last one holds the prompt that several chains share
            chunk=settings.prefill_chunk,
            apart=settings.deterministic,
            attention=settings.attention,
        )
        # Where a chunk of tokens is computed otherwise than one by one, what a chain said goes through decode steps again.
        self._replays = settings.deterministic or settings.storage != "model" or isinstance(policy, ReadingRule)
        # Prompts of a ranked rule are read token by token.
        gathers = isinstance(policy, RankedRule) and not settings.deterministic
        num_heads = sum(num_kv_heads(attention) for attention in handle.attentions)
        self.places = Places(self.cache, settings, num_heads, self.device)
        self._admission = Admission(self.places, self.model, self._forward_prompts, self._replays, gathers)
        self._ahead: Ahead | None = None
        if settings.step == "graph":
            self._ahead = Ahead(DecodeStep(handle, self.cache, self.sampler, settings.places), self.places)
        self._is_running = False
        self._started, self._num_generated = time.monotonic(), 0
        self._on_token: Callable[[Prompt, list[int]], None] | None = None

    @torch.no_grad()
    def run(
        self, prompts: Iterable[Prompt], on_token: Callable[[Prompt, list[int]], None] | None = None
    ) -> Iterator[Generated]:
        """Yields each chain as it ends. A chain that cannot run ends with `finish_reason="error"`; the others go on.

        `on_token` is called with a chain's prompt and ids after each new token. Raises `ValueError` while another run of
        this engine is open.
        """
        if self._is_running:
            raise ValueError("this engine is running already: exhaust or close that run first, or make another engine")
        self._is_running = True
        self._on_token, self._started, self._num_generated = on_token, time.monotonic(), 0
        self.places.waiting.extend(
            Chain(p, chain_generator(self.sampling.seed, p.problem, p.chain), self.sampler.stop_rule()) for p in prompts
        )
        try:
            while self.places.waiting or self.places.active:
                if not self.cache.secured:  # else no page was given back since chains were last admitted
                    yield from self._admit()
                yield from self._step() if self._ahead is None else self._step_ahead()
        finally:  # whatever ended the run
            self._admission.forget()
            self._is_running = False
            self.places.clear()
            if self._ahead is not None:
                self._ahead.clear()

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all chains of the newest run so far, by the time since it began."""
        return self._num_generated / max(1e-9, time.monotonic() - self._started)

    # -- prompts -----------------------------------------------------------------------------------------------------
    def _admit(self) -> Iterator[Generated]:
        """Fills empty places, and ends the chains that can never have one."""
        for found in self._admission.admit():
            if isinstance(found, Refused):
                yield self._ended(found.chain, "error", found.reason)
            else:
                yield from self._begin(found.chains, found.logits)

    def _begin(self, wave: list[Chain], logits: Tensor) -> Iterator[Generated]:
        """Makes chains that were read active and draws their next tokens."""
        held, ready = self._held([chain.place for chain in wave]), []
        for row, (chain, mine) in enumerate(zip(wave, held, strict=True)):
            self.places.enter(chain)
            chain.next = 0
            if self._replays and chain.ids:
                continue  # what it said goes through the same decode steps again
            # A chain that begins anew took its newest token in with the others: that stands for the step it missed.
            self._note(chain, mine, prefill=not chain.ids)
            chain.next = len(chain.ids)
            ready.append(row)
        if ready:
            yield from self._choose([wave[row] for row in ready], logits[ready])

    def _forward_prompts(self, prompts: list[list[int]], places: list[int]) -> Tensor:
        """Chunk by chunk, those that go on; logits [n, V] after the last token of each."""
        size, logits = self.settings.prefill_chunk, {}
        for start in range(0, max(map(len, prompts)), size):
            rows = [row for row, ids in enumerate(prompts) if len(ids) > start]
            chunks = [prompts[row][start : start + size] for row in rows]
            counts = torch.tensor([len(chunk) for chunk in chunks])
            width = size if self.settings.deterministic else max(map(len, chunks))
            ids = torch.tensor([chunk + [0] * (width - len(chunk)) for chunk in chunks], device=self.device)
            column = torch.arange(width)
            real = column < counts[:, None]
            positions = (start + torch.minimum(column, counts[:, None] - 1)).to(self.device)
            is_even = bool(real.all()) and not self.settings.deterministic
            mine, real = [places[row] for row in rows], None if is_even else real.to(self.device)
            hidden = self._forward(ids, positions, mine, real, is_prompt=True)
            for index, row in enumerate(rows):
                if len(prompts[row]) <= start + size:
                    logits[row] = self.head(hidden[index : index + 1, counts[index] - 1])
        return torch.cat([logits[row] for row in range(len(prompts))])

    def _forward(
        self, ids: Tensor, positions: Tensor, places: Sequence[int], real: Tensor | None, is_prompt: bool
    ) -> Tensor:
        """Last hidden states [R, C, hidden] of new tokens [R, C] for the sequences in `places`."""
        self.cache.rows, self.cache.reads_prompt = self.places.rows(places), is_prompt
        plan = self.handle.hard(self.cache, real)
        base = self.model.get_decoder()
        return base(
            input_ids=ids, position_ids=positions, past_key_values=self.cache, use_cache=True, dms=plan
        ).last_hidden_state

    # -- decoding ----------------------------------------------------------------------------------------------------
    def _step(self) -> Iterator[Generated]:
        """One token for every active chain."""
        self.places.make_room()
        active = self.places.active
        if not active:
            return
        self._admission.note_step()
        chains = [active[place] for place in sorted(active)]
        places, real = [chain.place for chain in chains], None
        if self.settings.deterministic:
            places = list(range(self.settings.places))
            real = torch.tensor([place in active for place in places], device=self.device)[:, None]
        rows = [places.index(chain.place) for chain in chains]
        ids = torch.zeros(len(places), 1, dtype=torch.long)
        positions = torch.zeros_like(ids)
        for row, chain in zip(rows, chains, strict=True):
            ids[row], positions[row] = chain.ids[chain.next], len(chain.prompt.ids) + chain.next
        try:
            hidden = self._forward(ids.to(self.device), positions.to(self.device), places, real, is_prompt=False)
        except PoolExhausted as exhausted:  # only a chain that had the pool to itself
            (chain,) = chains
            needed = self.places.pages([chain.place])[0] + exhausted.needed
            self.places.release(places)  # with `deterministic`, the empty ones took part
            yield self._ended(chain, "error", self.places.too_small(chain, needed))
            return
        logits = self.head(hidden[:, -1])[rows]
        again = [chain.next + 1 < len(chain.ids) for chain in chains]
        for chain, held, repeats in zip(chains, self._held([c.place for c in chains]), again, strict=True):
            chain.next += 1
            if not repeats:
                self._note(chain, held, prefill=False)
        fresh = [i for i, repeats in enumerate(again) if not repeats]
        if fresh:
            yield from self._choose([chains[i] for i in fresh], logits[fresh])

    def _step_ahead(self) -> Iterator[Generated]:
        """Launches a step for every active chain, and takes the tokens of the step before."""
        if not self._ahead.launch():
            yield from self._step()
            return
        page_bytes, row_bytes = self.cache.pool.page_bytes + _ENTRY_BYTES, self.cache.row_bytes
        for chain, found in self._ahead.landed():
            self._note(chain, (found.live, found.live, found.pages * page_bytes + row_bytes), prefill=False)
            yield from self._take(chain, found.token, found.is_sound)

    def _choose(self, chains: list[Chain], logits: Tensor) -> Iterator[Generated]:
        """Draws the next token of each chain, ends those that are done."""
        uniforms = [chain.draws.uniform(len(chain.ids)) for chain in chains]
        tokens, valid = self.sampler.choose(logits, [chain.known for chain in chains], uniforms)
        for chain, token, sound in zip(chains, tokens.tolist(), valid.tolist(), strict=True):
            yield from self._take(chain, token, sound)

    def _take(self, chain: Chain, token: int, is_sound: bool) -> Iterator[Generated]:
        """Gives a chain its next token, and ends it if it is done."""
        if not is_sound:
            place = f"token {len(chain.ids)} of chain {chain.prompt.chain}"
            sentence = f"the logits of {place} are not finite: look for an overflow in the model, or use another dtype"
            yield self._ended(chain, "error", sentence)
            return
        chain.ids.append(token)
        self._num_generated += 1
        if chain.first_token_after is None:
            chain.first_token_after = time.monotonic() - chain.admitted_at
        if self._on_token is not None:
            self._on_token(chain.prompt, chain.ids)
        verdict = chain.rule.check(chain.ids)
        if verdict is not None:
            yield self._ended(chain, verdict[0])
        elif len(chain.ids) >= self.settings.max_new_tokens:
            yield self._ended(chain, "length")

    def _ended(self, chain: Chain, reason: str, error: str | None = None) -> Generated:
        if self.places.active.get(chain.place) is chain:
            self.places.release([chain.place])
        trace = chain.tally.trace()
        return Generated(
            chain.ids,
            reason,
            trace.request(len(chain.prompt.ids)),
            chain.prompt.problem,
            chain.prompt.chain,
            chain.rule.text(chain.ids) if self.tokenizer is not None else "",
            chain.first_token_after,
            chain.preemptions,
            error,
            trace,
            time.monotonic() - chain.admitted_at if chain.admitted_at else 0.0,
        )

    # -- accounting --------------------------------------------------------------------------------------------------
    def _held(self, places: list[int]) -> list[tuple[float, float, int]]:
        """Of each sequence: live slots and slots read in a step, mean over layers and heads, and bytes."""
        slots, live, read = self.places.lengths(places), self.cache.live_slots(), self.cache.read_slots()
        pages = (-(-slots // self.cache.page_size)).sum((1, 2))
        held = pages * (self.cache.pool.page_bytes + _ENTRY_BYTES) + self.cache.row_bytes
        counts = (live.double().mean((1, 2)), read.double().mean((1, 2)), held)
        return list(zip(*(x.tolist() for x in counts), strict=True))

    @staticmethod
    def _note(chain: Chain, held: tuple[float, float, int], prefill: bool) -> None:
        chain.tally.note(held[0], held[2], None if prefill else held[1])


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a sequence, of the model's generation configuration and of the tokenizer."""
    ids = model.generation_config.eos_token_id
    found = {*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id}
    return sorted(found - {None})


def generate_greedy(
    model: PreTrainedModel,
    make_policy: Callable[[], Policy],
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    end_id: int,
    batch_size: int = 32,
) -> list[Generated]:
    """Continues every prompt greedily on a compact cache; returns results in the order of `prompts`.

    `model` must be retrofitted (a seam without predictor will do for policies without one). Raises `ValueError` for an
    empty prompt or one that, with `max_new_tokens`, exceeds the model's positions, before anything is generated.
    """
    wanted = [Prompt(index, list(ids)) for index, ids in enumerate(prompts)]
    for prompt in wanted:
        if problem := unfit(prompt, max_new_tokens, model):
            raise ValueError(problem)
    if not wanted:
        return []
    settings = Settings(max_new_tokens, min(batch_size, len(prompts)))
    engine = Engine(model.dms_retrofit, make_policy(), settings, SamplingConfig(), [end_id])
    results = {found.problem: found for found in engine.run(wanted)}
    for found in results.values():
        if found.error:
            raise ValueError(f"prompt {found.problem}: {found.error}")
    return [results[index] for index in range(len(prompts))]
