"""States over slots: cached equals full, whatever the pieces, the slots and the history."""

import copy
import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from builders import (
    LargestTensor,
    byte_strings,
    cut,
    ids_of,
    lm_models,
    piece_sizes,
    random_byte_lm,
    random_ids,
    random_patched,
    random_scorer,
    random_transformer,
    some_by_default,
)
from bytelm import codec, cpu
from bytelm.errors import ConfigError
from bytelm.inference import MemoryFullError, PagedMemory, Session
from bytelm.inference.cache import KVCache
from bytelm.inference.graphs import choose_capture
from bytelm.inference.open_patch import OpenPatch
from bytelm.kernels import Mask, attention, plan_attention
from bytelm.model.attention import StackSpec, rotate
from bytelm.patching import EntropyRule, StaticRule
from bytelm.scoring import TransformerScorer

MODELS = lm_models()
# Many pieces of one byte: they have a path of their own.
sizes_with_ones = piece_sizes | st.lists(st.sampled_from([0, 1, 1, 1, 4]), max_size=40)


class Recording(TorchDispatchMode):
    """What a CUDA graph does, for tests without CUDA: the operators of one call, run again.

    Operators are replayed on the tensors they were called with, in place where they were in place.
    As when a graph is captured, reading a number on the host is an error, and every choice that
    the host made is made for good.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert function is not torch.ops.aten._local_scalar_dense.default, "read on the host"
        out = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, out))
        return out


def record(run):
    """A capture for the CPU."""
    with Recording() as recording:
        result = run()

    def replay():
        made = {}

        def now(value):
            if isinstance(value, torch.Tensor):
                return made.get(id(value), value)
            return list(map(now, value)) if isinstance(value, list) else value

        for function, args, kwargs, out in recording.calls:
            new = function(*map(now, args), **{name: now(one) for name, one in kwargs.items()})
            several = isinstance(out, tuple | list)
            for a, b in zip(out, new, strict=True) if several else [(out, new)]:
                made[id(a)] = b
        return tree_map_only(torch.Tensor, now, result)

    return replay


@pytest.fixture(params=some_by_default(MODELS), scope="module")
def model(request):
    return MODELS[request.param]()


def cases():
    """Models of the default stage with each strategy; some are captured in the slow stage only."""
    captured = {"base", "reset", "stateful rule", "transformer with n-grams"}
    for model in some_by_default(MODELS):
        (name,) = model.values
        slow = model.marks if name in captured else pytest.mark.slow
        yield pytest.param(name, "eager", marks=model.marks, id=f"{name}-eager")
        yield pytest.param(name, record, marks=slow, id=f"{name}-captured")


every_strategy = pytest.mark.parametrize(("model", "strategy"), [*cases()], indirect=["model"])
SOME = ["base", "stateful rule", "n-gram scorer", "reset", "transformer"]


@pytest.fixture(params=SOME, scope="module")
def some_model(request):
    return MODELS[request.param]()


@pytest.fixture(autouse=True)
def small_rooms(monkeypatch):
    """Buffers that even short documents outgrow."""
    monkeypatch.setattr("bytelm.inference.cache.FIRST_ROOM", 4)
    monkeypatch.setattr("bytelm.inference.cache.QUERY_BLOCK", 7)
    monkeypatch.setattr(OpenPatch, "FIRST_ROOM", 2)


def full(model, ids):
    with torch.no_grad():
        return model(ids[None])[0]


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=3e-5)


@every_strategy
def test_a_session_fed_in_any_pieces_equals_one_full_forward(model, strategy):
    @given(byte_strings, sizes_with_ones)
    def check(document, sizes):
        ids = ids_of(document)
        session = Session(model, strategy)
        fed = torch.cat([session.feed(piece) for piece in cut(ids, sizes)])
        assert_close(fed, full(model, ids))

    check()


@every_strategy
def test_a_long_document_byte_by_byte_equals_one_full_forward(model, strategy):
    """Far beyond every window, with more patches than the first buffers hold."""
    ids = ids_of(b"one byte at a time,\nfar beyond every window; " * 2)
    session = Session(model, strategy)
    assert_close(torch.cat([session.feed(piece) for piece in ids.split(1)]), full(model, ids))


def test_a_fused_session_equals_one_full_forward(model):
    fused = cpu.fuse(copy.deepcopy(model))

    @given(byte_strings, sizes_with_ones)
    def check(document, sizes):
        ids = ids_of(document)
        session = Session(fused)
        fed = torch.cat([session.feed(piece) for piece in cut(ids, sizes)])
        assert_close(fed, full(model, ids))

    check()


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["eager", "graphs"])
def test_sessions_on_cuda_equal_one_full_forward(model, strategy):
    on_device = copy.deepcopy(model).cuda()
    ids = ids_of(b"one byte at a time,\nfar beyond every window; " * 3)
    session = Session(on_device, strategy)
    pieces = [ids[:5], *ids[5:70].split(1), ids[70:80], *ids[80:].split(1)]
    fed = torch.cat([session.feed(piece.cuda()) for piece in pieces]).cpu()
    torch.testing.assert_close(fed, full(model, ids), rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_slots_on_cuda_equal_one_full_forward(model):
    on_device = copy.deepcopy(model).cuda()
    documents = [random_ids(60, seed=n) for n in range(3)]
    state = on_device.new_state(3, "graphs")
    fed = [[state.prefill(slot, ids[: 3 + slot].cuda())] for slot, ids in enumerate(documents)]
    for at in range(50):
        ids = torch.stack([ids[3 + slot + at] for slot, ids in enumerate(documents)]).cuda()
        for slot, logits in enumerate(state.decode(ids)):
            fed[slot].append(logits[None])
    for slot, ids in enumerate(documents):
        expected = full(model, ids[: 53 + slot])
        torch.testing.assert_close(torch.cat(fed[slot]).cpu(), expected, rtol=1e-3, atol=1e-4)


def test_a_session_runs_under_autocast(model):
    ids = ids_of(b"a few bytes")
    with torch.autocast("cpu", torch.bfloat16):
        session = Session(model)
        fed = torch.cat([session.feed(piece) for piece in ids.split(1)])
    assert fed.isfinite().all()


# What may happen to a state of several slots: (action, slot or slots, pieces).
actions = st.lists(
    st.one_of(
        st.tuples(st.just("prefill"), st.integers(0, 2), st.binary(min_size=1, max_size=9)),
        st.tuples(st.just("decode"), st.sets(st.integers(0, 2)), st.integers(0, 255)),
        st.tuples(st.just("reset"), st.integers(0, 2), st.none()),
        st.tuples(st.just("snapshot"), st.integers(0, 2), st.none()),
        st.tuples(st.just("rollback"), st.integers(0, 2), st.none()),
        st.tuples(st.just("copy"), st.integers(0, 2), st.integers(0, 2)),
    ),
    max_size=25,
)


class Slots:
    """A state of three slots, and what their documents are."""

    def __init__(self, model, strategy, memory=None):
        self.model = model
        self.state = model.new_state(3, strategy, memory)
        self.documents = [torch.zeros(0, dtype=torch.long) for _ in range(3)]
        self.logits = [[] for _ in range(3)]
        self.snapshots = [[], [], []]

    def prefill(self, slot, data):
        ids = torch.tensor(list(data)) + 4
        self.logits[slot].append(self.state.prefill(slot, ids))
        self.documents[slot] = torch.cat((self.documents[slot], ids))

    def decode(self, slots, byte):
        slots = sorted(slot for slot in slots if len(self.documents[slot]))
        if not slots:
            return
        ids = torch.tensor([(byte + 31 * slot) % 256 + 4 for slot in slots])
        for slot, one, logits in zip(slots, ids, self.state.decode(ids, slots), strict=True):
            self.logits[slot].append(logits[None])
            self.documents[slot] = torch.cat((self.documents[slot], one[None]))

    def reset(self, slot, _):
        self.state.reset(slot)
        self.documents[slot], self.logits[slot], self.snapshots[slot] = (
            self.documents[slot][:0],
            [],
            [],
        )

    def snapshot(self, slot, _):
        kept = (self.state.snapshot(slot), self.documents[slot], list(self.logits[slot]))
        self.snapshots[slot].append(kept)

    def rollback(self, slot, _):
        if self.snapshots[slot]:
            snapshot, self.documents[slot], logits = self.snapshots[slot].pop()
            self.logits[slot] = list(logits)
            self.state.rollback(slot, snapshot)

    def copy(self, source, slot):
        self.state.copy(self.state, source, slot)
        self.documents[slot] = self.documents[source]
        self.logits[slot], self.snapshots[slot] = list(self.logits[source]), []

    def check(self):
        for slot, ids in enumerate(self.documents):
            if len(ids):
                assert_close(torch.cat(self.logits[slot]), full(self.model, ids))


@every_strategy
def test_slots_are_independent_whatever_happens_to_them(model, strategy):
    """Prefilled, decoded together, reset, rolled back, forked: each equals its document alone."""

    @given(actions)
    def check(history):
        slots = Slots(model, strategy)
        for action, slot, what in history:
            getattr(slots, action)(slot, what)
        slots.check()

    check()


@pytest.mark.parametrize("has_kernels", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", some_by_default(MODELS))
def test_slots_in_pages_are_independent_too(name, has_kernels, monkeypatch):
    model = MODELS[name]()
    monkeypatch.setattr("bytelm.cpu.compiling.has_numba", lambda: has_kernels)
    monkeypatch.setattr("bytelm.inference.pages.PAGE", 3)

    @given(actions)
    def check(history):
        memory = PagedMemory(1000)
        slots = Slots(model, "eager", memory)
        for action, slot, what in history:
            getattr(slots, action)(slot, what)
        slots.check()
        for slot in range(3):
            slots.state.reset(slot)
        assert memory.num_free == memory.num_pages

    check()


@pytest.mark.parametrize("name", ["every byte a patch", "transformer with n-grams"])
def test_a_call_that_pages_are_missing_for_changes_nothing(name, monkeypatch):
    monkeypatch.setattr("bytelm.inference.pages.PAGE", 4)
    model, ids = MODELS[name](), ids_of(b"twelve bytes and more")
    state = model.new_state(2, memory=PagedMemory(12))
    fed = [state.prefill(0, ids[:8])]
    with pytest.raises(MemoryFullError, match="2 pages are wanted, and 1 are free"):
        state.prefill(1, ids[:5])
    with pytest.raises(MemoryFullError, match="2 pages are wanted, and 1 are free"):
        state.prefill(0, ids[8:14])
    fed += [state.prefill(1, ids[:4])[:0], state.prefill(0, ids[8:8])]
    with pytest.raises(MemoryFullError, match="2 pages are wanted, and 0 are free"):
        state.decode(ids[8:9].repeat(2))
    state.reset(1)
    fed += [state.decode(one, [0]) for one in ids[8:12].split(1)]
    assert_close(torch.cat(fed), full(model, ids[:12]))


@given(byte_strings, byte_strings, byte_strings)
def test_sessions_rewind_and_fork(first, second, third):
    model = random_patched(max_length=4)
    session = Session(model)
    session.feed(ids_of(first))
    snapshot = session.snapshot()
    fork = session.fork()

    def feed(one, data):
        ids = torch.tensor(list(data), dtype=torch.long) + 4
        return torch.cat([one.feed(piece) for piece in cut(ids, [1, 1, 3])])

    expected = feed(session, second)
    feed(session, third)
    session.rollback(snapshot)
    assert torch.equal(feed(session, second), expected)
    other = feed(fork, third)
    session.rollback(snapshot)
    assert torch.equal(feed(session, third), other)


def test_forks_go_separate_ways():
    model = random_patched()
    session = Session(model)
    session.feed(random_ids(50))
    fork = session.fork()
    a, b = random_ids(30, seed=1), random_ids(30, seed=2)
    mine, its = [], []
    for one, other in zip(a.split(1), b.split(1), strict=True):
        mine.append(session.feed(one))
        its.append(fork.feed(other))
    assert_close(torch.cat(mine), full(model, torch.cat((random_ids(50), a)))[50:])
    assert_close(torch.cat(its), full(model, torch.cat((random_ids(50), b)))[50:])


@pytest.mark.parametrize("fused", [False, True])
def test_the_global_transformer_runs_once_per_patch(fused):
    model, ids = random_patched(), ids_of(b"the global model runs once per patch, never per byte")
    if fused:
        cpu.fuse(model)
    calls = []
    model.blt.global_model.register_forward_hook(lambda _, inputs, __: calls.append(inputs[0]))
    state = model.new_state()
    latents = model.segment(ids[None]).patches.decoder_ids[0]
    state.prefill(0, ids[:1])
    for piece, latent in zip(ids[1:].split(1), latents[1:], strict=True):
        state.decode(piece)
        assert sum(x.shape[1] for x in calls) == state.num_patches[0] == latent + 1
    assert 1 < len(calls) < len(ids)
    assert all(x.shape[:2] == (1, 1) for x in calls)


def test_patches_that_close_together_run_the_global_transformer_together():
    model = random_patched(rule=StaticRule(3))
    calls = []
    model.blt.global_model.register_forward_hook(lambda _, inputs, __: calls.append(inputs[0]))
    state = model.new_state(3)
    for slot in range(3):
        state.prefill(slot, random_ids(4 if slot < 2 else 5, seed=slot))
    calls.clear()
    for _ in range(6):
        state.decode(torch.full((3,), 77))
    assert [len(x) for x in calls] == [1, 2, 1, 2]


def test_windows_are_rings_and_only_the_global_cache_grows():
    model = random_patched(rule=StaticRule(2))
    state = model.new_state()
    state.prefill(0, random_ids(30))
    encoder, _, decoder, open_patch = state.rooms
    before = state.rooms[1]
    for _ in range(100):
        state.decode(torch.tensor([9]))
    assert (state.rooms[0], state.rooms[2], state.rooms[3]) == (encoder, decoder, open_patch)
    assert encoder == decoder == model.blt.encoder.spec.window
    assert before < state.rooms[1] < 4 * 65


def test_no_tensor_of_a_session_is_bytes_by_patches(monkeypatch):
    monkeypatch.undo()
    model, num_bytes = random_patched(rule=StaticRule(2)), 4096
    with LargestTensor() as largest, torch.no_grad():
        Session(model).feed(random_ids(num_bytes))
    assert 0 < largest.num_bytes < num_bytes * num_bytes // 2


@pytest.mark.parametrize("strategy", ["eager", record], ids=["eager", "captured"])
def test_single_bytes_keep_their_shapes(strategy):
    """Nothing is captured again before a buffer is outgrown."""
    model = random_patched(rule=EntropyRule(threshold=99.0), max_length=2)
    captures = []

    def counting(run):
        captures.append(run)
        return record(run)

    state = model.new_state(1, counting if strategy is record else strategy)
    state.prefill(0, random_ids(40))
    for _ in range(8):
        state.decode(torch.tensor([7]))
    first = len(captures)
    for _ in range(8):
        state.decode(torch.tensor([7]))
    assert len(captures) == first
    assert (first > 0) == (strategy is record)


@given(st.sampled_from([None, 1, 2, 5, 16]), st.integers(1, 60), piece_sizes, st.booleans())
def test_a_cache_fed_in_any_pieces_equals_whole_rows(window, length, sizes, is_static):
    spec = StackSpec(1, 2, 4, 100.0, None, window)
    queries, (keys, values) = torch.randn(1, length, 4, 4), torch.randn(2, 1, length, 2, 4)

    def run(context, q, k, v):
        layer = context[0]
        return layer.attend(rotate(q, layer.factors), rotate(k, layer.factors), v)

    documents = torch.zeros(1, length, dtype=torch.long)
    whole = run(spec.over_rows(documents, torch.arange(length)[None]), queries, keys, values)
    cache, outputs = KVCache(spec, 1, torch.device("cpu"), is_static=is_static), []
    for at in cut(torch.arange(length), sizes):
        context = cache.decode() if len(at) == 1 and outputs else cache.prefill(0, len(at))
        outputs.append(run(context, queries[:, at], keys[:, at], values[:, at]))
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-5, atol=1e-5)
    assert cache.positions.tolist() == [length]


def test_a_cache_without_a_window_takes_a_prompt_in_blocks(monkeypatch):
    monkeypatch.undo()
    length = 4096
    cache = KVCache(StackSpec(1, 1, 4, 100.0, None, None), 1, torch.device("cpu"))
    x = torch.randn(1, length, 1, 4)
    with LargestTensor() as largest:
        cache.prefill(0, length)[0].attend(x, x, x)
        cache.prefill(0, length)[0].attend(x, x, x)
    assert 0 < largest.num_bytes <= 512 * 2 * length < length * length


@given(st.integers(0, 3_000_000))
def test_positions_far_into_a_document_are_rotated_as_in_rows(position):
    spec = StackSpec(1, 1, 8, 10_000.0, None, 5)
    cache = KVCache(spec, 1, torch.device("cpu"))
    cache.prefill(0, 1)[0].attend(*torch.randn(3, 1, 1, 1, 8))
    cache.positions.fill_(position)
    context = cache.decode()
    assert torch.equal(context[0].factors, spec.rotation(torch.tensor([[position]])))


@pytest.mark.parametrize("reset", [False, True])
@given(st.lists(st.tuples(byte_strings, byte_strings), min_size=2, max_size=3))
def test_scorers_decode_several_documents_together(reset, documents):
    scorer = random_scorer(reset_at_newline=reset)
    prompts = [ids_of(prompt) for prompt, _ in documents]
    rests = [torch.tensor(list(rest), dtype=torch.long) + 4 for _, rest in documents]
    state = scorer.new_state(len(documents))
    found = [[state.prefill(slot, ids)] for slot, ids in enumerate(prompts)]
    for at in range(max(map(len, rests))):
        slots = [slot for slot, rest in enumerate(rests) if at < len(rest)]
        entropies = state.decode(torch.stack([rests[slot][at] for slot in slots]), slots)
        for slot, entropy in zip(slots, entropies, strict=True):
            found[slot].append(entropy[None])
    for slot, (prompt, rest) in enumerate(zip(prompts, rests, strict=True)):
        with torch.no_grad():
            expected = scorer.entropies(torch.cat((prompt, rest))[None])[0]
        torch.testing.assert_close(torch.cat(found[slot]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", ["eager", record], ids=["eager", "captured"])
@settings(max_examples=8)
@given(byte_strings, byte_strings, byte_strings)
def test_a_deep_copy_is_a_session_of_its_own(some_model, strategy, first, second, third):
    first, second, third = ids_of(first), ids_of(second)[1:], ids_of(third)[1:]
    original = Session(some_model, strategy)
    for piece in cut(first, [len(first) - 1, 1]):
        original.feed(piece)
    copied = copy.deepcopy(original)
    for session, rest in ((copied, second), (original, third)):
        snapshot = session.snapshot()
        fed = [session.feed(rest)]
        session.rollback(snapshot)
        fed += [session.feed(one) for one in rest.split(1)] if len(rest) else []
        expected = full(some_model, torch.cat((first, rest)))[len(first) :]
        assert_close(fed[0], expected)
        assert_close(torch.cat(fed[1:] or fed[:1]), expected)


@pytest.mark.parametrize("bad", [[-1], [260], [70, 5000], [5000, 70], [70, -7, 70]])
@pytest.mark.parametrize("first", [b"", b"hello there, "])
def test_a_refused_call_changes_nothing(some_model, first, bad):
    session, whole = Session(some_model), ids_of(first + b"you")
    num_fed = len(whole) - 3 if first else 0
    session.feed(whole[:num_fed])
    with pytest.raises(ValueError, match=r"id -?\d+ is outside 0\.\.259"):
        session.feed(torch.tensor(bad))
    assert_close(session.feed(whole[num_fed:]), full(some_model, whole)[num_fed:])


@pytest.mark.parametrize(
    ("ids", "slots", "message"),
    [
        ([70], None, "1 ids were given for 3 slots"),
        ([70, 70], [1], "2 ids were given for 1 slots"),
        ([70, 70], [1, 1], r"slots \[1, 1\] must be different"),
        ([70, 70], [0, -1], r"within 0\.\.2"),
        ([70], [3], r"within 0\.\.2"),
        ([70, 260], [0, 2], "id 260"),
    ],
)
def test_mistakes_in_a_decode_are_named_and_change_nothing(some_model, ids, slots, message):
    document, state = ids_of(b"some text"), some_model.new_state(3)
    with pytest.raises(ValueError, match="must be given to prefill"):
        state.decode(document[:3])
    with pytest.raises(ValueError, match="slot -1 is outside"):
        state.prefill(-1, document)
    for slot in range(3):
        state.prefill(slot, document[:-1])
    with pytest.raises(ValueError, match=message):
        state.decode(torch.tensor(ids), slots)
    assert_close(state.decode(document[-1].repeat(3)), full(some_model, document)[-1:].repeat(3, 1))


@pytest.mark.parametrize("strategy", ["graph", "Eager", "graphs"])
def test_strategies_that_cannot_be_used_are_refused(strategy):
    choose = inspect.unwrap(choose_capture)  # without the check of types, which users do not run
    with pytest.raises(ConfigError, match=f"strategy '{strategy}' (is not one of|needs CUDA)"):
        choose(strategy, torch.device("cpu"))


@pytest.mark.parametrize("name", ["transformer", "base", "stateful rule"])
def test_graphs_need_cuda(name):
    with pytest.raises(ConfigError, match="needs CUDA"):
        Session(MODELS[name](), "graphs")


def test_lines_of_a_scorer_without_a_window_share_a_cache():
    transformer = random_transformer(num_layers=1, window=None)
    state = TransformerScorer(transformer, reset_at_newline=True).new_state(2)
    for slot in range(2):
        state.prefill(slot, ids_of(b"abc"))
    newline, other = torch.tensor([codec.NEWLINE] * 2), torch.tensor([70, 80])
    for step in range(60):
        state.decode(other if step % 5 else newline)
    assert state._state.rooms == (8,)  # FIRST_ROOM is 4 here, and a line has 5 bytes


def test_capturing_notices_what_the_host_reads():
    """Guards the tests above: a capture that could not fail would prove nothing."""
    x = torch.zeros(3)
    with pytest.raises(AssertionError, match="read on the host"):
        record(lambda: x[0].item())
    plain = record(lambda: x.add_(1))
    plain()
    plain()
    assert x.tolist() == [3, 3, 3]


def test_a_byte_transformer_decodes_in_any_order_of_slots():
    model = random_byte_lm()
    state = model.new_state(3)
    for slot in range(3):
        state.prefill(slot, random_ids(5 + slot, seed=slot))
    a, b = state.decode(torch.tensor([10, 20]), [2, 0])
    for slot, logits, byte in ((2, a, 10), (0, b, 20)):
        ids = torch.cat((random_ids(5 + slot, seed=slot), torch.tensor([byte])))
        assert_close(logits, full(model, ids)[-1])


def test_rows_and_caches_share_their_masks():
    """A window sees as many positions in a row as in a ring."""
    spec = StackSpec(1, 1, 4, 100.0, None, 3)
    x = torch.randn(1, 9, 1, 4)
    plan = plan_attention(Mask(torch.zeros(1, 9, dtype=torch.long), spec.window))
    whole = attention(x, x, x, plan)
    cache = KVCache(spec, 1, torch.device("cpu"))
    fed = [cache.prefill(0, 1)[0].attend(*[x[:, :1]] * 3)]
    fed += [cache.decode()[0].attend(*[x[:, i : i + 1]] * 3) for i in range(1, 9)]
    torch.testing.assert_close(torch.cat(fed, 1), whole, rtol=1e-5, atol=1e-5)
