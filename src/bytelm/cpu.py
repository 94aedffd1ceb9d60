"""The CPU's fast path, applied to a model from outside.

``fuse(model)`` gives stacks, blocks, cross-attentions and heads of a model other forward passes
that compute the same. Over rows these join norms with the projection that follows them, and keep
little for gradients (:mod:`bytelm.kernels.projections`). A single position of a cache costs more in
calls than in arithmetic: it goes through a whole stack with as few of them as possible. The model
itself, unfused, is the readable twin.

A fused pass first looks at the layers that it takes over. If one is not what it was built as (a
LoRA wrapper, quantised weights, a hook), or inputs are not eager fp32 or fp64 on the CPU, the
model's own pass runs instead.
"""

from collections.abc import Callable, Iterator, Sequence
from threading import get_ident
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from bytelm import kernels
from bytelm.model.attention import LayerContext
from bytelm.model.blt import GlobalTransformer, LocalDecoder, LocalEncoder
from bytelm.model.embedding import HashEmbedding
from bytelm.model.layers import Block, CrossAttention
from bytelm.model.transformer import Transformer

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def fuse(model: ModuleT) -> ModuleT:
    """Speed up a model on the CPU; returns the model. It computes, saves and trains as before."""
    for module in model.modules():
        for method, fused in _passes_of(module):
            # In the instance's own dictionary, where it takes precedence over the class's method.
            module.__dict__[method] = fused(module, method)
    return model


def unfuse(model: ModuleT) -> ModuleT:
    """Undo :func:`fuse`."""
    for module in model.modules():
        for method in [k for k, value in module.__dict__.items() if isinstance(value, _Fused)]:
            del module.__dict__[method]
    return model


def _passes_of(module: nn.Module) -> Iterator[tuple[str, Callable[[Any, str], "_Fused"]]]:
    """Yield the methods of a module that have a fused pass."""
    if isinstance(module, Block) and _is_plain(module):
        yield "forward", _FusedBlock
    elif isinstance(module, CrossAttention):
        yield "project_queries", _FusedQueries
        yield "project_keys_values", _FusedKeysValues
    elif isinstance(module, HashEmbedding) and module.ngrams is not None:
        yield "last", _FusedLastEmbedding
    elif isinstance(module, Transformer | LocalEncoder | GlobalTransformer | LocalDecoder):
        if isinstance(module, Transformer | LocalDecoder):
            yield "logits", _FusedLogits
        if all(isinstance(block, Block) and _is_plain(block) for block in module.blocks):
            yield _STACKS[type(module)]


def _is_plain(block: Block) -> bool:
    """Whether a block has none of the options that fused passes leave out."""
    attention, feed_forward = block.attention, block.feed_forward
    linears = (attention.qkv, attention.out, feed_forward.gate_up, feed_forward.down)
    has_bias = any(getattr(linear, "bias", None) is not None for linear in linears)
    is_interleaved = attention.rope_layout == "interleaved"
    return is_interleaved and attention.query_norm is None and not has_bias


class _Fused:
    """A pass in place of a module's own, as long as the layers that it takes over are as built.

    Args:
        owner: the module.
        method: which of its methods this is.
        layers: names of the layers whose weights are used.
        containers: names of modules around them, which are not called either.
    """

    def __init__(
        self, owner: Any, method: str, layers: Sequence[str], containers: Sequence[str] = ()
    ) -> None:
        self.owner, self.method = owner, method
        # Looked at often, hence flat: dictionaries of hooks, and where each module was found.
        self._hooks: list[dict[int, Any]] = []
        self._places: list[tuple[dict[str, Any], str, nn.Module]] = []
        for name in (*containers, *layers):
            parent, _, leaf = name.rpartition(".")
            module = owner.get_submodule(name)
            self._places.append((owner.get_submodule(parent)._modules, leaf, module))
            self._hooks += [module._forward_hooks, module._forward_pre_hooks]
            self._hooks += [module._backward_hooks, module._backward_pre_hooks]
        self._parameters = [owner.get_submodule(name)._parameters for name in layers]

    def weights(self, x: Tensor) -> Any:
        """Return the layers' weights; ``None`` where the layers must be called themselves."""
        found = [parameters["weight"] for parameters in self._parameters]
        is_as_built = (
            kernels.is_eager_cpu(x)
            and not any(self._hooks)
            and not _has_any_global_hook()
            and all(siblings[name] is module for siblings, name, module in self._places)
            # Quantised weights, for one, are of other types, and mean something else.
            and all(type(weight) is nn.Parameter for weight in found)
        )
        return found if is_as_built else None

    def own(self, *arguments: Any) -> Any:
        """Run the module's own method."""
        return getattr(type(self.owner), self.method)(self.owner, *arguments)


