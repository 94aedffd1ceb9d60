"""Fused forward passes for the CPU, applied to a model from outside.

``fuse(model)`` replaces the forward passes of a model's stacks, blocks, cross-attentions and output
heads with equivalent ones. For packed rows these fuse each norm with the projection that follows
it, and save few activations for the backward pass (:mod:`bytelm.kernels.projections`). Decoding a
single position is bound by call overhead, not by arithmetic, so it runs a whole stack with as few
calls as possible. The unfused model is the readable reference.

A fused pass first checks the layers that it replaces. If one has been changed (a LoRA wrapper,
quantised weights, a hook), or if the inputs are not eager fp32 or fp64 tensors on the CPU, the
module's own forward pass runs instead.
"""

from collections.abc import Callable, Iterator, Sequence
from threading import get_ident
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from bytelm import kernels
from bytelm.cpu import compiling, products
from bytelm.cpu.compiling import is_worth_it
from bytelm.cpu.int8 import Int8Linear, Int8Weight
from bytelm.cpu.steps import (
    BLOCK_CONTAINERS,
    BLOCK_LAYERS,
    CROSS_LAYERS,
    DecoderStep,
    EncoderStep,
    Step,
    TransformerStep,
    Weight,
)
from bytelm.model.attention import LayerContext, RMSNorm, SelfAttention
from bytelm.model.blt import GlobalTransformer, LocalDecoder, LocalEncoder
from bytelm.model.embedding import HashEmbedding
from bytelm.model.layers import (
    Block,
    CrossAttention,
    DecoderCrossAttention,
    EncoderCrossAttention,
    FeedForward,
)
from bytelm.model.transformer import Transformer

ModuleT = TypeVar("ModuleT", bound=nn.Module)
MAX_STEPS = 64
"""Numbers of rows and threads for which a stack keeps buffers."""


def fuse(model: ModuleT) -> ModuleT:
    """Install fused passes in a model, and return it; results and parameters stay the same."""
    for module in model.modules():
        for method, fused in _passes_of(module):
            # An attribute of the instance takes precedence over the class's method.
            module.__dict__[method] = fused(module, method)
    return model


def unfuse(model: ModuleT) -> ModuleT:
    """Remove the fused passes that :func:`fuse` installed, and return the model."""
    for module in model.modules():
        for method in [k for k, value in module.__dict__.items() if isinstance(value, _Fused)]:
            del module.__dict__[method]
    return model


def _passes_of(module: nn.Module) -> Iterator[tuple[str, Callable[[Any, str], "_Fused"]]]:
    """Yield the methods of a module that have a fused pass."""
    # Exact types: a subclass may compute something else.
    if type(module) is Block and _is_plain(module):
        yield "forward", _FusedBlock
    elif type(module) in (EncoderCrossAttention, DecoderCrossAttention):
        yield "project_queries", _FusedQueries
        yield "project_keys_values", _FusedKeysValues
    elif type(module) is HashEmbedding:
        yield "last", _FusedLastEmbedding
    elif type(module) in _STACKS:
        if type(module) in (Transformer, LocalDecoder):
            yield "logits", _FusedLogits
        blocks: Any = module.blocks
        if all(type(block) is Block and _is_plain(block) for block in blocks):
            yield _STACKS[type(module)]


def _is_plain(block: Block) -> bool:
    """Whether a block uses only options that the fused passes support."""
    attention, feed_forward = block.attention, block.feed_forward
    if type(attention) is not SelfAttention or type(feed_forward) is not FeedForward:
        return False
    linears = (attention.qkv, attention.out, feed_forward.gate_up, feed_forward.down)
    has_bias = any(getattr(linear, "bias", None) is not None for linear in linears)
    is_interleaved = attention.rope_layout == "interleaved"
    return is_interleaved and attention.query_norm is None and not has_bias


