"""Self-attention: masks, their back ends against the dense twin, rotary positions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from builders import LargestTensor, block_config, randomise_module
from bytelm import kernels
from bytelm.config import RopeScaling
from bytelm.kernels import Mask, attention, plan_attention, reference_attention
from bytelm.model.attention import RMSNorm, SelfAttention, StackSpec, rotate, scale_frequencies

documents_rows = st.lists(st.integers(1, 40), min_size=1, max_size=6).map(
    lambda lengths: torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
)
WINDOWS = [None, 1, 2, 5, 16, 200]
windows = st.sampled_from(WINDOWS)
heads_and_groups = st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 1)])


def spec(window=None, head_dim=4, theta=100.0, scaling=None, num_layers=1, kv_heads=2):
    return StackSpec(num_layers, kv_heads, head_dim, theta, scaling, window)


def with_gradients(function, *inputs):
    """Output and gradients of a function under a fixed weighting of its output."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    generator = torch.Generator().manual_seed(3)
    (out * torch.randn(out.shape, generator=generator)).sum().backward()
    return [out, *(leaf.grad for leaf in leaves)]


def assert_all_close(results, expected, tolerance=1e-5):
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=[4, 128])
def block(request, monkeypatch):
    """Blocks far smaller than the rows, and blocks larger than them."""
    monkeypatch.setattr("bytelm.kernels.self_attention.QUERY_BLOCK", request.param)
    monkeypatch.setattr("bytelm.kernels.self_attention.DENSE_QUERIES", request.param)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("window", WINDOWS)
def test_attention_equals_its_reference_with_gradients(window):
    @given(documents_rows, heads_and_groups)
    def check(documents, shape):
        heads, kv_heads = shape
        mask = Mask(torch.stack([documents, documents.flip(0)]), window)
        queries = torch.randn(2, len(documents), heads, 4)
        keys, values = torch.randn(2, 2, len(documents), kv_heads, 4)
        fast = with_gradients(lambda *x: attention(*x, plan_attention(mask)), queries, keys, values)
        assert_all_close(
            fast, with_gradients(lambda *x: reference_attention(*x, mask), queries, keys, values)
        )

    check()


@given(documents_rows, windows)
def test_a_causal_mask_sees_what_its_definition_says(documents, window):
    allowed = Mask(documents[None], window).allowed(0, len(documents))[0]
    for i in range(len(documents)):
        for j in range(len(documents)):
            is_near = window is None or i - j < window
            expected = j <= i and is_near and bool(documents[i] == documents[j])
            assert allowed[i, j].item() == expected


@given(documents_rows, windows, st.integers(0, 50), st.integers(1, 30))
def test_part_of_a_mask_is_that_part_of_the_whole(documents, window, begin, size):
    mask = Mask(documents[None], window)
    begin = begin % len(documents)
    end = min(begin + size, len(documents))
    whole = mask.allowed(0, len(documents))
    assert torch.equal(mask.allowed(begin, end), whole[:, begin:end])


@st.composite
def diffusion_rows(draw):
    """Rows as a diffusion decoder is trained on: clean bytes, then blocks that begin among them."""
    length, size = draw(st.integers(2, 20)), draw(st.integers(1, 5))
    starts = draw(st.lists(st.integers(0, length - 1), unique=True, max_size=4))
    positions = torch.cat(
        [torch.arange(length), *(torch.arange(start, start + size) for start in starts)]
    )
    blocks = torch.cat(
        [torch.full((length,), -1), *(torch.full((size,), b) for b in range(len(starts)))]
    )
    return length, starts, size, positions, blocks


@given(diffusion_rows(), windows)
def test_blocks_see_themselves_and_the_bytes_before_them_and_nothing_sees_blocks(row, window):
    length, starts, size, positions, blocks = row
    mask = Mask(torch.zeros_like(positions)[None], window, blocks[None], positions[None])
    allowed = mask.allowed(0, len(positions))[0]
    causal = Mask(torch.zeros(1, length, dtype=torch.long), window).allowed(0, length)[0]
    assert torch.equal(allowed[:length, :length], causal)
    assert not allowed[:length, length:].any()
    for number, start in enumerate(starts):
        own = range(length + number * size, length + (number + 1) * size)
        for i in own:
            seen = {j for j in range(len(positions)) if allowed[i, j]}
            near = 0 if window is None else positions[i].item() - window + 1
            assert seen == {j for j in range(start) if j >= near} | set(own)


@pytest.mark.usefixtures("block")
@given(diffusion_rows(), windows)
def test_attention_under_blocks_equals_its_reference_with_gradients(row, window):
    _, _, _, positions, blocks = row
    mask = Mask(torch.zeros_like(positions)[None], window, blocks[None], positions[None])
    inputs = torch.randn(3, 1, len(positions), 2, 4).unbind()
    fast = with_gradients(lambda *x: attention(*x, plan_attention(mask)), *inputs)
    assert_all_close(fast, with_gradients(lambda *x: reference_attention(*x, mask), *inputs))


@given(diffusion_rows(), st.integers(0, 19))
def test_clean_bytes_from_a_blocks_start_on_do_not_reach_its_outputs(row, at):
    """Or a diffusion decoder would be shown the bytes that it is to fill in."""
    length, starts, size, positions, blocks = row
    context = spec().over_rows(torch.zeros_like(positions)[None], positions[None], blocks[None])
    inputs = torch.randn(3, 1, len(positions), 2, 4)
    changed = inputs.clone()
    changed[:, :, at % length] += 1.0
    out, other = (context.attend(*x) for x in (inputs, changed))
    for number, start in enumerate(starts):
        own = slice(length + number * size, length + (number + 1) * size)
        is_same = torch.equal(out[:, own], other[:, own])
        assert is_same == (at % length >= start)