BLOCK_LAYERS = (
    "attention_norm",
    "attention.qkv",
    "attention.out",
    "feed_forward_norm",
    "feed_forward.gate_up",
    "feed_forward.down",
)
BLOCK_CONTAINERS = ("attention", "feed_forward")
CROSS_LAYERS = ("query_norm", "query", "out")


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
        both = kernels.norm_linear(x, norm, key_value, self.owner.key_value_norm.eps)
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
    """``last`` of a :class:`HashEmbedding`: hashes by integers instead of dozens of tensors."""

    def __init__(self, embedding: HashEmbedding, method: str) -> None:
        super().__init__(embedding, method, ("ids", "ngrams"))

    def __call__(self, ids: Int[Tensor, "batch ids"]) -> Float[Tensor, "batch 1 dim"]:
        embedding: HashEmbedding = self.owner
        weights = None
        if len(ids) == 1 and not torch.is_grad_enabled():
            weights = self.weights(embedding.ids.weight)
        if weights is None:
            return self.own(ids)
        (numbers,) = ids.tolist()
        hashes = [
            value
            for prime in embedding.primes
            for value in _hashes(numbers, embedding.sizes, prime)
        ]
        size = embedding.num_buckets
        rows = [value % size + k * size for k, value in enumerate(hashes)]
        grams = weights[1].index_select(0, torch.tensor(rows)).sum(0)
        return ((weights[0][numbers[-1]] + grams) * embedding.scale)[None, None]


def _hashes(ids: Sequence[int], sizes: Sequence[int], prime: int) -> list[int]:
    """Return :func:`~bytelm.model.embedding.ngram_hashes` at the last of a document's ids."""
    by_size = {}
    running = 0
    for n in range(1, max(sizes) + 1):
        running = (ids[-n] + running * prime) % 2**64
        by_size[n] = running
    return [by_size[n] - 2**64 * (by_size[n] >= 2**63) for n in sizes]


class _FusedStack(_Fused):
    """A pass through a stack of blocks: of one position in a cache, as few calls as can be.

    Buffers and views of weights are made for each thread by its first position after a prompt, and
    trusted until the next pass over rows: what is changed in the middle of a document counts from
    the next document on.
    """

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
        self._made: dict[int, _Step] = {}

    def __call__(self, x: Float[Tensor, "batch length dim"], *rest: Any) -> Any:
        context = rest[-1]
        if torch.is_grad_enabled() or not hasattr(context, "append"):
            self._made = {}
            return self.own(x, *rest)
        step = self._made.get(get_ident())
        if step is None:
            weights = self.weights(x)
            if weights is None:
                return self.own(x, *rest)
            step = self._made[get_ident()] = self.make_step(iter(weights))
        return step(x[0], *rest)

    def make_step(self, weights: Iterator[Tensor]) -> "_Step":
        """Make the buffers of a thread."""
        return _Step(self.owner, weights)

    def __getstate__(self) -> dict[str, Any]:
        # Copies of a model make buffers of their own.
        return {**self.__dict__, "_made": {}}