class _Fused:
    """Replacement of a module's method, used while the layers that it replaces are unchanged.

    Args:
        owner: the module.
        method: name of the method that is replaced.
        layers: names of the layers whose weights are used.
        containers: names of the modules around them, which are not called either.
    """

    usable: tuple[type, ...] = (nn.Parameter,)
    """Types of weights that the pass can use."""

    def __init__(
        self, owner: Any, method: str, layers: Sequence[str], containers: Sequence[str] = ()
    ) -> None:
        self.owner, self.method = owner, method
        # Checked at every call, hence flat: dictionaries of hooks, and the place of each module.
        self._hooks: list[dict[int, Any]] = []
        self._places: list[tuple[dict[str, Any], str, nn.Module]] = []
        for name in (*containers, *layers):
            parent, _, leaf = name.rpartition(".")
            module = owner.get_submodule(name)
            self._places.append((owner.get_submodule(parent)._modules, leaf, module))
            self._hooks += _hooks_of(module)
        self._layers = [owner.get_submodule(name) for name in layers]
        self._parameters = [layer._parameters for layer in self._layers]

    def weights(self, x: Tensor) -> Any:
        """Return the layers' weights, or ``None`` if the module's own method must run."""
        if not kernels.is_eager_cpu(x) or not self.is_as_built():
            return None
        found = self.found_weights()
        # Quantised weights have other types, whose values cannot be used directly.
        is_plain = all(type(weight) in self.usable and weight.is_cpu for weight in found)
        has_bias = any(parameters.get("bias") is not None for parameters in self._parameters)
        return found if is_plain and not has_bias else None

    def found_weights(self) -> list[Any]:
        """Return what the layers have for weights."""
        return [parameters.get("weight") for parameters in self._parameters]

    def is_as_built(self) -> bool:
        """Whether calling the layers would run their classes' forward passes and nothing else."""
        if any(self._hooks) or _has_any_global_hook():
            return False
        for siblings, name, module in self._places:
            if siblings.get(name) is not module or type(module) not in REPLACED:
                return False
            # Only a fused pass may have been put over a class's own.
            if "forward" in module.__dict__ and not isinstance(module.forward, _Fused):
                return False
        return True

    def own(self, *arguments: Any, **named: Any) -> Any:
        """Run the module's own method."""
        return getattr(type(self.owner), self.method)(self.owner, *arguments, **named)


def _hooks_of(module: nn.Module) -> list[dict[int, Any]]:
    return [
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    ]


REPLACED = {
    nn.Linear,
    nn.Embedding,
    nn.EmbeddingBag,
    Int8Linear,
    RMSNorm,
    SelfAttention,
    FeedForward,
    Block,
    DecoderCrossAttention,
}
"""Classes of the modules that are not called where a fused pass runs."""


class _FusedBlock(_Fused):
    """``forward`` of a :class:`Block`."""

    def __init__(self, block: Block, method: str) -> None:
        super().__init__(block, method, BLOCK_LAYERS, BLOCK_CONTAINERS)
        self.kv_heads = block.attention.kv_heads
        self.attention_eps = block.attention_norm.eps or 0.0
        self.feed_forward_eps = block.feed_forward_norm.eps or 0.0

    def __call__(
        self, x: Float[Tensor, "batch length dim"], context: LayerContext
    ) -> Float[Tensor, "batch length dim"]:
        weights = self.weights(x)
        if weights is None:
            return self.own(x, context)
        attention_norm, qkv, out, feed_forward_norm, gate_up, down = weights
        heads = kernels.rotary_projection(
            x, attention_norm, qkv, context.factors, self.kv_heads, self.attention_eps
        )
        x = x + nn.functional.linear(context.attend(*heads).flatten(2), out)
        return x + kernels.feed_forward(x, feed_forward_norm, gate_up, down, self.feed_forward_eps)


class _FusedQueries(_Fused):
    """``project_queries`` of a :class:`CrossAttention`."""

    def __init__(self, cross: CrossAttention, method: str) -> None:
        super().__init__(cross, method, ("query_norm", "query"))

    def __call__(self, x: Float[Tensor, "*shape dim"]) -> Float[Tensor, "*shape heads head_dim"]:
        weights = self.weights(x)
        if weights is None:
            return self.own(x)
        norm, query = weights
        queries = kernels.norm_linear(x, norm, query, self.owner.query_norm.eps)
        return queries.unflatten(-1, (self.owner.num_heads, -1))


