"""Apply parallelism to a model from outside: activation checkpointing, compilation, sharding.

They keep the module and its parts where they are, since the language model holds them already.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from bytelm.config import TrainConfig
from bytelm.errors import ConfigError
from bytelm.lm import CausalLM
from bytelm.model.embedding import HashEmbedding
from bytelm.model.layers import Block, EncoderCrossAttention
from bytelm.shards import Part, is_sharded, part_of
from bytelm.training.distributed import World

SAVED = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
}
"""Operations whose results selective checkpointing keeps: those that cost most to repeat."""


def compiles(config: TrainConfig, device: torch.device) -> bool:
    """Whether a run on a device compiles its model: by default on CUDA only."""
    return device.type == "cuda" if config.compile is None else config.compile


def parallelize(
    lm: CausalLM, config: TrainConfig, device: torch.device, world: World | None = None
) -> None:
    """Prepare a model, in place, for training on the devices of all ranks.

    In this order: activation checkpointing of the blocks, compilation, sharding with FSDP2, and
    initialisation of a model on the meta device. Alone, the model is only moved to its device and
    compiled as a whole.

    Args:
        lm: the language model, whose trained part may be on any device.
        config: configuration of the run.
        device: device of this rank.
        world: the ranks; ``None`` for one.

    Raises:
        ConfigError: the ranks cannot form groups of ``train.shard_ranks``.
    """
    world, model = world or World(), lm.trained
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    by_block = config.compile_blocks or world.size > 1
    is_compiled = compiles(config, device)
    for block in blocks:
        if config.activation_checkpointing != "none":
            _set_forward(block, _checkpointed(block.forward, config.activation_checkpointing))
        if is_compiled and by_block:
            # Not the block itself, whose hooks gather its weights.
            _set_forward(block, torch.compile(block.forward, dynamic=False))
    if world.size > 1:
        shard(lm, config, device, world)
    if any(parameter.is_meta for parameter in model.parameters()):
        initialise(model, device, config.seed)
    else:
        model.to(device)
    if is_compiled and not by_block:
        model.compile(dynamic=False)


def _set_forward(module: nn.Module, function: Callable[..., Any]) -> None:
    # An attribute of the instance takes precedence over the class's method.
    module.__dict__["forward"] = function


def _checkpointed(forward: Callable[..., Any], kind: str) -> Callable[..., Any]:
    """Return a forward pass that is repeated in the backward pass instead of being remembered."""
    if kind == "block":
        return partial(checkpoint, forward, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return partial(checkpoint, forward, use_reentrant=False, context_fn=contexts)


def _policy(context: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    is_saved = operation in SAVED
    return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE


def shard(lm: CausalLM, config: TrainConfig, device: torch.device, world: World) -> None:
    """Shard a model's trained parameters over the ranks, and sum the gradients of the ranks.

    ``fully_shard`` gathers a module's weights when it is called, so it is applied to modules that
    are entered through their forward pass alone: the blocks of every stack, the embedding, the
    encoder's cross-attentions, and the language model, whose group has the rest. ``encoder`` and
    ``decoder`` of a BLT are entered through other methods too, as are the decoder's
    cross-attentions, and with a learned patching rule the BLT itself.

    Raises:
        ConfigError: the ranks cannot form groups of ``train.shard_ranks``.
    """
    # Importing FSDP takes longer than the rest of a short command, which does not need it.
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    cast = config.precision_on(device.type) == "bfloat16"
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if cast else None, reduce_dtype=torch.float32
    )
    options = {"mesh": device_mesh(config, device, world), "mp_policy": policy}
    for module in _gathered_alone(lm.trained):
        fully_shard(module, reshard_after_forward=config.reshard, **options)
        _mark_points(module, world)
    trained = set(lm.trained.parameters())
    fully_shard(lm, ignored_params=set(lm.parameters()) - trained, **options)
    for module in lm.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by the targets of all ranks already.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _mark_points(module: nn.Module, world: World) -> None:
    """Mark the points at which a rank waits for the others in a sharded module's passes.

    ::

        forward     mark, gather weights, compute
        backward    mark, gather weights, compute, mark, sum gradients

    The last mark is made when the gradient of the module's inputs is known; an embedding's inputs
    have none, so those of its weights count.
    """
    marked = set[Tensor]()

    def before_forward(*_: Any) -> None:
        world.mark()

    def mark_gradient(*tensors: Any) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda _: world.mark())

    def at_inputs(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        if any(isinstance(one, Tensor) and one.requires_grad for one in inputs):
            mark_gradient(*inputs)
            return
        # FSDP has gathered the weights, in the same tensors every time.
        weights = [one for one in module.parameters() if one not in marked]
        marked.update(weights)
        mark_gradient(*weights)

    def at_outputs(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        mark_gradient(output)

    # FSDP's hooks wait. They come first before the module, and last after it.
    module.register_forward_pre_hook(before_forward, prepend=True)
    module.register_forward_pre_hook(at_inputs)
    module.register_forward_hook(at_outputs, prepend=True)


def _gathered_alone(model: nn.Module) -> Iterator[nn.Module]:
    kinds = (Block, EncoderCrossAttention, HashEmbedding)
    return (module for module in list(model.modules()) if isinstance(module, kinds))


def can_initialise_shards(model: nn.Module) -> bool:
    """Whether :func:`initialise` sets all that a model on the meta device has.

    It does not if the model or its learned patching rule draws values when it is built.
    """
    is_meta = all(parameter.is_meta for parameter in model.parameters())
    return is_meta and not list(model.buffers()) and hasattr(model, "initialisers")


def initialise(model: Any, device: torch.device, seed: int) -> None:
    """Give a sharded model on the meta device memory, and the initial weights of a single device.

    Every rank draws each parameter whole, in the same order, and keeps its rows: ::

        rank 0   draw a, keep rows 0-3   draw b, keep rows 0-1   ...
        rank 1   draw a, keep rows 4-7   draw b, keep rows 2-3   ...

    So weights do not depend on the number of ranks, and a rank holds one whole parameter at a time.

    Args:
        model: a model for which :func:`can_initialise_shards` was true before it was sharded.
        device: device of this rank.
        seed: seed of the weights.
    """
    model.to_empty(device=device)
    for parameter, fill in model.initialisers(torch.Generator().manual_seed(seed)):
        _fill_part(part_of(parameter), fill)


def _fill_part(part: Part, fill: Callable[[Tensor], object]) -> None:
    # A function of its own, so that the whole tensor is freed before the next one is drawn.
    drawn = torch.empty(part.shape, dtype=part.rows.dtype)
    fill(drawn)
    part.rows.copy_(drawn[part.begin :][: len(part.rows)])


def device_mesh(config: TrainConfig, device: torch.device, world: World) -> DeviceMesh:
    """Return the mesh of the ranks: groups that share one copy of the weights, and their copies.

    ::

        8 ranks, shard_ranks 4      ranks 0 1 2 3  share a copy
                                    ranks 4 5 6 7  share another, with the same values

    Raises:
        ConfigError: the ranks cannot form groups of ``train.shard_ranks``.
    """
    ranks = config.shard_ranks or world.size
    if world.size % ranks:
        raise ConfigError(
            f"train.shard_ranks is {ranks}, which does not divide the {world.size} ranks: set it "
            "to the number of GPUs of a node, or leave it out"
        )
    if ranks == world.size:
        return init_device_mesh(device.type, (ranks,), mesh_dim_names=("shard",))
    shape = (world.size // ranks, ranks)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that may be sharded as a whole, on every rank."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds: all of it unless it is sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor
