import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from builders import LargestTensor
from bytelm import kernels

segment_rows = st.lists(
    st.lists(st.integers(0, 4), min_size=7, max_size=7), min_size=1, max_size=3
).map(lambda rows: torch.tensor(rows).sort(1).values)


def agree(fast, reference, *inputs):
    """Outputs and gradients of the two are equal to rounding."""
    results = []
    for function in (fast, reference):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        out = torch.cat([x.flatten() for x in out]) if isinstance(out, tuple) else out
        generator = torch.Generator().manual_seed(3)
        (out * torch.randn(out.shape, generator=generator)).sum().backward()
        results.append((out, *(leaf.grad for leaf in leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@given(segment_rows)
def test_segment_max_equals_its_reference(ids):
    values = torch.randn(*ids.shape, 6)
    agree(
        lambda v: kernels.segment_max(v, ids, 4),
        lambda v: kernels.reference_segment_max(v, ids, 4),
        values,
    )


@given(segment_rows, st.sampled_from([1, 2, 3]))
def test_encoder_cross_attention_equals_its_reference(ids, slots):
    batch, length = ids.shape
    queries = torch.randn(batch, 4, slots, 2, 6)
    keys, values = torch.randn(2, batch, length, 2, 6)
    agree(
        lambda *x: kernels.encoder_cross_attention(*x, ids),
        lambda *x: kernels.reference_encoder_cross_attention(*x, ids),
        queries,
        keys,
        values,
    )


@given(segment_rows, st.sampled_from([1, 2, 3]))
def test_decoder_cross_attention_equals_its_reference(ids, slots):
    batch, length = ids.shape
    queries = torch.randn(batch, length, 2, 6)
    keys, values = torch.randn(2, batch, 5, slots, 2, 6)
    agree(
        lambda *x: kernels.decoder_cross_attention(*x, ids),
        lambda *x: kernels.reference_decoder_cross_attention(*x, ids),
        queries,
        keys,
        values,
    )


@given(
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 30),
    st.sampled_from(["all", "some", "none"]),
)
def test_chunks_of_cross_entropy_equal_the_whole(batch, length, chunk, ignored):
    targets = torch.randint(0, 50, (batch, length))
    share = {"all": 1.0, "some": 0.5, "none": 0.0}[ignored]
    targets[torch.rand(batch, length) < share] = -100
    states, weight = torch.randn(batch, length, 6), torch.randn(50, 6)
    results = []
    for function in (
        kernels.reference_target_nats,
        lambda *x: kernels.target_nats(*x, chunk=chunk),
    ):
        x, w = (one.clone().requires_grad_() for one in (states, weight))
        nats = function(lambda some, w=w: some @ w.T, x, targets)
        (nats * torch.linspace(1, 2, length)).sum().backward()
        results.append((nats, x.grad, w.grad))
    for a, b in zip(*results, strict=True):
        scale = float(b.detach().abs().max())
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6 * scale)


class LargestResult(TorchDispatchMode):
    """The most elements of a tensor that an operation returns, also in the backward pass."""

    num_elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, torch.Tensor):
                self.num_elements = max(self.num_elements, one.numel())
        return result


def test_chunked_cross_entropy_has_no_more_logits_than_those_of_a_chunk():
    states, weight = (torch.randn(*s, requires_grad=True) for s in ((2, 64, 4), (100, 4)))
    targets = torch.randint(0, 100, (2, 64))
    with LargestResult() as largest:
        nats = kernels.target_nats(lambda x: x @ weight.T, states, targets, chunk=16)
        nats.sum().backward()
    assert largest.num_elements == 16 * 100


def test_gradients_hold_in_double_precision():
    """Against finite differences, which have no formula to share a mistake with."""
    x, norm, gate_up, down = (
        torch.randn(s, dtype=torch.float64, requires_grad=True)
        for s in ((3, 4), (4,), (6, 4), (4, 3))
    )

    def feed_forward(*inputs):
        return kernels.feed_forward(*inputs, 1e-5)

    def norm_linear(*inputs):
        return kernels.norm_linear(*inputs, 1e-5)

    assert torch.autograd.gradcheck(feed_forward, (x, norm, gate_up, down))
    assert torch.autograd.gradcheck(norm_linear, (x, norm, gate_up))


def test_projections_keep_little_for_the_backward_pass():
    """Nothing of the width of the hidden layer, and no normalised copy of the input."""
    x = torch.randn(512, 32, requires_grad=True)
    norm, gate_up, down = torch.ones(32), torch.randn(256, 32), torch.randn(32, 128)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kernels.feed_forward(x, norm, gate_up, down, 1e-5)
    assert sum(t.numel() for t in kept) == x.numel() + norm.numel() + gate_up.numel() + down.numel()


def test_empty_and_stray_segments_yield_zero_and_no_gradient():
    ids = torch.tensor([[0, 0, 2, 3]])  # segment 1 is empty, element 3 belongs to none of 3
    values = torch.randn(1, 4, 2, requires_grad=True)
    out = kernels.segment_max(values, ids, 3)
    assert out[0, 1].eq(0).all()
    out.sum().backward()
    assert values.grad is not None
    assert values.grad[0, 3].eq(0).all()


def test_encoder_cross_attention_survives_scores_that_overflow_exp():
    ids = torch.tensor([[0, 0]])
    queries = torch.full((1, 1, 1, 1, 1), 100.0)
    keys = torch.tensor([200.0, -200.0]).view(1, 2, 1, 1)
    values = torch.tensor([3.0, 5.0]).view(1, 2, 1, 1)
    assert kernels.encoder_cross_attention(queries, keys, values, ids).item() == pytest.approx(3.0)


@pytest.mark.parametrize("fast", ["encoder", "decoder"])
def test_memory_of_cross_attention_is_linear(fast):
    """No intermediate holds bytes x patches numbers."""
    num_bytes, patches = 4096, 1024
    ids = torch.arange(num_bytes)[None] // 4
    per_byte, per_slot = torch.randn(1, num_bytes, 1, 4), torch.randn(1, patches, 2, 1, 4)
    with LargestTensor() as largest:
        if fast == "encoder":
            kernels.encoder_cross_attention(per_slot, per_byte, per_byte, ids)
        else:
            kernels.decoder_cross_attention(per_byte, per_slot, per_slot, ids)
    assert 0 < largest.num_bytes <= num_bytes * 2 * 4 * 8 < num_bytes * patches


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_long_patch_in_bf16_loses_nothing(device):
    """A running sum of ones in bf16 would stop at 256."""
    length = 4096
    ones = torch.ones(1, length, 1, 4, dtype=torch.bfloat16, device=device)
    query = torch.zeros(1, 1, 1, 1, 4, dtype=torch.bfloat16, device=device)
    ids = torch.zeros(1, length, dtype=torch.long, device=device)
    out = kernels.encoder_cross_attention(query, ones, ones, ids)
    assert out.dtype == torch.bfloat16
    assert (out == 1).all()
