"""Which chains decode: they wait until places and pages are free; chains of one problem share the reading of its prompt.

    waiting -> a wave: the next ones, as many as there is room for, or one whose prompt is shared -> read -> Admitted
               pool empty: the wave goes back, and its chains are tried one by one     had the pool to itself: Refused

`Places` is what admission and decoding have in common. Shapes: n chains, V vocabulary, L layers, K KV heads.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dms_lab.cache.compact import CompactCache
from dms_lab.cache.pages import PoolExhausted
from dms_lab.chains import Chain, Settings, unfit

_WAVE_TOKENS = 16384  # of prompts that are read together, padding included


class Places:
    """The places of a cache: the chain that decodes in each, the chains that wait for one, the pages that they hold.

    The last place of the cache, number `settings.places`, is for a prompt that several chains share.
    """

    def __init__(self, cache: CompactCache, settings: Settings, num_heads: int, device: torch.device) -> None:
        self.cache, self.settings, self.num_heads, self.device = cache, settings, num_heads, device
        self.waiting: deque[Chain] = deque()
        self.active: dict[int, Chain] = {}
        self.shared: tuple[tuple, Tensor] | None = None  # the name of the prompt in the last place, and the logits after it
        self._num_admitted = 0

    def rows(self, places: Sequence[int]) -> Tensor:
        """Numbers of places as the cache takes them."""
        return torch.tensor(places, dtype=torch.long, device=self.device)

    def free(self) -> list[int]:
        """Numbers of the places that stand empty."""
        return sorted(set(range(self.settings.places)) - set(self.active))

    def num_fillable(self) -> int:
        """Empty places for which a chain is waiting."""
        return min(self.settings.places - len(self.active), len(self.waiting))

    def enter(self, chain: Chain) -> None:
        """Makes a chain that was read active, as the youngest."""
        self.active[chain.place] = chain
        self._num_admitted += 1
        chain.order = self._num_admitted

    def release(self, places: list[int]) -> None:
        """Empties places and gives their pages back."""
        if places and self.cache.layers:
            self.cache.release(self.rows(places))
        for place in places:
            self.active.pop(place, None)

    def drop_shared(self) -> None:
        """Empties the last place, if a prompt is in it."""
        if self.shared is not None:
            self.cache.release(self.rows([self.settings.places]))
            self.shared = None

    def clear(self) -> None:
        """Empties everything, a prompt half read included."""
        self.waiting.clear()
        self.active.clear()
        self.shared = None
        self.cache.release(self.rows(range(self.settings.places + 1)))

    # -- pages -------------------------------------------------------------------------------------------------------
    def lengths(self, places: list[int]) -> Tensor:
        """Slots on the device of the sequences in `places`, [n, L, K]."""
        self.cache.rows = self.rows(places)
        return self.cache.held_slots()

    def pages(self, places: list[int]) -> list[int]:
        """Pages that the sequences in `places` hold."""
        return (-(-self.lengths(places) // self.cache.page_size)).sum((1, 2)).tolist()

    def pages_of(self, num_tokens: int) -> int:
        """Pages of a sequence of which nothing is evicted."""
        return self.num_heads * -(-num_tokens // self.cache.page_size)

    def too_small(self, chain: Chain, needed: int) -> str:
        """Says that a chain would need `needed` pages or more although it had the pool to itself."""
        most = self.pages_of(len(chain.prompt.ids) + self.settings.max_new_tokens)
        return (
            f"a pool of {self.settings.num_pages} pages is too small for this sequence alone: within {len(chain.known)} "
            f"tokens it needs more than {needed - 1}; {most} are enough in any case ({self.cache.page_size} slots each)"
        )

    def make_room(self) -> None:
        """Sends the youngest chains back to waiting until the pool surely has what the next step can take."""
        pool = self.cache.pool
        if pool is None or pool.grows:
            return
        while len(self.active) > 1 or (self.active and self.shared is not None):
            needed = int((self.lengths([*self.active]) % self.cache.page_size == 0).sum())
            if pool.count_free() >= needed:
                break
            if self.shared is not None:
                self.drop_shared()
                continue
            youngest = max(self.active.values(), key=lambda chain: chain.order)
            youngest.pages = self.pages([youngest.place])[0]
            self.release([youngest.place])
            youngest.preemptions += 1
            self.waiting.appendleft(youngest)


@dataclass(frozen=True)
class Admitted:
    """Chains whose tokens are in their places now, and the logits [n, V] after them."""

    chains: list[Chain]
    logits: Tensor


@dataclass(frozen=True)
class Refused:
    """A chain that cannot run, and why, as a sentence."""

    chain: Chain
    reason: str


class Admission:
    """Fills empty places: `read(prompts, places)` puts tokens into places and returns the logits [n, V] after them.

    `replays`: what a chain said before it had to begin anew goes through decode steps again, so its prompt alone is read.
    `gathers`: prompts are read token by token, so that many together, while nobody waits, cost what one does.
    """

    def __init__(
        self,
        places: Places,
        model: PreTrainedModel,
        read: Callable[[list[list[int]], list[int]], Tensor],
        replays: bool,
        gathers: bool,
    ) -> None:
        self.places, self.settings, self.model = places, places.settings, model
        self._read, self._replays, self._gathers = read, replays, gathers
        self._unshared: set[tuple] = set()  # prompts of which two copies do not fit
        self._idle = 0  # steps that places stood empty with a prompt waiting, since the last was read
        self._at_once = _WAVE_TOKENS

    def admit(self) -> Iterator[Admitted | Refused]:
        """Reads waiting chains while there is room; what was admitted has to have entered before the next is asked for."""
        if self._gathers and self._is_too_early():
            return
        while self.places.waiting:
            wave = yield from self._next_wave()
            if not wave:
                return
            try:
                logits = self._logits(wave)
            except PoolExhausted as exhausted:
                yield from self._no_room(wave, exhausted)
                if self.places.active:
                    return
            else:
                self._at_once, self._idle = _WAVE_TOKENS, 0
                yield Admitted(wave, logits)

    def note_step(self) -> None:
        """Counts a decode step, for which places may have stood empty."""
        self._idle += self.places.num_fillable()

    def forget(self) -> None:
        """Ends a run: the next one knows nothing of its prompts and of its empty places."""
        self._unshared.clear()
        self._idle, self._at_once = 0, _WAVE_TOKENS

    def _is_too_early(self) -> bool:
        """Whether less than half of the places could be filled, and to have them empty has cost less so far than it would
        to let the active chains wait for a prompt: in steps of a chain."""
        active, free = self.places.active, self.places.num_fillable()
        if not (active and free) or 2 * free >= self.settings.places:
            return False
        return self._idle < len(self.places.waiting[0].known) * len(active)

    def _next_wave(self) -> Iterator[Refused]:
        """Takes the chains that are to be read together from waiting; one whose prompt is shared goes alone."""
        waiting, wave = self.places.waiting, []
        places = self.places.free()
        while waiting and places and self._has_room([*wave, waiting[0]]):
            chain = waiting[0]
            alone = self.settings.deterministic or self._shares_prompt(chain)
            longest = max(len(c.known) for c in [*wave, chain])
            if wave and (alone or longest * (len(wave) + 1) > self._at_once):
                break
            waiting.popleft()
            problem = unfit(chain.prompt, self.settings.max_new_tokens, self.model)
            if problem:
                yield Refused(chain, problem)
                continue
            chain.place, chain.admitted_at = places.pop(0), time.monotonic()
            wave.append(chain)
            if alone:
                break
        return wave

    def _has_room(self, chains: list[Chain]) -> bool:
        """Whether the pages that chains held, or that their prompts take uncompressed, are free beside the reserve."""
        pool = self.places.cache.pool
        if pool is None or pool.grows or not (self.places.active or chains[1:]):
            return True
        wanted = sum(chain.pages or self.places.pages_of(len(chain.known)) for chain in chains)
        return pool.count_free() >= wanted + self.settings.reserve * pool.num_pages

    def _no_room(self, wave: list[Chain], exhausted: PoolExhausted) -> Iterator[Refused]:
        """Prompts did not fit: they wait while others run, and one that had the pool to itself is refused."""
        places, last = [chain.place for chain in wave], self.settings.places
        held = sum(self.places.pages([*places, last]))
        self.places.release(places)
        had_company = self.places.active or self.places.shared is not None or len(wave) > 1
        if self.places.shared is not None:  # its prompt may fit once and not twice
            self._unshared.add(self.places.shared[0])
        self.places.drop_shared()
        self.places.release([last])  # what was read of it, if it did not fit there
        self._at_once = 0  # one by one, until one fits
        if not had_company:
            yield Refused(wave[0], self.places.too_small(wave[0], held + exhausted.needed))
            return
        if self.places.active and len(wave) == 1:
            wave[0].pages = held + exhausted.needed
        self.places.waiting.extendleft(reversed(wave))

    # -- shared prompts ----------------------------------------------------------------------------------------------
    def _logits(self, wave: list[Chain]) -> Tensor:
        """Puts the tokens of chains into their places; logits [n, V] after them."""
        chain, places = wave[0], self.places
        if len(wave) > 1 or not self._is_fresh(chain):
            return self._read([c.known for c in wave], [c.place for c in wave])
        last, name = self.settings.places, _name(chain)
        is_shared = self._is_followed(chain, 0) and name not in self._unshared
        if places.shared is None or places.shared[0] != name:
            if not is_shared:
                return self._read([chain.prompt.ids], [chain.place])
            places.drop_shared()
            places.shared = (name, self._read([chain.prompt.ids], [last]))
        logits = places.shared[1]
        places.cache.copy(places.rows([last]), places.rows([chain.place]))
        if not is_shared:
            places.drop_shared()
        return logits

    def _shares_prompt(self, chain: Chain) -> bool:
        """Whether the prompt of the first chain that waits is in the last place, or the next one waiting has the same."""
        if not self._is_fresh(chain) or _name(chain) in self._unshared:
            return False
        if self.places.shared is not None and self.places.shared[0] == _name(chain):
            return True
        return self._is_followed(chain, 1)

    def _is_followed(self, chain: Chain, index: int) -> bool:
        """Whether the chain at `index` of those waiting has the same prompt."""
        waiting = self.places.waiting
        return len(waiting) > index and _name(waiting[index]) == _name(chain)

    def _is_fresh(self, chain: Chain) -> bool:
        """Whether a chain's prompt alone is read, and not what it said before it had to begin anew."""
        return self._replays or not chain.ids


def _name(chain: Chain) -> tuple:
    """What chains that share a prompt have in common."""
    return chain.prompt.problem, tuple(chain.prompt.ids)
