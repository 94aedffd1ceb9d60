"""Masks of blocks for FlexAttention: checked on the CPU; the kernel with gradients on CUDA."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from bytelm import kernels
from bytelm.kernels.flex import BLOCK, first_keys, flex_mask

rows = st.lists(st.integers(1, 300), min_size=1, max_size=5).map(
    lambda lengths: torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
)
windows = st.sampled_from([None, 1, 2, 100, 128, 129, 512])


def dense(documents, window):
    """What each query sees, position by position."""
    return kernels.Mask(documents, window).allowed(0, documents.shape[1])


@given(rows, windows)
def test_first_keys_say_what_is_seen(documents, window):
    documents = torch.stack([documents, documents.flip(0)])
    index = torch.arange(documents.shape[1])
    seen = (index <= index[:, None]) & (index >= first_keys(documents, window)[..., None])
    assert torch.equal(seen, dense(documents, window))


@given(rows, windows)
def test_blocks_hold_all_that_is_seen_and_full_ones_nothing_else(documents, window):
    mask = flex_mask(documents[None], window)
    length = len(documents)
    num_blocks = -(-length // BLOCK)
    padded = torch.zeros(num_blocks * BLOCK, num_blocks * BLOCK, dtype=torch.bool)
    padded[:length, :length] = dense(documents[None], window)[0]
    blocks = padded.unflatten(0, (num_blocks, BLOCK)).unflatten(2, (num_blocks, BLOCK))
    blocks = blocks.transpose(1, 2)
    real = torch.arange(num_blocks * BLOCK).unflatten(0, (num_blocks, BLOCK)) < length
    is_whole = (blocks | ~real[:, None, :, None]).flatten(2).all(-1)

    def listed(counts, indices):
        table = torch.zeros(num_blocks, num_blocks, dtype=torch.bool)
        for row, (count, order) in enumerate(zip(counts[0, 0], indices[0, 0], strict=True)):
            table[row, order[:count].long()] = True
        return table

    partial = listed(mask.kv_num_blocks, mask.kv_indices)
    full = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not (partial & full).any()
    assert torch.equal(partial | full, blocks.flatten(2).any(-1))
    assert is_whole[full].all()


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_under_the_mask_equals_the_reference(window):
    documents = torch.arange(3).repeat_interleave(torch.tensor([130, 1, 169]))[None]
    queries, keys, values = torch.randn(3, 1, 300, 2, 16)
    mask = flex_mask(documents, window)
    heads_first = (x.transpose(1, 2) for x in (queries, keys, values))
    out = flex_attention(*heads_first, block_mask=mask).transpose(1, 2)
    expected = kernels.reference_attention(queries, keys, values, kernels.Mask(documents, window))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [8, 64])
@pytest.mark.parametrize("window", [None, 100, 512])
def test_attention_on_cuda_equals_the_reference_with_gradients(window, head_dim):
    documents = torch.arange(4).repeat_interleave(torch.tensor([700, 1, 900, 447]))[None].cuda()
    mask = kernels.Mask(documents, window)
    queries = torch.randn(1, 2048, 4, head_dim, device="cuda")
    inputs = [queries, *torch.randn(2, 1, 2048, 2, head_dim, device="cuda")]
    results = []
    for function in (
        lambda *x: kernels.attention(*x, kernels.plan_attention(mask)),
        lambda *x: kernels.reference_attention(*x, mask),
    ):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        (out * inputs[0].sin()).sum().backward()
        results.append((out, *(leaf.grad for leaf in leaves)))
    for fast, reference in zip(*results, strict=True):
        torch.testing.assert_close(fast, reference, rtol=1e-2, atol=1e-2)


COMPILED = """
import torch
from bytelm.kernels import Mask, reference_attention
from bytelm.kernels.flex import flex, flex_mask

@torch.compile(fullgraph=True, backend="aot_eager")
def attend(queries, keys, values, documents):
    mask = flex_mask(documents, 100)
    return flex(*(x.transpose(1, 2) for x in (queries, keys, values)), mask).transpose(1, 2)

inputs = torch.randn(3, 1, 384, 2, 12).unbind()  # heads smaller than kernels take
for first in (130, 30, 384):
    documents = torch.arange(384)[None].ge(first).long()
    expected = reference_attention(*inputs, Mask(documents, 100))
    torch.testing.assert_close(attend(*inputs, documents), expected, rtol=1e-5, atol=1e-5)
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
"""


@pytest.mark.slow
def test_mask_and_attention_compile_to_one_graph_whatever_the_documents():
    # In a process of its own: the type checks of this one cannot be compiled.
    subprocess.run([sys.executable, "-c", COMPILED], check=True)