class _Step:
    """One position through a stack; its output alone, as a global transformer has it."""

    def __init__(self, owner: Any, weights: Iterator[Tensor]) -> None:
        self._blocks = [_BlockStep(block, weights) for block in owner.blocks]

    def __call__(self, x: Float[Tensor, "1 dim"], *rest: Any) -> Any:
        (context,) = rest
        for layer, block in enumerate(self._blocks):
            x = block(x, layer, context)
        return x[None]


class _EncoderStep(_Step):
    """One byte through a local encoder: the states of the layers that patches read."""

    def __init__(self, owner: LocalEncoder, weights: Iterator[Tensor]) -> None:
        super().__init__(owner, weights)
        self._num_read = owner.num_read

    def __call__(self, x: Float[Tensor, "1 dim"], *rest: Any) -> Any:
        (context,) = rest
        states = []
        for layer, block in enumerate(self._blocks):
            x = block(x, layer, context)
            states.append(x[None])
        return states[-self._num_read :]


class _TransformerStep(_Step):
    """One id through a transformer: its logits."""

    def __init__(self, owner: Any, weights: Iterator[Tensor]) -> None:
        super().__init__(owner, weights)
        self._logits = _NormLinear(next(weights), next(weights), owner.norm.eps)

    def __call__(self, x: Float[Tensor, "1 dim"], *rest: Any) -> Any:
        (context,) = rest
        for layer, block in enumerate(self._blocks):
            x = block(x, layer, context)
        return self._logits(x).to(torch.float32, copy=True)[None]


class _DecoderStep(_TransformerStep):
    """One byte, which reads one latent, through a local decoder: its logits."""

    def __init__(self, owner: Any, weights: Iterator[Tensor]) -> None:
        super().__init__(owner, weights)
        self._crosses = [_CrossStep(cross, weights) for cross in owner.cross_attention]

    def __call__(self, x: Float[Tensor, "1 dim"], *rest: Any) -> Any:
        readable, _, context = rest
        if not self._crosses:
            ((slots,),) = readable
            x = x + slots[0, :, 0]
        for layer, block in enumerate(self._blocks):
            if layer < len(self._crosses):
                x = self._crosses[layer](x, *readable[layer])
            x = block(x, layer, context)
        return self._logits(x).to(torch.float32, copy=True)[None]


class _FusedEncoder(_FusedStack):
    """``forward`` of a :class:`LocalEncoder`."""

    def make_step(self, weights: Iterator[Tensor]) -> _Step:
        return _EncoderStep(self.owner, weights)


class _FusedTransformer(_FusedStack):
    """``run`` of a :class:`Transformer`."""

    def __init__(self, transformer: Transformer, method: str) -> None:
        super().__init__(transformer, method, ("norm", "output"))

    def make_step(self, weights: Iterator[Tensor]) -> _Step:
        return _TransformerStep(self.owner, weights)


class _FusedDecoder(_FusedStack):
    """``forward`` of a :class:`LocalDecoder`."""

    def __init__(self, decoder: LocalDecoder, method: str) -> None:
        crosses = [f"cross_attention.{n}" for n in range(len(decoder.cross_attention))]
        layers = [f"{cross}.{layer}" for cross in crosses for layer in CROSS_LAYERS]
        super().__init__(decoder, method, ("norm", "output", *layers), crosses)

    def make_step(self, weights: Iterator[Tensor]) -> _Step:
        return _DecoderStep(self.owner, weights)


_STACKS: dict[type[nn.Module], tuple[str, Callable[[Any, str], _Fused]]] = {
    Transformer: ("run", _FusedTransformer),
    LocalEncoder: ("forward", _FusedEncoder),
    GlobalTransformer: ("forward", _FusedStack),
    LocalDecoder: ("forward", _FusedDecoder),
}


