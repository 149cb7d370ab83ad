"""One decode step in a fixed form: static shapes, static tensors, and nothing that waits for the device.

    given [P, 4] -> ids, positions, real -> embedding, layers, head -> next token, what is held -> found [P, 4]
      ^ sent                                        ^ `token` [P] stays on the device: the next   | fetched while the next
                                                      step's id, where none is given              v step runs

All places decode in every step; `real` says which of them count. On CUDA the step is captured as a graph after two calls
that warm it up, and captured anew when a tensor that it knows by its address was replaced (a wider table, a larger pool);
on a CPU the same function is called. Room is made beforehand (`cache.fixed`). Opt-in: no GPU has been seen yet.
Shapes: P places, V vocabulary, L layers, K KV heads.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dms_lab.admission import Places
from dms_lab.attachment import Retrofit
from dms_lab.attention.kernels.device import current
from dms_lab.attention_function import sent
from dms_lab.cache import fixed
from dms_lab.cache.compact import CompactCache
from dms_lab.chains import Chain
from dms_lab.sampling import Sampler
from dms_lab.structure import output_head


class Given(NamedTuple):
    """What a place's step is given: an id (-1: the token that its last step chose), its position, a uniform number."""

    id: int
    position: int
    uniform: float = 0.0

    @classmethod
    def of(cls, chain: Chain) -> "Given":
        """What the next step of a chain takes, which knows its next id or has it in flight."""
        known = chain.ids[chain.next] if chain.next < len(chain.ids) else -1
        return cls(known, len(chain.prompt.ids) + chain.next, chain.draws.uniform(chain.next + 1))


class Found(NamedTuple):
    """What a place's step found: the next token, whether its logits were sound, live slots (mean over L, K), and pages."""

    token: int
    is_sound: bool
    live: float
    pages: int


class Flight:
    """What a step found, on its way to the host."""

    def __init__(self, found: Tensor) -> None:
        self._landed = torch.cuda.Event() if found.is_cuda else None
        self._host = torch.empty(found.shape, dtype=found.dtype, pin_memory=found.is_cuda)
        self._host.copy_(found, non_blocking=True)
        if self._landed is not None:
            self._landed.record(torch.cuda.current_stream(found.device))

    def read(self) -> list[Found]:
        """Waits for the step, not for what was launched after it; one for each place, of no meaning where none was real."""
        if self._landed is not None:
            self._landed.synchronize()
        return [Found(int(token), bool(sound), live, int(pages)) for token, sound, live, pages in self._host.tolist()]