def test_windowed_attention_makes_no_tensor_of_length_squared():
    length, window = 4096, 64
    x = torch.randn(1, length, 1, 4)
    plan = plan_attention(Mask(torch.zeros(1, length, dtype=torch.long), window))
    with LargestTensor() as largest:
        attention(x, x, x, plan)
    assert 0 < largest.num_bytes <= length * 4 * window * 8 < length * length


def test_an_empty_row_is_attended_to():
    x = torch.randn(2, 0, 1, 4)
    assert attention(x, x, x, plan_attention(Mask(torch.zeros(2, 0, dtype=torch.long)))).shape == (
        2,
        0,
        1,
        4,
    )


@given(st.lists(st.integers(0, 2_000_000), min_size=2, max_size=6), st.sampled_from([4, 16]))
def test_scores_of_rotated_vectors_depend_on_distance_only(positions, head_dim):
    queries, keys = torch.randn(2, 1, 1, 1, head_dim).expand(2, 1, len(positions), 1, head_dim)
    at = torch.tensor([positions])
    for layout in ("interleaved", "half"):
        for shift in (0, 1, 12_345):
            factors = spec(head_dim=head_dim).rotation(at + shift)
            turned = [rotate(x, factors, layout)[0, :, 0] for x in (queries, keys)]
            scores = turned[0] @ turned[1].T
            if shift == 0:
                expected = scores
            torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_rotation_turns_interleaved_pairs():
    factors = spec(theta=10_000.0).rotation(torch.tensor([[0, 3]]))
    x = torch.tensor([[1.0, 0.0, 2.0, 0.0]]).expand(1, 2, 1, 4)
    turned = rotate(x, factors)
    assert torch.equal(turned[0, 0], x[0, 0])
    torch.testing.assert_close(turned[0, 1, 0, :2], torch.tensor([math.cos(3.0), math.sin(3.0)]))


@given(st.integers(1, 4), st.integers(1, 9))
def test_layouts_of_rotation_differ_by_a_permutation(heads, length):
    x = torch.randn(1, length, heads, 8)
    factors = spec(head_dim=8).rotation(torch.arange(length)[None])
    halves_from_pairs = torch.arange(8).view(4, 2).T.flatten()
    turned = rotate(x, factors)[..., halves_from_pairs]
    assert torch.equal(turned, rotate(x[..., halves_from_pairs], factors, "half"))


def frequencies(theta=10_000.0, head_dim=64):
    return theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)


def test_linear_scaling_stretches_positions():
    scaling = RopeScaling(kind="linear", factor=4.0)
    positions = torch.arange(0, 400, 4)[None]
    stretched = spec(head_dim=64, scaling=scaling).rotation(positions)
    torch.testing.assert_close(stretched, spec(head_dim=64).rotation(positions // 4))


@given(st.floats(1.0, 32.0), st.floats(0.5, 2.0), st.floats(2.5, 8.0))
def test_llama3_scaling_slows_the_slow_and_leaves_the_fast(factor, low, high):
    scaling = RopeScaling(kind="llama3", factor=factor, low_freq_factor=low, high_freq_factor=high)
    before = frequencies()
    after = scale_frequencies(before, scaling)
    wavelengths = 2 * math.pi / before
    slow, fast = wavelengths > 8192 / low, wavelengths < 8192 / high
    torch.testing.assert_close(after[slow], before[slow] / factor)
    torch.testing.assert_close(after[fast], before[fast])
    assert ((after <= before * (1 + 1e-12)) & (after >= before / factor * (1 - 1e-12))).all()
    # Monotonic: no frequency overtakes another.
    assert (after.diff() < 0).all()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_heads": 4, "num_kv_heads": 2},
        {"num_heads": 4, "num_kv_heads": 1, "head_dim": 12},
        {"qk_norm": True, "qkv_bias": True, "out_bias": True},
        {"rope_layout": "half"},
    ],
)
@given(documents_rows, windows)
def test_self_attention_equals_its_definition(changes, documents, window):
    """Written with loops over heads, from the equations."""
    config = block_config(**changes)
    module = randomise_module(SelfAttention(config), seed=1)
    x = torch.randn(1, len(documents), config.dim)
    positions = torch.arange(len(documents))[None]
    context = StackSpec(1, config.kv_heads, config.head_width, 100.0, None, window).over_rows(
        documents[None], positions
    )
    heads = functional.linear(x, module.qkv.weight, module.qkv.bias)
    heads = heads.unflatten(-1, (-1, config.head_width)).unbind(2)
    num, kv = config.num_heads, config.kv_heads
    queries, keys, values = heads[:num], heads[num : num + kv], heads[num + kv :]
    allowed = Mask(documents[None], window).allowed(0, len(documents))[0]
    outputs = []
    for number, query in enumerate(queries):
        key, value = keys[number * kv // num], values[number * kv // num]
        if config.qk_norm:
            query, key = module.query_norm(query), module.key_norm(key)
        query, key = (
            rotate(one[:, :, None], context.factors, config.rope_layout)[0, :, 0]
            for one in (query, key)
        )
        scores = query @ key.T / config.head_width**0.5
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        outputs.append(weights @ value[0])
    expected = functional.linear(torch.cat(outputs, -1)[None], module.out.weight, module.out.bias)
    torch.testing.assert_close(module(x, context), expected, rtol=1e-4, atol=1e-5)


def test_norms_compute_in_the_precision_of_their_input():
    norm = RMSNorm(8, eps=1e-5)
    x = torch.randn(3, 8)
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    expected = x / x.square().mean(-1, keepdim=True).add(1e-5).sqrt()
    torch.testing.assert_close(norm(x), expected)


def test_kernels_list_what_they_export():
    assert sorted(kernels.__all__) == kernels.__all__
