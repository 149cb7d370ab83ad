"""Batched decoding over one page pool: a chain that ends makes room for the next at once.

    prompts -> waiting -> admitted when pages are free -> prefill (chains of one problem: once, then copied) -> decode steps
            -> sampler, stop rule -> Generated, pages given back         pool empty: the youngest chain goes back to waiting

A chain's random numbers depend on (seed, problem, chain) alone. With `deterministic`, every matrix keeps its shape (all
places decode in every step, prefill chunks are padded) and no operation mixes chains: on a CPU, a chain's tokens do not
depend, bit for bit, on what else is in the batch. Without it, only a near-tie that rounding flips may differ.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dms_lab.attachment import Retrofit
from dms_lab.cache.compact import CompactCache
from dms_lab.cache.pages import PoolExhausted
from dms_lab.cache.policy import Policy, RankedRule, ReadingRule
from dms_lab.chains import Chain, Generated, Prompt, Settings, unfit
from dms_lab.sampling import Sampler, SamplingConfig, chain_generator
from dms_lab.structure import num_kv_heads, output_head

_ENTRY_BYTES = 8  # of a page in the table of pages
_WAVE_TOKENS = 16384  # of prompts that are prefilled together, padding included


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
        # Its prompts are read token by token: many together, while nobody waits, cost what one does.
        self._gathers = isinstance(policy, RankedRule) and not settings.deterministic
        self._num_heads = sum(num_kv_heads(attention) for attention in handle.attentions)
        self._is_running = False
        self._started, self._num_generated = time.monotonic(), 0
        self._unshared: set[tuple] = set()  # prompts of which two copies do not fit
        self._template: tuple[tuple, Tensor] | None = None  # the prompt in the last place, and the logits after it
        self._waiting: deque[Chain] = deque()
        self._active: dict[int, Chain] = {}
        self._num_admitted = 0
        self._idle = 0  # steps that places stood empty with a prompt waiting, since the last was read
        self._at_once = _WAVE_TOKENS
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
        self._waiting.extend(
            Chain(p, chain_generator(self.sampling.seed, p.problem, p.chain), self.sampler.stop_rule()) for p in prompts
        )
        try:
            while self._waiting or self._active:
                yield from self._admit()
                yield from self._step()
        finally:  # whatever ended the run, a prompt half read included
            self._waiting.clear()
            self._active.clear()
            self._unshared.clear()
            self._template, self._is_running = None, False
            self.cache.release(self._rows(range(self.settings.places + 1)))

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all chains of the newest run so far, by the time since it began."""
        return self._num_generated / max(1e-9, time.monotonic() - self._started)

    # -- admission ---------------------------------------------------------------------------------------------------
    def _admit(self) -> Iterator[Generated]:
        if self._gathers and self._is_too_early():
            return
        while self._waiting:
            wave = yield from self._next_wave()
            if not wave:
                return
            try:
                logits = self._prefilled(wave)
            except PoolExhausted as exhausted:
                yield from self._no_room(wave, exhausted)
                if self._active:
                    return
            else:
                self._at_once = _WAVE_TOKENS
                yield from self._begin(wave, logits)

    def _is_too_early(self) -> bool:
        """Whether less than half of the places could be filled, and to have them empty has cost less so far than it would
        to let the active chains wait for a prompt: in steps of a chain."""
        free = self._num_fillable()
        if not (self._active and free) or 2 * free >= self.settings.places:
            return False
        return self._idle < len(self._waiting[0].known) * len(self._active)

    def _num_fillable(self) -> int:
        """Empty places for which a chain is waiting."""
        return min(self.settings.places - len(self._active), len(self._waiting))

    def _next_wave(self) -> Iterator[Generated]:
        """Takes the chains that are to be prefilled together from waiting; one whose prompt is shared goes alone."""
        wave: list[Chain] = []
        places = sorted(set(range(self.settings.places)) - set(self._active))
        while self._waiting and places and self._has_room([*wave, self._waiting[0]]):
            chain = self._waiting[0]
            alone = self.settings.deterministic or self._shares_prompt(chain)
            longest = max(len(c.known) for c in [*wave, chain])
            if wave and (alone or longest * (len(wave) + 1) > self._at_once):
                break
            self._waiting.popleft()
            problem = unfit(chain.prompt, self.settings.max_new_tokens, self.model)
            if problem:
                yield self._ended(chain, "error", problem)
                continue
            chain.place, chain.admitted_at = places.pop(0), time.monotonic()
            wave.append(chain)
            if alone:
                break
        return wave

    def _begin(self, wave: list[Chain], logits: Tensor) -> Iterator[Generated]:
        """Makes prefilled chains active and draws their next tokens."""
        held = self._held([chain.place for chain in wave])
        self._idle, ready = 0, []
        for row, (chain, mine) in enumerate(zip(wave, held, strict=True)):
            self._active[chain.place] = chain
            self._num_admitted += 1
            chain.order, chain.next = self._num_admitted, 0
            if self._replays and chain.ids:
                continue  # what it said goes through the same decode steps again
            # A chain that begins anew took its newest token in with the others: that stands for the step it missed.
            self._note(chain, mine, prefill=not chain.ids)
            chain.next = len(chain.ids)
            ready.append(row)
        if ready:
            yield from self._choose([wave[row] for row in ready], logits[ready])

    def _shares_prompt(self, chain: Chain) -> bool:
        """Whether a chain's prompt is in the last place, or the next one waiting has the same."""
        name = (chain.prompt.problem, tuple(chain.prompt.ids))
        if not self._is_fresh(chain) or name in self._unshared:
            return False
        if self._template is not None and self._template[0] == name:
            return True
        return self._is_followed(chain, 1)

    def _is_followed(self, chain: Chain, index: int) -> bool:
        """Whether the chain at `index` of those waiting has the same prompt."""
        other = self._waiting[index].prompt if len(self._waiting) > index else None
        return other is not None and (other.problem, other.ids) == (chain.prompt.problem, chain.prompt.ids)

    def _is_fresh(self, chain: Chain) -> bool:
        """Whether a chain's prompt alone is prefilled, and not what it said before it had to begin anew."""
        return self._replays or not chain.ids

    def _has_room(self, chains: list[Chain]) -> bool:
        """Whether the pages that chains held, or that their prompts take uncompressed, are free beside the reserve."""
        pool = self.cache.pool
        if pool is None or pool.grows or not (self._active or chains[1:]):
            return True
        wanted = sum(chain.pages or self._pages_of(len(chain.known)) for chain in chains)
        return pool.count_free() >= wanted + self.settings.reserve * pool.num_pages

    def _pages_of(self, num_tokens: int) -> int:
        """Pages of a sequence of which nothing is evicted."""
        return self._num_heads * -(-num_tokens // self.cache.page_size)

    def _no_room(self, wave: list[Chain], exhausted: PoolExhausted) -> Iterator[Generated]:
        """Prompts did not fit: they wait while others run, and one that had the pool to itself is refused."""
        places = [chain.place for chain in wave]
        held = sum(self._pages([*places, self.settings.places]))
        self._release(places)
        had_company = self._active or self._template is not None or len(wave) > 1
        if self._template is not None:  # its prompt may fit once and not twice
            self._unshared.add(self._template[0])
        self._drop_template()
        self.cache.release(self._rows([self.settings.places]))
        self._at_once = 0  # one by one, until one fits
        if not had_company:
            yield self._ended(wave[0], "error", self._too_small(wave[0], held + exhausted.needed))
            return
        if self._active and len(wave) == 1:
            wave[0].pages = held + exhausted.needed
        self._waiting.extendleft(reversed(wave))

    def _too_small(self, chain: Chain, needed: int) -> str:
        most = self._pages_of(len(chain.prompt.ids) + self.settings.max_new_tokens)
        return (
            f"a pool of {self.settings.num_pages} pages is too small for this sequence alone: within {len(chain.known)} "
            f"tokens it needs more than {needed - 1}; {most} are enough in any case ({self.cache.page_size} slots each)"
        )

    # -- prefill -----------------------------------------------------------------------------------------------------
    def _prefilled(self, wave: list[Chain]) -> Tensor:
        """Puts the tokens of chains into their places; logits [n, V] after them."""
        chain = wave[0]
        if len(wave) > 1 or not self._is_fresh(chain):
            return self._forward_prompts([c.known for c in wave], [c.place for c in wave])
        last, name = self.settings.places, (chain.prompt.problem, tuple(chain.prompt.ids))
        is_shared = self._is_followed(chain, 0) and name not in self._unshared
        if self._template is None or self._template[0] != name:
            if not is_shared:
                return self._forward_prompts([chain.prompt.ids], [chain.place])
            self._drop_template()
            self._template = (name, self._forward_prompts([chain.prompt.ids], [last]))
        logits = self._template[1]
        self.cache.copy(self._rows([last]), self._rows([chain.place]))
        if not is_shared:
            self._drop_template()
        return logits

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
        self.cache.rows, self.cache.reads_prompt = self._rows(places), is_prompt
        plan = self.handle.hard(self.cache, real)
        base = self.model.get_decoder()
        return base(
            input_ids=ids, position_ids=positions, past_key_values=self.cache, use_cache=True, dms=plan
        ).last_hidden_state

    def _rows(self, places: Sequence[int]) -> Tensor:
        return torch.tensor(places, dtype=torch.long, device=self.device)

    # -- decoding ----------------------------------------------------------------------------------------------------
    def _step(self) -> Iterator[Generated]:
        """One token for every active chain."""
        self._make_room()
        if not self._active:
            return
        self._idle += self._num_fillable()
        chains = [self._active[place] for place in sorted(self._active)]
        places, real = [chain.place for chain in chains], None
        if self.settings.deterministic:
            places = list(range(self.settings.places))
            real = torch.tensor([place in self._active for place in places], device=self.device)[:, None]
        rows = [places.index(chain.place) for chain in chains]
        ids = torch.zeros(len(places), 1, dtype=torch.long)
        positions = torch.zeros_like(ids)
        for row, chain in zip(rows, chains, strict=True):
            ids[row], positions[row] = chain.ids[chain.next], len(chain.prompt.ids) + chain.next
        try:
            hidden = self._forward(ids.to(self.device), positions.to(self.device), places, real, is_prompt=False)
        except PoolExhausted as exhausted:  # only a chain that had the pool to itself
            (chain,) = chains
            needed = self._pages([chain.place])[0] + exhausted.needed
            self._release(places)  # with `deterministic`, the empty ones took part
            yield self._ended(chain, "error", self._too_small(chain, needed))
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

    def _make_room(self) -> None:
        """Sends the youngest chains back to waiting until the pool surely has what the next step can take."""
        pool = self.cache.pool
        if pool is None or pool.grows:
            return
        while len(self._active) > 1 or (self._active and self._template is not None):
            needed = self._most_new_pages([*self._active])
            if pool.count_free() >= needed:
                break
            if self._template is not None:
                self._drop_template()
                continue
            youngest = max(self._active.values(), key=lambda chain: chain.order)
            youngest.pages = self._pages([youngest.place])[0]
            self._release([youngest.place])
            youngest.preemptions += 1
            self._waiting.appendleft(youngest)

    def _choose(self, chains: list[Chain], logits: Tensor) -> Iterator[Generated]:
        """Draws the next token of each chain, ends those that are done."""
        uniforms = [chain.draws.uniform(len(chain.ids)) for chain in chains]
        tokens, valid = self.sampler.choose(logits, [chain.known for chain in chains], uniforms)
        for chain, token, sound in zip(chains, tokens.tolist(), valid.tolist(), strict=True):
            if not sound:
                place = f"token {len(chain.ids)} of chain {chain.prompt.chain}"
                sentence = f"the logits of {place} are not finite: look for an overflow in the model, or use another dtype"
                yield self._ended(chain, "error", sentence)
                continue
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
        if chain.place in self._active and self._active[chain.place] is chain:
            self._release([chain.place])
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

    # -- pages -------------------------------------------------------------------------------------------------------
    def _release(self, places: list[int]) -> None:
        if places and self.cache.layers:
            self.cache.release(self._rows(places))
        for place in places:
            self._active.pop(place, None)

    def _drop_template(self) -> None:
        if self._template is not None:
            self.cache.release(self._rows([self.settings.places]))
            self._template = None

    def _lengths(self, places: list[int]) -> Tensor:
        self.cache.rows = self._rows(places)
        return self.cache.held_slots()

    def _pages(self, places: list[int]) -> list[int]:
        """Pages that the sequences in `places` hold."""
        return (-(-self._lengths(places) // self.cache.page_size)).sum((1, 2)).tolist()

    def _most_new_pages(self, places: list[int]) -> int:
        return int((self._lengths(places) % self.cache.page_size == 0).sum())

    def _held(self, places: list[int]) -> list[tuple[float, float, int]]:
        """Of each sequence: live slots and slots read in a step, mean over layers and heads, and bytes."""
        slots, live, read = self._lengths(places), self.cache.live_slots(), self.cache.read_slots()
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