class _BlockStep:
    """One position through a block."""

    def __init__(self, block: Block, weights: Iterator[Tensor]) -> None:
        attention_norm, qkv, out, feed_forward_norm, gate_up, down = (
            next(weights) for _ in BLOCK_LAYERS
        )
        kv_heads, head_dim = block.attention.kv_heads, block.attention.head_dim
        self._project = _NormLinear(attention_norm, qkv, block.attention_norm.eps)
        heads = self._project.out.view(-1, head_dim)
        self._rotated = torch.view_as_complex(heads[:-kv_heads].unflatten(-1, (-1, 2)))
        self._key, self._value = heads[-2 * kv_heads : -kv_heads], heads[-kv_heads:]
        self._attend = _Attend(heads[: -2 * kv_heads].view(kv_heads, -1, head_dim))
        self._out = out.T
        self._gate_up = _NormLinear(feed_forward_norm, gate_up, block.feed_forward_norm.eps)
        self._gate, self._up = self._gate_up.out.chunk(2, dim=-1)
        self._down = down.T

    def __call__(
        self, x: Float[Tensor, "1 dim"], layer: int, context: Any
    ) -> Float[Tensor, "1 dim"]:
        self._project(x)
        self._rotated.mul_(context.factor)
        keys, values = context.append(layer, self._key, self._value)
        x = torch.addmm(x, self._attend(keys, values), self._out)
        self._gate_up(x)
        hidden = nn.functional.silu(self._gate).mul_(self._up)
        return torch.addmm(x, hidden, self._down, out=x)


class _CrossStep:
    """One byte through a decoder's cross-attention."""

    def __init__(self, cross: Any, weights: Iterator[Tensor]) -> None:
        norm, query, out = (next(weights) for _ in CROSS_LAYERS)
        self._project = _NormLinear(norm, query, cross.query_norm.eps)
        self._attend = _Attend(self._project.out.view(cross.num_heads, 1, -1))
        self._out = out.T
        self._residual_scale = cross.residual_scale
        self._read: tuple[Any, Any] = (None, None)

    def __call__(
        self,
        x: Float[Tensor, "1 dim"],
        keys: Float[Tensor, "1 1 slots heads head_dim"],
        values: Float[Tensor, "1 1 slots heads head_dim"],
    ) -> Float[Tensor, "1 dim"]:
        """Let the byte read the slots of one latent."""
        if self._read[0] is not keys:
            # Views, which show what is written there later as well.
            views = keys[0, 0].permute(1, 2, 0), values[0, 0].transpose(0, 1)
            self._read = (keys, views)
        self._project(x)
        mixed = self._attend(*self._read[1])
        return torch.addmm(x, mixed, self._out, beta=self._residual_scale)


class _NormLinear:
    """:func:`bytelm.kernels.norm_linear` of one row, into a buffer."""

    def __init__(self, norm: Tensor, weight: Tensor, eps: float | None) -> None:
        self._norm, self._dim, self._eps = norm, norm.shape[0], eps or 0.0
        self._weight = weight.T
        self._normed = weight.new_empty(1, weight.shape[1])
        self.out = weight.new_empty(1, weight.shape[0])

    def __call__(self, x: Float[Tensor, "1 dim"]) -> Float[Tensor, "1 out"]:
        torch.mul(x, self._norm, out=self._normed)
        row = x[0]
        # The norm's scale is a factor of the product.
        scale = (float(row.dot(row)) / self._dim + self._eps) ** -0.5
        return torch.addmm(self.out, self._normed, self._weight, beta=0, alpha=scale, out=self.out)


class _Attend:
    """Attention of the queries in a buffer; the scale is a factor of the product."""

    def __init__(self, queries: Float[Tensor, "kv_heads group head_dim"]) -> None:
        self._queries = queries
        self._scale = queries.shape[-1] ** -0.5
        self._none = queries.new_zeros(1, 1, 1)
        self._mixed = torch.empty_like(queries)
        self._flat = self._mixed.view(1, -1)

    def __call__(
        self,
        keys: Float[Tensor, "kv_heads head_dim seen"],
        values: Float[Tensor, "kv_heads seen head_dim"],
    ) -> Float[Tensor, "1 heads_by_head_dim"]:
        scores = torch.baddbmm(self._none, self._queries, keys, beta=0, alpha=self._scale)
        torch.bmm(scores.softmax(-1), values, out=self._mixed)
        return self._flat
