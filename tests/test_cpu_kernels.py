"""Kernels for steps of several rows equal the operations of torch that they stand for."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from builders import NGRAMS, random_byte_lm, random_ids, random_patched
from bytelm import cpu
from bytelm.cpu import attending, compiling, int8, products
from bytelm.inference import Session
from bytelm.inference.cache import EntriesDecode, KVCache
from bytelm.inference.pages import PagedMemory
from bytelm.model.attention import StackSpec

numba = pytest.importorskip("numba")
sizes = st.integers(1, 40)


@given(st.integers(2, 33), sizes, sizes, st.booleans())
def test_products_equal_those_of_torch(rows, inputs, outputs, by_columns):
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    if by_columns:
        weight = weight.T.contiguous().T
    before = torch.randn(rows, outputs)
    after = products.add_product(before.clone(), x, weight)
    assert_close(after, before + x @ weight.T)


@pytest.mark.parametrize("by_columns", [True, False])
def test_what_is_not_a_number_stays_so_in_its_own_row(by_columns):
    x, weight = torch.randn(5, 24), torch.randn(9, 24)
    if by_columns:
        weight = weight.T.contiguous().T
    x[3, 7] = torch.nan
    product = products.add_product(torch.zeros(5, 9), x, weight)
    assert product[3].isnan().all()
    assert not product[[0, 1, 2, 4]].isnan().any()


def test_kernels_are_left_where_they_would_not_be_faster(monkeypatch):
    weight = torch.randn(8, 4)
    assert products.choose(weight, 2)
    assert not products.choose(weight, 1)
    assert not products.choose(weight, 9)
    assert not products.choose(weight.double(), 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: compiling.MAX_THREADS + 1)
    assert not products.choose(weight, 2)


@given(
    st.lists(st.integers(0, 30), min_size=2, max_size=4),
    st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    st.sampled_from([1, 3, 16]),
    st.booleans(),
)
def test_attention_to_entries_equals_that_to_whole_documents(positions, heads, block, is_paged):
    """Documents of some lengths, in pages in any order or in ring buffers, get one position."""
    num_heads, kv_heads = heads
    rows, dim = len(positions), 8
    queries, keys, values = (torch.randn(rows, n, dim) for n in (num_heads, kv_heads, kv_heads))
    pasts = [torch.randn(2, kv_heads, position, dim) for position in positions]
    given_at = np.array(positions)
    if is_paged:
        num_pages = [position // block + 1 for position in positions]
        tables = [list(t) for t in torch.randperm(sum(num_pages)).split(num_pages)]
        tables = [[int(page) for page in table] for table in tables]
        cached = torch.full((2, kv_heads, sum(num_pages) * block, dim), torch.nan)
        for past, table in zip(pasts, tables, strict=True):
            for at in range(past.shape[2]):
                cached[:, :, table[at // block] * block + at % block] = past[:, :, at]
        entries = attending.paged(tables, given_at, block)
        head_positions = cached.shape[2]
    else:
        cached = torch.full((2, rows, kv_heads, block, dim), torch.nan)
        for row, past in enumerate(pasts):
            for at in range(past.shape[2]):
                cached[:, row, :, at % block] = past[:, :, at]
        entries = attending.rings(range(rows), given_at, block, kv_heads)
        head_positions = block
    mixed = entries.attend(queries, keys, values, cached[0], cached[1], head_positions)
    for row, past in enumerate(pasts):
        seen_keys = torch.cat((past[0], keys[row][:, None]), 1)
        seen_values = torch.cat((past[1], values[row][:, None]), 1)
        if not is_paged:
            seen_keys, seen_values = seen_keys[:, -block:], seen_values[:, -block:]
        grouped = queries[row].unflatten(0, (kv_heads, -1))
        weights = (grouped @ seen_keys.mT * dim**-0.5).softmax(-1)
        assert_close(mixed[row], (weights @ seen_values).flatten(0, 1))


def test_steps_of_several_slots_use_the_kernel(monkeypatch):
    spec = StackSpec(1, 2, 4, 100.0, None, 8)
    for has_numba in (True, False):
        monkeypatch.setattr("bytelm.cpu.compiling.has_numba", lambda has=has_numba: has)
        cache = KVCache(spec, 2, torch.device("cpu"))
        for slot in (0, 1):
            new = [torch.randn(1, 3, 2, 4) for _ in range(3)]
            cache.prefill(slot, 3)[0].attend(*new)
        assert isinstance(cache.decode(), EntriesDecode) == has_numba


def test_a_matrix_is_stored_as_its_kernel_reads_it():
    for shape, kernel in [((40, 8), "add_by_columns"), ((8, 40), "add_by_rows")]:
        linear = torch.nn.Linear(*shape[::-1], bias=False)
        cpu.arrange(linear)
        chosen = products.choose(linear.weight.detach(), 4)
        assert chosen is not None
        assert chosen[0] is getattr(compiling.kernels(), kernel)


MODELS = {
    "patches": random_patched,
    "grouped heads": lambda: random_byte_lm(
        num_heads=4, num_kv_heads=2, norm_eps=1e-3, hash_embeddings=NGRAMS
    ),
}


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", [1, 3, 11])
def test_steps_in_kernels_are_those_of_the_layers(name, is_int8, rows, monkeypatch):
    """Bytes of several documents, also more than matrices stored by rows have kernels for."""
    model = MODELS[name]().eval()
    if is_int8:
        monkeypatch.setattr("bytelm.cpu.int8.MIN_SIZE", 1)
        cpu.quantize(model)
    else:
        cpu.arrange(model)
    plain, fused = copy.deepcopy(model), cpu.fuse(model)
    documents = [random_ids(30 + 3 * row, seed=row) for row in range(rows)]
    called = []
    original = compiling.kernels().decode_block
    monkeypatch.setattr(
        compiling.kernels(), "decode_block", lambda *given: called.append(1) or original(*given)
    )
    with torch.no_grad():
        state = fused.new_state(rows, "eager", PagedMemory(1024))
        for slot, document in enumerate(documents):
            state.prefill(slot, document[:-8])
        for at in range(-8, 0):
            ids = torch.stack([document[at] for document in documents])
            logits = state.decode(ids, range(rows))
            for row, document in enumerate(documents):
                seen = document[: len(document) + at + 1]
                assert_close(logits[row], plain(seen[None])[0, -1], rtol=1e-4, atol=2e-5)
    assert bool(called) == (rows > 1 or is_int8)


@given(st.lists(st.floats(-200, 80, width=32), min_size=1))
def test_exponentials_are_those_of_numpy(values):
    x = np.array([*values, -np.inf, np.nan], np.float32)
    expected = np.exp(np.maximum(x.astype(np.float64), -87))
    compiling.kernels().exp_in_place(x)
    np.testing.assert_allclose(x, expected, rtol=1e-6)


def test_steps_are_kept_from_one_draft_to_the_next():
    """Passes over several positions between steps do not make these anew; moved weights do."""
    model = cpu.fuse(random_byte_lm().eval())
    session, run = Session(model), model.transformer.__dict__["run"]
    ids = random_ids(24)
    made = []
    for at in range(0, 24, 4):
        if at == 16:
            model.transformer.output.weight.data = model.transformer.output.weight.data.clone()
        session.feed(ids[at : at + 3])
        session.feed(ids[at + 3 : at + 4])
        made += run._made.values()
    assert [one is made[0] for one in made] == [True, True, True, True, False, False]


@pytest.mark.parametrize("stored", ["by rows", "by columns", "int8"])
@pytest.mark.parametrize("rows", [1, 4, 6])
def test_a_product_in_a_kernel_is_that_of_numpy(stored, rows):
    x, linear = torch.randn(rows, 10), torch.nn.Linear(10, 70, bias=False)
    weight = linear.weight.detach().numpy()
    if stored == "by columns":
        weight = np.asfortranarray(weight)
    elif stored == "int8":
        weight = int8.Int8Linear(linear).matrix.arrays
    plain = compiling.kernels().add_product
    expected, found = np.ones((2, rows, 70), np.float32)
    plain(x.numpy(), weight, expected)

    @numba.njit
    def compiled(x, weight, out):
        plain(x, weight, out)

    compiled(x.numpy(), weight, found)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_buffers_of_few_numbers_of_rows_are_kept(monkeypatch):
    monkeypatch.setattr("bytelm.cpu.fusing.MAX_STEPS", 2)
    model = cpu.fuse(random_byte_lm().eval())
    run, ids = model.transformer.__dict__["run"], random_ids(12)
    with torch.no_grad():
        expected = model(ids[None])[0]
        state = model.new_state(5, "eager")
        for slot in range(5):
            state.prefill(slot, ids[:4])
        for at, rows in enumerate((1, 2, 3, 4, 5), 4):
            # The last slots fall behind: each step has the others' next id.
            logits = state.decode(ids[at].expand(6 - rows), range(6 - rows))
            assert_close(logits[0], expected[at], rtol=1e-4, atol=2e-5)
            assert 1 <= len(run._made) <= 2