class _FusedKeysValues(_Fused):
    """``project_keys_values`` of a :class:`CrossAttention`."""

    def __init__(self, cross: CrossAttention, method: str) -> None:
        super().__init__(cross, method, ("key_value_norm", "key_value"))

    def __call__(self, x: Float[Tensor, "*shape dim"]) -> tuple[Tensor, Tensor]:
        weights = self.weights(x)
        if weights is None:
            return self.own(x)
        norm, key_value = weights
        eps = self.owner.key_value_norm.eps
        both = products.norm_linear_of_few(x, norm, key_value, eps)
        if both is None:
            both = kernels.norm_linear(x, norm, key_value, eps)
        keys, values = both.unflatten(-1, (2 * self.owner.num_heads, -1)).chunk(2, dim=-2)
        return keys, values


class _FusedLogits(_Fused):
    """``logits`` of a transformer or a decoder."""

    def __init__(self, owner: Any, method: str) -> None:
        super().__init__(owner, method, ("norm", "output"))

    def __call__(self, x: Float[Tensor, "batch bytes dim"]) -> Float[Tensor, "batch bytes vocab"]:
        weights = self.weights(x)
        if weights is None:
            return self.own(x)
        norm, output = weights
        return kernels.norm_linear(x, norm, output, self.owner.norm.eps).float()


class _FusedLastEmbedding(_Fused):
    """``last`` of a :class:`HashEmbedding`, hashing Python integers instead of small tensors."""

    def __init__(self, embedding: HashEmbedding, method: str) -> None:
        names = ("ids", "ngrams") if embedding.ngrams is not None else ("ids",)
        super().__init__(embedding, method, names)
        # Its own forward pass, which its method `last` calls, is replaced as well.
        self._hooks += _hooks_of(embedding)

    def __call__(self, ids: Int[Tensor, "batch ids"]) -> Float[Tensor, "batch 1 dim"]:
        embedding: HashEmbedding = self.owner
        weights = None
        if not torch.is_grad_enabled():
            weights = self.weights(embedding.ids.weight)
        if weights is None:
            return self.own(ids)
        if len(ids) > 1:
            return self._of_several(ids, *weights)
        (numbers,) = ids.tolist()
        if embedding.ngrams is None:
            return weights[0][numbers[-1]][None, None]
        hashes = [
            value
            for prime in embedding.primes
            for value in _hashes(numbers, embedding.sizes, prime)
        ]
        size = embedding.num_buckets
        buckets = [value % size + k * size for k, value in enumerate(hashes)]
        grams = weights[1].index_select(0, torch.tensor(buckets)).sum(0)
        return ((weights[0][numbers[-1]] + grams) * embedding.scale)[None, None]

    def _of_several(
        self, ids: Int[Tensor, "batch ids"], table: Tensor, ngrams: Tensor | None = None
    ) -> Float[Tensor, "batch 1 dim"]:
        """Embed the last id of each of several rows in a kernel, if that is faster."""
        embedding: HashEmbedding = self.owner
        if ngrams is None or not is_worth_it(table):
            return self.own(ids)
        out = torch.empty(len(ids), 1, table.shape[1])
        # Arrays, since tuples of each length would be compiled by themselves.
        numbers = [np.array(one) for one in (embedding.primes, embedding.sizes)]
        arrays = [one.detach().numpy() for one in (ids.contiguous(), table, ngrams)]
        options = *numbers, embedding.num_buckets, embedding.scale
        compiling.kernels().embed(*arrays, *options, out[:, 0].numpy())
        return out


def _hashes(ids: Sequence[int], sizes: Sequence[int], prime: int) -> list[int]:
    """Return :func:`~bytelm.model.embedding.ngram_hashes` of the n-grams ending at the last id."""
    by_size = {}
    running = 0
    for n in range(1, max(sizes) + 1):
        running = (ids[-n] + running * prime) % 2**64
        by_size[n] = running
    return [by_size[n] - 2**64 * (by_size[n] >= 2**63) for n in sizes]


