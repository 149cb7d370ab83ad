"""Slots and pages against a model in a few lines of Python; what quantised storage errs."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dms_lab.cache.pages import PagePool, PoolExhausted
from dms_lab.cache.slots import SlotTable
from dms_lab.cache.storage import FORMATS, SlotStore

K = 2
CPU = torch.device("cpu")
BOOLS = st.tuples(st.booleans(), st.booleans())


class Row:
    """A sequence as the visibility rule has it: what each token holds and decided, per head."""

    def __init__(self):
        self.content, self.flags = [], []
        self.dead = [set() for _ in range(K)]  # by choice of a ranked rule
        self.pending = [None] * K  # the token that the next one replaces
        self.tail, self.has_freed = 0, False

    def twin(self):
        other = Row()
        other.content, other.flags, other.tail = list(self.content), list(self.flags), self.tail
        other.dead, other.pending = [set(d) for d in self.dead], list(self.pending)
        other.has_freed = self.has_freed
        return other

    def live(self, rule, head, num_tokens=None):
        """The tokens that the newest of `num_tokens` sees."""
        n = len(self.content) if num_tokens is None else num_tokens
        seen = set()
        for j in range(n):
            decider = j + rule["shift"]
            evict = rule["window"] is not None and decider < n and self.flags[decider][head]
            old = rule["window"] is not None and n - 1 - j >= rule["window"]
            outside = rule["sliding"] is not None and n - 1 - j >= rule["sliding"]
            if not (evict and old) and not outside and j not in self.dead[head]:
                seen.add(j)
        return seen

    def append(self, rule, content, flags):
        before = [self.live(rule, head) for head in range(K)]
        self.content += content
        self.flags += flags
        for head in range(K):
            if self.pending[head] is not None:
                self.dead[head].add(self.pending[head])
                self.pending[head] = None
            fresh = set(range(len(self.content) - len(content), len(self.content)))
            self.has_freed |= not before[head] | fresh <= self.live(rule, head)


class SlotMachine(RuleBasedStateMachine):
    """Two layers on one pool. A token's key is a number of its own, its value that number negative, its weight as well."""

    @initialize(
        window=st.one_of(st.none(), st.integers(1, 5)),
        decided_by=st.sampled_from(["self", "next", "delayed"]),
        sliding=st.one_of(st.none(), st.none(), st.integers(1, 6)),
        page_size=st.integers(1, 4),
        num_pages=st.sampled_from([None, None, 8, 20]),
        places=st.integers(1, 3),
    )
    def begin(self, window, decided_by, sliding, page_size, num_pages, places):
        shift = {"self": 0, "next": 1, "delayed": window}[decided_by] if window else 0
        self.rule_ = {"window": window, "shift": shift, "sliding": sliding}
        self.pool = PagePool(1, 1, torch.float64, CPU, page_size, num_pages, track_weight=True)
        self.tables = [SlotTable(self.pool, places, K, window, shift, sliding) for _ in range(2)]
        self.rows = [[Row() for _ in range(places)] for _ in range(2)]
        self.count = 0

    def fresh(self, number):
        self.count += number * K
        start = self.count - number * K + 1
        return [[float(start + K * i + head) for head in range(K)] for i in range(number)]

    def restrict(self, layer, draw):
        """Some of the places, in any order; the model's rows of them."""
        places = len(self.rows[layer])
        chosen = draw(st.one_of(st.none(), st.lists(st.integers(0, places - 1), min_size=1, max_size=places, unique=True)))
        self.tables[layer].rows = None if chosen is None else torch.tensor(chosen)
        return self.rows[layer] if chosen is None else [self.rows[layer][i] for i in chosen]

    # -- rules -------------------------------------------------------------------------------------------------------
    @rule(layer=st.integers(0, 1), data=st.data())
    def append_one(self, layer, data):
        table, rows = self.tables[layer], self.restrict(layer, data.draw)
        real = data.draw(st.one_of(st.none(), st.lists(st.booleans(), min_size=len(rows), max_size=len(rows))))
        flags = [data.draw(BOOLS) for _ in rows]
        has_flags = table.window is not None
        content = self.fresh(len(rows))
        position = table.get("seen").clone()
        try:
            address = table.append_one(
                torch.tensor(flags) if has_flags else None, None if real is None else torch.tensor(real)
            )
        except PoolExhausted:
            return
        key = torch.tensor(content).double().flatten()[:, None]
        self.pool.write(address.flatten(), key, -key, position[:, None].expand(address.shape).flatten(), one_a_page=True)
        self.pool.weight.view(-1)[address.flatten()] = key[:, 0].float()
        if not has_flags:  # a ranked rule chooses anew after every token
            is_token = torch.ones(len(rows), dtype=torch.bool) if real is None else torch.tensor(real)
            table.put("victim", table.get("victim").masked_fill(is_token[:, None], -1))
        for i, row in enumerate(rows):
            if real is None or real[i]:
                row.append(self.rule_, [content[i]], [flags[i]])
                row.tail += 1
            else:
                row.tail = 0

    @rule(layer=st.integers(0, 1), columns=st.integers(1, 9), data=st.data())
    def append_chunk(self, layer, columns, data):
        table, rows = self.tables[layer], self.restrict(layer, data.draw)
        if any(token is not None for row in rows for token in row.pending):
            return  # a ranked rule that has to choose goes token by token
        counts = data.draw(st.lists(st.integers(0, columns), min_size=len(rows), max_size=len(rows)))
        flags = data.draw(
            st.lists(st.lists(BOOLS, min_size=columns, max_size=columns), min_size=len(rows), max_size=len(rows))
        )
        content = [self.fresh(columns) for _ in rows]
        key = torch.tensor(content).double().transpose(1, 2)[..., None]
        evict = torch.tensor(flags).transpose(1, 2) if table.window is not None else None
        try:
            table.append_chunk(key, -key, evict, torch.tensor(counts))
        except PoolExhausted:
            return
        real = torch.arange(columns) >= columns - torch.tensor(counts)[:, None]
        table.note_columns(None if bool(real.all()) else real, columns)
        for row, count, mine, decided in zip(rows, counts, content, flags, strict=True):
            row.append(self.rule_, mine[:count], [tuple(f) for f in decided[:count]])
            row.tail = row.tail + count if count == columns else count
        self.weigh(layer, {x for row in content for token in row for x in token})

    def weigh(self, layer, fresh):
        """Gives the slots of the tokens `fresh` their weight, as attention does after a chunk."""
        weight, key = self.pool.weight.view(-1), self.pool.key.data.view(-1)
        for i in range(len(self.rows[layer])):
            for head in range(K):
                for address in self.addresses(layer, i, head):
                    if key[address].item() in fresh:
                        assert weight[address] == 0, "a slot begins without weight"
                        weight[address] = key[address].float()

    @precondition(lambda self: self.rule_["window"] is None and self.rule_["sliding"] is None)
    @rule(layer=st.integers(0, 1), data=st.data())
    def choose_victims(self, layer, data):
        """As a ranked rule does once its budget is reached."""
        for i, row in enumerate(self.rows[layer]):
            for head in range(K):
                held = self.addresses(layer, i, head)
                if held and row.pending[head] is None:
                    slot = data.draw(st.one_of(st.just(-1), st.integers(0, len(held) - 1)))
                    self.tables[layer].victim[i, head] = slot
                    row.pending[head] = int(self.pool.position.view(-1)[held[slot]]) if slot >= 0 else None

    @rule(layer=st.integers(0, 1), data=st.data())
    def finish(self, layer, data):
        place = data.draw(st.integers(0, len(self.rows[layer]) - 1))
        before, held = self.pool.count_free(), sum(len(self.pages(layer, place, head)) for head in range(K))
        self.tables[layer].release(torch.tensor([place]))
        assert self.pool.count_free() == before + held, "pages come back at once"
        self.rows[layer][place] = Row()

    @rule(layer=st.integers(0, 1), data=st.data())
    def copy(self, layer, data):
        rows = self.rows[layer]
        empty = [i for i, row in enumerate(rows) if not row.content]
        full = [i for i, row in enumerate(rows) if row.content]
        if empty and full:
            source = data.draw(st.sampled_from(full))
            try:
                self.tables[layer].copy(torch.tensor([source] * len(empty)), torch.tensor(empty))
            except PoolExhausted:
                return
            for target in empty:
                rows[target] = rows[source].twin()

    @rule(layer=st.integers(0, 1), data=st.data())
    def select(self, layer, data):
        """As beam search, `num_return_sequences` and a batch that loses its finished sequences do."""
        rows = self.rows[layer]
        chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=3))
        self.tables[layer].rows = None
        try:
            self.tables[layer].select(torch.tensor(chosen))
        except PoolExhausted:
            return
        self.rows[layer] = [rows[i].twin() for i in chosen]

    @rule(layer=st.integers(0, 1), count=st.integers(1, 6))
    def crop(self, layer, count):
        rows = self.rows[layer]
        enough = all(row.tail >= count for row in rows)
        pending = any(token is not None for row in rows for token in row.pending)
        can_be_undone = enough and all(
            row.live(self.rule_, head, len(row.content) - count) <= row.live(self.rule_, head)
            for row in rows
            for head in range(K)
        )
        try:
            self.tables[layer].crop(count)
        except ValueError:
            has_to = enough and not pending and not any(row.has_freed for row in rows)
            assert not has_to, "nothing was freed, so everything can be undone"
            return
        assert can_be_undone
        assert not pending
        for row in rows:
            del row.content[-count:], row.flags[-count:]
            row.tail -= count

    # -- what always holds -------------------------------------------------------------------------------------------
    def pages(self, layer, row, head):
        table = self.tables[layer]
        number = -(-int(table.length[row, head]) // self.pool.page_size)
        return table.table[row, head, :number].tolist()

    def addresses(self, layer, row, head):
        size, pages = self.pool.page_size, self.pages(layer, row, head)
        return [pages[s // size] * size + s % size for s in range(int(self.tables[layer].length[row, head]))]

    @invariant()
    def every_slot_holds_its_token(self):
        for layer, rows in enumerate(self.rows):
            assert self.tables[layer].seen.tolist() == [len(row.content) for row in rows]
            for i, row in enumerate(rows):
                for head in range(K):
                    held = self.addresses(layer, i, head)
                    position = self.pool.position.view(-1)[held].tolist()
                    assert sorted(position) == sorted(row.live(self.rule_, head)), "kept + window, each once"
                    wanted = [row.content[j][head] for j in position]
                    assert self.pool.key.data.view(-1)[held].tolist() == wanted
                    assert self.pool.value.data.view(-1)[held].tolist() == [-x for x in wanted]
                    assert self.pool.weight.view(-1)[held].tolist() == wanted

    @invariant()
    def no_page_is_lost_and_none_is_in_two_hands(self):
        held = [
            page
            for layer, rows in enumerate(self.rows)
            for row in range(len(rows))
            for head in range(K)
            for page in self.pages(layer, row, head)
        ]
        num_free = int(self.pool._num_free)
        free = self.pool._free[:num_free].tolist()
        assert sorted(held + free) == list(range(1, self.pool.num_pages + 1))
        assert self.pool._surely_free <= num_free

    @invariant()
    def bytes_are_as_accounted(self):
        pool = self.pool
        tensors = [pool.key.data, pool.value.data, pool.position, pool.weight]
        assert pool.allocated_bytes == sum(x.untyped_storage().nbytes() for x in tensors)
        assert pool.allocated_bytes == (pool.num_pages + 1) * pool.page_size * (8 + 8 + 4 + 4)
        for table in self.tables:
            names = ("table", "length", "seen", "ring_slot", "ring_flag", "victim", "freed_at", "tail")
            assert table.nbytes == sum(getattr(table, name).untyped_storage().nbytes() for name in names)

    def teardown(self):
        for layer, rows in enumerate(getattr(self, "rows", [])):
            self.tables[layer].release(torch.arange(len(rows)))
        if hasattr(self, "pool"):
            assert self.pool.count_free() == self.pool.num_pages
            self.pool.shrink()
            assert self.pool.num_pages == (0 if self.pool.grows else self.pool.count_free())


TestSlots = SlotMachine.TestCase
TestSlots.settings = settings(max_examples=120, stateful_step_count=25, deadline=None)


@settings(deadline=None, max_examples=80)
@given(
    st.one_of(st.none(), st.integers(1, 6)),
    st.sampled_from(["self", "next", "delayed"]),
    st.integers(1, 9),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 12),
    st.integers(0, 999),
)
def test_in_a_sliding_window_a_token_alone_is_stored_as_a_chunk_of_one(window, decided_by, sliding, page_size, first, seed):
    """Slot by slot, so that quantised pages hold the same numbers; up to two tokens leave, and heads grow and shrink."""
    shift = {"self": 0, "next": 1, "delayed": window}[decided_by] if window else 0
    g = torch.Generator().manual_seed(seed)
    tables = [SlotTable(PagePool(1, 1, torch.float64, CPU, page_size), 2, K, window, shift, sliding) for _ in range(2)]
    one, chunk = tables
    for size in (first, *[1] * 24):
        key = torch.rand(2, K, size, 1, generator=g, dtype=torch.float64)
        flags = None if one.window is None else torch.rand(2, K, size, generator=g) < 0.5
        real = torch.rand(2, generator=g) < 0.8
        if size == 1:
            position = one.seen[:, None].expand(-1, K).flatten()
            address = one.append_one(None if flags is None else flags[:, :, 0], real)
            one.pool.write(address.flatten(), key.flatten(0, 2), -key.flatten(0, 2), position, one_a_page=True)
            chunk.append_chunk(key, -key, flags, real.long())
            chunk.note_columns(real[:, None], 1)
        elif size:
            for table in tables:
                table.append_chunk(key, -key, flags, torch.tensor([size, size // 2]))
        for name in ("length", "seen", "ring_slot", "ring_flag", "freed_at", "tail"):
            assert torch.equal(getattr(one, name), getattr(chunk, name)), name
        (mine, position, in_use), (theirs, wanted, _) = one.past(), chunk.past()
        assert torch.equal(position[in_use], wanted[in_use])
        for store in ("key", "value"):
            held, other = (getattr(t.pool, store).data.view(-1)[x[in_use]] for t, x in ((one, mine), (chunk, theirs)))
            assert torch.equal(held, other)
        held = [t.pool.num_pages - t.pool.count_free() for t in tables]
        assert held[0] == held[1] == int((-(-one.length // page_size)).sum())


# --- pages


def test_a_growing_pool_keeps_at_most_one_page_in_sixteen_to_spare():
    pool, held = PagePool(2, 2, torch.float32, CPU, page_size=2), 0
    for wanted in (1, 5, 40, 3, 1, 1, 200, 2, 9):
        pages = pool.take(torch.ones(wanted, dtype=torch.bool))
        held += wanted
        assert pages.unique().numel() == wanted
        assert held <= pool.num_pages <= held * 17 / 16


def test_a_pool_of_fixed_size_gives_all_its_pages_and_refuses_one_more_unchanged():
    pool = PagePool(2, 2, torch.float32, CPU, num_pages=5)
    first = pool.take(torch.tensor([True, False, True]))
    with pytest.raises(PoolExhausted, match="4 pages are needed, 3 of 5 are free") as refused:
        pool.take(torch.tensor([True] * 4 + [False]))
    assert (refused.value.needed, refused.value.free, refused.value.total) == (4, 3, 5)
    rest = pool.take(torch.ones(3, dtype=torch.bool))
    assert sorted([*first.tolist(), *rest.tolist()]) == [0, 1, 2, 3, 4, 5]
    pool.give_back(rest, torch.tensor([False, True, False]))
    assert pool.take(torch.ones(1, dtype=torch.bool)).tolist() == [rest[1]]


def test_a_pool_that_is_still_held_does_not_shrink():
    pool = PagePool(2, 2, torch.float32, CPU)
    pages = pool.take(torch.ones(4, dtype=torch.bool))
    pool.shrink()
    assert pool.num_pages == 4
    pool.give_back(pages, torch.ones(4, dtype=torch.bool))
    pool.shrink()
    assert pool.num_pages == 0
    assert pool.take(torch.ones(2, dtype=torch.bool)).unique().numel() == 2


# --- cropping


@settings(deadline=None, max_examples=120)
@given(
    st.one_of(st.none(), st.integers(1, 12)),
    st.sampled_from(["self", "next", "delayed"]),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(1, 6),
    st.integers(0, 14),
    st.integers(0, 999),
)
def test_what_was_cropped_never_was(window, decided_by, pieces, count, singles, seed):
    """Where cropping is allowed at all, the tokens that follow are stored as if the cropped ones had never come."""
    shift = {"self": 0, "next": 1, "delayed": window}[decided_by] if window else 0
    g = torch.Generator().manual_seed(seed)
    flags, other = (torch.rand(1, K, 70, generator=g) < 0.15 for _ in range(2))
    tables = [SlotTable(PagePool(1, 1, torch.float64, CPU, 3), 1, K, window, shift) for _ in range(2)]

    def feed(table, size, decided):
        start = int(table.seen[0])
        key = torch.arange(start, start + size).double().view(1, 1, size, 1).expand(-1, K, -1, -1)
        mine = None if window is None else decided[:, :, start : start + size]
        if size > 1:
            table.append_chunk(key, -key, mine, torch.tensor([size]))
            table.note_columns(None, size)
        else:
            address = table.append_one(None if mine is None else mine[:, :, 0], None)
            table.pool.write(address.flatten(), key.flatten(0, 2), -key.flatten(0, 2), torch.tensor([start] * K))

    for size in pieces:
        feed(tables[0], size, flags)
        feed(tables[1], size, flags)
    feed(tables[0], count, other)
    before = {
        name: getattr(tables[0], name).clone() for name in ("table", "length", "seen", "ring_slot", "ring_flag", "tail")
    }
    try:
        tables[0].crop(count)
    except ValueError:
        assert window is not None
        for name, x in before.items():
            assert torch.equal(getattr(tables[0], name), x), "nothing changed"
        return
    for size in (0, *[1] * singles, 5, 1, 9):
        for table in tables if size else ():
            feed(table, size, flags)
        held = []
        for table in tables:
            _, position, in_use = table.past()
            held.append([sorted(position[0, head][in_use[0, head]].tolist()) for head in range(K)])
        assert held[0] == held[1]


# --- storage


def write_page(storage, x, dtype=torch.float32, one_by_one=False):
    """A store of one page (beside page 0) that holds `x` [n, D]; what comes out, and the page's scale."""
    store = SlotStore(storage, 2, x.shape[0], x.shape[1], dtype, CPU)
    store.clear(torch.tensor([1]))
    address = torch.arange(x.shape[0]) + x.shape[0]
    if one_by_one:
        for i in range(x.shape[0]):
            store.write(address[i : i + 1], x[i : i + 1], one_a_page=True)
    else:
        store.write(address, x, one_a_page=False)
    found = store.gather(torch.tensor([1]))
    if dtype == torch.float32:
        assert torch.equal(found, store.read(address))
    return found, None if store.scale is None else store.scale[1].item()


PAGES = st.builds(
    lambda seed, spread, size: (
        torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))
        * torch.exp(spread * torch.randn(16, 1, generator=torch.Generator().manual_seed(seed + 1)))
        * size
    ),
    st.integers(0, 9999),
    st.sampled_from([0.0, 0.5, 2.0, 6.0]),
    st.sampled_from([1e-6, 1.0, 1e4]),
)


@settings(deadline=None, max_examples=80)
@given(PAGES, st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_e4m3_errs_a_sixteenth_of_a_value_or_half_its_least_step(x, dtype, one_by_one):
    """Scales are powers of two: a page that is rescaled as it fills loses at its least step alone, whose halves add up."""
    x = x.to(dtype)
    found, scale = write_page("fp8", x, dtype, one_by_one)
    highest = x.float().abs().max()
    assert highest / 448 <= scale < 2 * highest / 448 * (1 + 1e-6)
    assert math.log2(scale) == round(math.log2(scale))
    least = scale * 2.0**-9
    error = (found.float() - x.float()).abs()
    assert (error <= torch.clamp(x.float().abs() * 2.0**-4, min=least if one_by_one else least / 2)).all()


@settings(deadline=None, max_examples=80)
@given(PAGES, st.sampled_from([torch.float32, torch.bfloat16]))
def test_int8_errs_half_a_step_of_its_page_s_scale(x, dtype):
    x = x.to(dtype)
    found, scale = write_page("int8", x, dtype)
    assert scale == pytest.approx(x.float().abs().max().item() / 127)
    rounding = 1e-6 if dtype == torch.float32 else 2.0**-7  # of the scale and of the product, to the model's dtype
    error = (found.float() - x.float()).abs()
    assert (error <= scale / 2 * (1 + 1e-4) + (x.float().abs() + scale) * rounding).all()


@settings(deadline=None, max_examples=80)
@given(PAGES)
def test_int8_that_fills_token_by_token_errs_at_most_two_and_a_half_steps(x):
    found, scale = write_page("int8", x, one_by_one=True)
    highest = x.abs().max().item()
    assert highest / 127 * (1 - 1e-5) <= scale <= 1.25 * highest / 127 * (1 + 1e-5)
    assert (found - x).abs().max() <= 2.5 * scale * (1 + 1e-4)


@pytest.mark.parametrize("growth", [1.001, 1.01, 1.2, 3.0])
@pytest.mark.parametrize("storage", ["fp8", "int8"])
def test_a_thousand_rescalings_of_a_page_leave_its_old_values_where_they_were(storage, growth):
    """A slot is written again and again, a little larger each time, as tokens come and go; its neighbours stay."""
    store = SlotStore(storage, 2, 4, 8, torch.float32, CPU)
    store.clear(torch.tensor([1]))
    old = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    store.write(torch.tensor([4, 5, 6]), old, one_a_page=False)
    for step in range(1000):
        new = torch.full((1, 8), old.abs().max().item() * min(growth ** min(step, 600), 20.0))
        store.write(torch.tensor([7]), new, one_a_page=True)
    error, scale = (store.read(torch.tensor([4, 5, 6])) - old).abs(), store.scale[1]
    bound = (2.0**-4 * old.abs()).clamp(min=scale * 2.0**-9) if storage == "fp8" else 2.5 * scale
    assert (error <= bound * (1 + 1e-4)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_number_that_e4m3_has_comes_back_as_it_is(dtype):
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].view(torch.float8_e4m3fn)  # without NaN
    store = SlotStore("fp8", 2, codes.numel(), 1, dtype, CPU)
    store.scale[:] = 2.0**-3
    store.data[1] = codes[:, None]
    wanted = codes.float() / 8
    assert torch.equal(store.gather(torch.tensor([1]))[:, 0].float(), wanted)
    assert torch.equal(store.read(torch.arange(codes.numel()) + codes.numel())[:, 0].float(), wanted)


@pytest.mark.parametrize("storage", FORMATS)
def test_a_page_that_is_taken_anew_forgets_its_scale_and_a_copy_or_a_larger_store_keeps_it(storage):
    store = SlotStore(storage, 3, 2, 4, torch.float32, CPU)
    x = torch.tensor([[1000.0, 3.0, -7.0, 0.5], [1.0, 2.0, 3.0, 4.0]])
    store.write(torch.tensor([2, 3]), x, one_a_page=False)
    store.copy_pages(torch.tensor([1]), torch.tensor([2]))
    held = store.gather(torch.tensor([1]))
    store.resize(6)
    assert torch.equal(store.gather(torch.tensor([1, 2])), torch.cat([held, held]))
    assert store.nbytes == 6 * 2 * 4 * (4 if storage == "model" else 1) + (0 if storage == "model" else 6 * 4)
    store.clear(torch.tensor([1]))
    small = x / 1e6
    store.write(torch.tensor([2, 3]), small, one_a_page=False)
    assert (store.gather(torch.tensor([1])) - small).abs().max() <= 1e-3 / 16
    assert torch.equal(store.gather(torch.tensor([2])), held)


@pytest.mark.parametrize("storage", ["fp8", "int8"])
def test_a_page_given_back_is_as_fine_for_its_next_holder_as_a_new_one(storage):
    pool, one = (
        PagePool(2, 2, torch.float32, CPU, page_size=2, num_pages=1, storage=storage),
        torch.ones(1, dtype=torch.bool),
    )
    for size in (1e4, 1e-3):
        page = pool.take(one)
        x = torch.tensor([[1.0, -0.3]]) * size
        pool.write(page * 2, x, x / 10, torch.tensor([0]), one_a_page=True)
        torch.testing.assert_close(pool.key.read(page * 2), x, rtol=0.07, atol=0)
        torch.testing.assert_close(pool.value.read(page * 2), x / 10, rtol=0.07, atol=0)
        pool.give_back(page, one)


def test_padding_writes_land_where_nobody_reads():
    pool = PagePool(2, 2, torch.float32, CPU, page_size=2, num_pages=2, storage="int8")
    (page,) = pool.take(torch.ones(1, dtype=torch.bool)).tolist()
    x = torch.tensor([[1.0, -1.0]])
    pool.write(torch.tensor([page * 2]), x, x, torch.tensor([0]), one_a_page=True)
    garbage = torch.full((3, 2), 1e6)
    pool.write(torch.zeros(3, dtype=torch.long), garbage, garbage, torch.zeros(3, dtype=torch.long), one_a_page=True)
    torch.testing.assert_close(pool.key.read(torch.tensor([page * 2])), x)