class DecodeStep:
    """The steps of the leading `num_places` sequences of a cache. Raises `ValueError` where they cannot be fixed.

    `logits` [P, V] and `token` [P] are those of the newest step, on the device.
    """

    def __init__(self, handle: Retrofit, cache: CompactCache, sampler: Sampler, num_places: int) -> None:
        fixed.check(cache)
        sampler.check_draws()
        _check_rope(handle)
        self.handle, self.cache, self.sampler, self.num_places = handle, cache, sampler, num_places
        self.base, self.head = handle.model.get_decoder(), output_head(handle.model)
        device = next(handle.model.parameters()).device
        self.given = torch.zeros(num_places, 4, dtype=torch.float64, device=device)  # id, position, real, uniform
        self.found = torch.zeros(num_places, 4, dtype=torch.float64, device=device)  # as `Found`
        self.token = torch.zeros(num_places, dtype=torch.long, device=device)
        self.logits: Tensor | None = None
        self.num_captures = 0
        self.capture = captured if device.type == "cuda" else None
        self._replay: Callable[[], None] = self._run
        self._known: tuple | None = None  # the tensors that were captured
        self._secured: frozenset[int] = frozenset()  # the places for which room was made

    def is_ready(self, places: Sequence[int]) -> bool:
        """Whether there surely is room for one more token in each of `places`, as far as the host knows without a look."""
        return self.cache.secured > 0 and self._secured.issuperset(places)

    def make_ready(self, places: Sequence[int]) -> bool:
        """Makes room for more tokens in each of `places`; False if a pool of fixed size may not have it. Waits."""
        self._secured = frozenset(places)
        if not fixed.secure(self.cache, sorted(places), self.cache.page_size):
            return False
        if self.capture is not None and self._known != (known := self._tensors()):
            self._replay, self._known = self._run, None  # what the old graph holds is free before there is another
            self.given.zero_()  # no place is real: to warm up changes nothing
            with current(self.given.device):
                self._replay = self.capture(self._run)
            self._known = known
            self.num_captures += 1
        return True

    def launch(self, given: Mapping[int, Given]) -> Flight:
        """One token for each place that is named, which must be ready; the others stay as they are. Waits for nothing."""
        rows = [[0.0] * 4] * self.num_places
        for place, mine in given.items():
            rows[place] = [mine.id, mine.position, 1.0, mine.uniform]
        self.given.copy_(sent(torch.tensor(rows, dtype=torch.float64), self.given.device))
        with current(self.given.device):
            self._replay()
        fixed.noted(self.cache)
        return Flight(self.found)

    @torch.no_grad()
    def _run(self) -> None:
        """The step itself: from `given` and `token` to `found` and `token`."""
        ids, position, real, uniform = self.given.unbind(1)
        ids, position, real = torch.where(ids < 0, self.token, ids.long()), position.long(), real > 0
        with fixed.inside(self.cache, self.num_places):
            hidden = self.base(
                input_ids=ids[:, None],
                position_ids=position[:, None],
                past_key_values=self.cache,
                use_cache=True,
                dms=self.handle.hard(self.cache, real[:, None]),
            ).last_hidden_state
            held = self.cache.held_slots()
        self.logits = self.head(hidden[:, -1])
        token, sound = self.sampler.draw(self.logits, uniform)
        self.token.copy_(torch.where(real, token, self.token))
        pages = (-(-held // self.cache.page_size)).sum((1, 2))
        self.found.copy_(torch.stack([token.double(), sound.double(), held.double().mean((1, 2)), pages.double()], 1))

    def _tensors(self) -> tuple:
        """What a graph knows: tensors by address and shape, and the thresholds of the decisions."""
        model = self.handle.model
        tensors = [*fixed.tensors(self.cache), *model.parameters(), *model.buffers()]
        return self.handle.config, *((x.data_ptr(), x.shape) for x in tensors)


class Ahead:
    """Steps of the active chains, launched one ahead of what the host has read, so that the device has work meanwhile.

    What a step finds for a chain that ended in the one before is dropped, with the pages of that chain.
    """

    def __init__(self, step: DecodeStep, places: Places) -> None:
        self.step, self.places = step, places
        self._in_flight: deque[tuple[list[tuple[Chain, int]], Flight]] = deque()
        self._most = 0  # steps that may stay in flight now

    def clear(self) -> None:
        """Forgets what is in flight."""
        self._in_flight.clear()

    def launch(self) -> bool:
        """Launches a step for every active chain that goes on, with room made for it where that is in doubt.

        False: so near to the end of a pool of fixed size, the host has to see what each token takes; nothing is in flight.
        """
        chains = self._unfinished()
        self._most = 1 if chains else 0
        if chains and not self.step.is_ready([chain.place for chain in chains]):
            if self._in_flight:  # what has ended makes room first
                self._most = 0
                return True
            self.places.make_room()
            chains = self._unfinished()
            if not self.step.make_ready([chain.place for chain in chains]):
                return False
        if chains:
            given = {chain.place: Given.of(chain) for chain in chains}
            for chain in chains:
                chain.next += 1
            self._in_flight.append(([(chain, chain.next) for chain in chains], self.step.launch(given)))
        return True

    def landed(self) -> Iterator[tuple[Chain, Found]]:
        """What the steps before found for the chains that are still active and did not know that token already."""
        while len(self._in_flight) > self._most:
            chains, flight = self._in_flight.popleft()
            found = flight.read()
            for chain, count in chains:
                is_known = count < len(chain.ids)  # what it said before it had to begin anew
                if self.places.active.get(chain.place) is chain and not is_known:
                    yield chain, found[chain.place]

    def _unfinished(self) -> list[Chain]:
        """The active chains that will go on for all that is known before what is in flight has landed."""
        most = self.places.settings.max_new_tokens
        return [chain for chain in self.places.active.values() if chain.next + 1 < most]


def captured(run: Callable[[], None]) -> Callable[[], None]:
    """`run` as a CUDA graph: called twice to warm up (kernels are compiled then), captured, to be replayed."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may do what they like
        run()
    return graph.replay


def _check_rope(handle: Retrofit) -> None:
    config = handle.model.config.get_text_config()
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise ValueError(f"step=graph takes no rope_type={kind}, whose frequencies go by the positions: use step=eager")