class _FusedStack(_Fused):
    """Forward pass of a stack of blocks, with a fast path for decoding one position of each row.

    Each thread allocates its buffers and views of the weights when it decodes the first positions
    after a prompt, and uses them until the layers change. Weights that move in memory in the middle
    of a document are noticed after the next pass over several positions.
    """

    usable = (nn.Parameter, Int8Weight)

    def __init__(
        self, owner: Any, method: str, layers: Sequence[str] = (), containers: Sequence[str] = ()
    ) -> None:
        numbers = range(len(owner.blocks))
        super().__init__(
            owner,
            method,
            [*(f"blocks.{n}.{layer}" for n in numbers for layer in BLOCK_LAYERS), *layers],
            [
                *(f"blocks.{n}" for n in numbers),
                *(f"blocks.{n}.{name}" for n in numbers for name in BLOCK_CONTAINERS),
                *containers,
            ],
        )
        self._made: dict[tuple[int, int], Step] = {}
        self._made_of: list[Any] | None = None
        """Where the weights of the steps are in memory."""
        self._may_have_moved = False

    def __call__(self, x: Float[Tensor, "batch length dim"], *rest: Any, **named: Any) -> Any:
        if named or torch.is_grad_enabled() or not getattr(rest[-1], "is_step", False):
            self._may_have_moved = True
            return self.own(x, *rest, **named)
        key = get_ident(), len(x)
        if self._may_have_moved:
            self._forget_moved(x)
        step = self._made.get(key)
        if step is None or not self.is_as_built():
            weights = self.weights(x)
            if weights is None:
                self._made = {}
                return self.own(x, *rest)
            if len(self._made) >= MAX_STEPS:
                self._made.clear()
            step = self._made[key] = self.make_step(iter(weights), len(x))
        return step(x[:, 0], *rest)

    def _forget_moved(self, x: Tensor) -> None:
        """Drop the steps if a weight is no longer where it was, or no longer all that there is."""
        self._may_have_moved = False
        weights = self.weights(x)
        places = None if weights is None else [_place(weight) for weight in weights]
        if places != self._made_of:
            self._made, self._made_of = {}, places

    def found_weights(self) -> list[Any]:
        """Return what the layers have for weights."""
        return [
            layer.matrix if type(layer) is Int8Linear else layer._parameters.get("weight")
            for layer in self._layers
        ]

    def make_step(self, weights: Iterator[Weight], rows: int) -> "Step":
        """Allocate the buffers of a thread for a number of rows."""
        return Step(self.owner, weights, rows)

    def __getstate__(self) -> dict[str, Any]:
        # Copies of a model must not share buffers.
        return {**self.__dict__, "_made": {}}


def _place(weight: Any) -> Any:
    """Return where a weight is in memory, and how it is stored."""
    if isinstance(weight, Int8Weight):
        return [one.ctypes.data for one in weight.arrays]
    return weight.data_ptr(), weight.stride(), weight.device, weight.dtype


class _FusedEncoder(_FusedStack):
    """``forward`` of a :class:`LocalEncoder`."""

    def make_step(self, weights: Iterator[Weight], rows: int) -> Step:
        return EncoderStep(self.owner, weights, rows)


class _FusedTransformer(_FusedStack):
    """``run`` of a :class:`Transformer`."""

    def __init__(self, transformer: Transformer, method: str) -> None:
        super().__init__(transformer, method, ("norm", "output"))

    def make_step(self, weights: Iterator[Weight], rows: int) -> Step:
        return TransformerStep(self.owner, weights, rows)


class _FusedDecoder(_FusedStack):
    """``forward`` of a :class:`LocalDecoder`."""

    def __init__(self, decoder: LocalDecoder, method: str) -> None:
        crosses = [f"cross_attention.{n}" for n in range(len(decoder.cross_attention))]
        layers = [f"{cross}.{layer}" for cross in crosses for layer in CROSS_LAYERS]
        super().__init__(decoder, method, ("norm", "output", *layers), crosses)

    def make_step(self, weights: Iterator[Weight], rows: int) -> Step:
        return DecoderStep(self.owner, weights, rows)


_STACKS: dict[type[nn.Module], tuple[str, Callable[[Any, str], _Fused]]] = {
    Transformer: ("run", _FusedTransformer),
    LocalEncoder: ("forward", _FusedEncoder),
    GlobalTransformer: ("forward", _FusedStack),
    LocalDecoder: ("forward", _FusedDecoder),
}
