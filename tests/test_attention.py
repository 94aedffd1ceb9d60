import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import LargestTensor, cut, piece_sizes
from bytelm.kernels import attention, attention_mask, reference_attention, rotate
from bytelm.model.attention import QUERY_BLOCK, AttentionCache, StackSpec, rotation

documents_rows = st.lists(st.integers(1, 40), min_size=1, max_size=6).map(
    lambda lengths: torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
)
windows = st.sampled_from([None, 1, 2, 5, 16, 200])


@pytest.fixture(params=[4, 128])
def block(request, monkeypatch):
    """Blocks far smaller than the rows, and blocks larger than them."""
    monkeypatch.setattr("bytelm.kernels.self_attention.QUERY_BLOCK", request.param)
    monkeypatch.setattr("bytelm.model.attention.QUERY_BLOCK", request.param)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("window", [None, 1, 2, 5, 16, 200])
def test_attention_equals_its_reference_with_gradients(window):
    @given(documents_rows)
    def check(documents):
        rows = torch.stack([documents, documents.flip(0)])
        inputs = [torch.randn(2, len(documents), 2, 4) for _ in range(3)]
        results = []
        for function in (
            lambda *x: attention(*x, attention_mask(rows, window)),
            lambda *x: reference_attention(*x, rows, window),
        ):
            leaves = [x.clone().requires_grad_() for x in inputs]
            out = function(*leaves)
            (out * inputs[0].sin()).sum().backward()
            results.append((out, *(leaf.grad for leaf in leaves)))
        for fast, reference in zip(*results, strict=True):
            torch.testing.assert_close(fast, reference, rtol=1e-5, atol=1e-5)

    check()


@given(windows, st.integers(0, 60), piece_sizes)
def test_a_cache_fed_in_any_pieces_equals_whole_rows(window, length, sizes):
    spec = StackSpec(num_layers=1, head_dim=4, theta=100.0, window=window)
    inputs = [torch.randn(1, length, 2, 4) for _ in range(3)]

    def run(context, pieces):
        queries, keys, values = pieces
        return context.attend(0)(
            rotate(queries, context.factors), rotate(keys, context.factors), values
        )

    documents = torch.zeros(1, length, dtype=torch.long)
    whole = run(spec.over_rows(documents, torch.arange(length)[None]), inputs)
    cache, outputs = spec.cache(), []
    for pieces in zip(*(cut(x.transpose(0, 1), sizes) for x in inputs), strict=True):
        pieces = [x.transpose(0, 1) for x in pieces]
        outputs.append(run(cache.extend(pieces[0].shape[1], torch.device("cpu")), pieces))
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-5, atol=1e-5)


def test_a_windowed_cache_never_grows():
    spec = StackSpec(num_layers=1, head_dim=4, theta=100.0, window=5)
    cache = spec.cache()
    for length in (1, 30, 1, 2, 7):
        cache.extend(length, torch.device("cpu")).attend(0)(*torch.randn(3, 1, length, 2, 4))
        (layer,) = cache._layers
        assert layer._keys.shape[2] == layer._values.shape[1] == 5
    assert cache.position == 41


def test_a_cleared_cache_starts_a_new_document():
    spec = StackSpec(num_layers=1, head_dim=4, theta=100.0, window=5)
    cache, inputs = spec.cache(), torch.randn(3, 1, 6, 2, 4)
    first = cache.extend(6, torch.device("cpu")).attend(0)(*inputs)
    cache.clear()
    again = cache.extend(6, torch.device("cpu")).attend(0)(*inputs)
    assert cache.position == 6
    assert torch.equal(first, again)


def test_rotation_turns_interleaved_pairs_and_depends_on_distance_only():
    factors = rotation(torch.tensor([[0, 3, 1_000_000, 1_000_003]]), 4, 10_000.0)
    x = torch.tensor([[1.0, 0.0, 2.0, 0.0]]).expand(1, 4, 1, 4)
    turned = rotate(x, factors)
    assert torch.equal(turned[0, 0], x[0, 0])
    expected = [torch.cos(torch.tensor(3.0)), torch.sin(torch.tensor(3.0))]
    torch.testing.assert_close(turned[0, 1, 0, :2], torch.stack(expected))
    near = (turned[0, 0] * turned[0, 1]).sum()
    far = (turned[0, 2] * turned[0, 3]).sum()
    torch.testing.assert_close(near, far, rtol=1e-6, atol=1e-6)


def test_windowed_attention_makes_no_tensor_of_length_squared():
    length, window = 4096, 64
    x = torch.randn(1, length, 1, 4)
    with LargestTensor() as largest:
        attention(x, x, x, attention_mask(torch.zeros(1, length, dtype=torch.long), window))
    assert 0 < largest.num_bytes <= length * 4 * window * 8 < length * length


def test_a_cache_without_a_window_takes_a_prompt_in_blocks():
    length = 4096
    x = torch.randn(1, length, 1, 4)
    with LargestTensor() as largest:
        AttentionCache(None).attend(x, x, x)
    assert 0 < largest.num_bytes <= QUERY_BLOCK * length < length * length
