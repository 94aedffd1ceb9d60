"""Memory, time and storage of training a recipe on several GPUs, before it is started.

Memory of a GPU, for a model of P parameters that S ranks share, with e bytes per element::

    weights, gradients, moments   16 P / S          fp32, AdamW
    gathered                      the weights of the groups that are computed, and their gradients
    activations                   1.2 e x (inputs + outputs) of every matrix, for every vector that
                                  it is applied to

The factor 1.2 is for norms, rotations and activation functions: measured, what the backward pass of
small models keeps is 1.14 to 1.24 times the inputs and outputs (tests/test_planning.py). Of a large
vocabulary, whose cross-entropy is computed in chunks, only the states before the output matrix are
kept, and the logits of one chunk exist at a time (:mod:`bytelm.kernels.cross_entropy`).
"""

from typing import NamedTuple

from bytelm.accounting.breakdown import break_down_recipe
from bytelm.accounting.exact import TRAINING_BYTES
from bytelm.accounting.parts import Matrix, Part, model_parts
from bytelm.config import Recipe
from bytelm.errors import ConfigError

ACTIVATION_FACTOR = 1.2
"""What the backward pass keeps, relative to the inputs and outputs of matrices."""
DAY = 86_400
RESERVED = 0.1
"""Share of a GPU's memory for the CUDA context, buffers of communication and fragmentation."""


class Gpu(NamedTuple):
    """A kind of GPU, from its data sheet."""

    peak_flops: float
    """FLOP/s in bfloat16, without sparsity."""
    memory: float
    """Bytes of memory."""


GIB = 2**30
GPUS = {
    "a100": Gpu(312e12, 80 * GIB),
    "h100": Gpu(989e12, 80 * GIB),
    "h200": Gpu(989e12, 141e9),
    "b200": Gpu(2250e12, 180e9),
    "l40s": Gpu(362e12, 48 * GIB),
    "4090": Gpu(165e12, 24 * GIB),
}
"""Kinds of GPUs by a part of their name, in lower case."""


class PartMemory(NamedTuple):
    """Bytes of memory of one part of a model on each GPU."""

    state: float
    """Weights, gradients and moments."""
    activations: float


class RunPlan(NamedTuple):
    """What a run needs; memory is per GPU, in bytes."""

    num_gpus: int
    gpu: Gpu
    mfu: float
    """Share of the peak FLOP/s that is assumed."""
    parameters: int
    training_flops: float
    """FLOPs per byte, forward and backward."""
    parts: dict[str, PartMemory]
    gathered: float
    """Weights that are gathered from other ranks, and their gradients."""
    rows: int
    """Rows of a step on each GPU."""
    micro_rows: int
    """Rows of a forward pass on each GPU."""
    step_bytes: int
    """Bytes of text in a step, over all GPUs."""
    run_bytes: int

    @property
    def memory(self) -> float:
        """Bytes of memory of a GPU, all together."""
        return self.gathered + sum(part.state + part.activations for part in self.parts.values())

    @property
    def usable(self) -> float:
        """Bytes of a GPU's memory that a run can use."""
        return (1 - RESERVED) * self.gpu.memory

    @property
    def bytes_per_second(self) -> float:
        """Bytes of text per second, over all GPUs."""
        return self.num_gpus * self.gpu.peak_flops * self.mfu / self.training_flops

    @property
    def days(self) -> float:
        """Days of computation."""
        return self.run_bytes / self.bytes_per_second / DAY

    @property
    def model_file(self) -> int:
        """Bytes of a checkpoint's weights."""
        return 4 * self.parameters

    @property
    def optimizer_file(self) -> int:
        """Bytes of a checkpoint's moments."""
        return 8 * self.parameters

    def check_memory(self) -> None:
        """Check that the run fits.

        Raises:
            ConfigError: it does not.
        """
        if self.memory > self.usable:
            raise ConfigError(
                f"the recipe needs {self.memory / 1e9:.0f} GB on each GPU, of which "
                f"{self.usable / 1e9:.0f} GB can be used: lower train.micro_rows, set "
                "train.activation_checkpointing=block, leave out train.shard_ranks, or use more "
                "GPUs"
            )


def plan_run(
    recipe: Recipe, num_gpus: int, gpu: Gpu, mfu: float, patch_size: float | None = None
) -> RunPlan:
    """Return what a run of a recipe needs on some GPUs.

    Rows are taken to be one document each, and full.

    Args:
        recipe: the recipe.
        num_gpus: number of GPUs.
        gpu: kind of the GPUs.
        mfu: share of the peak FLOP/s to assume.
        patch_size: mean bytes per patch or token; ``None`` for the recipe's.

    Raises:
        ConfigError: the patch size is unknown, or the GPUs cannot share the rows of a step or form
            groups of ``train.shard_ranks``.
    """
    data, train = recipe.data, recipe.train
    shared = train.shard_ranks or num_gpus
    for setting, whole, ranks in (
        ("data.rows_per_step", data.rows_per_step, num_gpus),
        ("the number of GPUs", num_gpus, shared),
    ):
        if whole % ranks:
            raise ConfigError(
                f"{setting} is {whole}, which is not a multiple of {ranks}: choose another number "
                "of GPUs, data.rows_per_step or train.shard_ranks"
            )
    costs = break_down_recipe(recipe, patch_size=patch_size)
    rows = data.rows_per_step // num_gpus
    micro_rows = min(train.micro_rows or rows, rows)
    positions = {"byte": costs.num_bytes, "patch": costs.num_patches}
    if costs.unit == "tokens":
        positions["byte"] = costs.num_patches
    element = 4 if train.precision == "float32" else 2
    found = model_parts(recipe.model)
    kept = {
        name: micro_rows * kept_elements(part, positions, train.activation_checkpointing)
        for name, part in found.items()
    }
    if costs.unit == "tokens":
        # Importing torch takes longer than other plans.
        from bytelm.lm.kinds import CHUNKED_VOCAB
        from bytelm.model.transformer import chunk_positions

        (output,) = found["output"].matrices
        if output.outputs >= CHUNKED_VOCAB:
            chunk = chunk_positions(output.inputs, output.outputs)
            kept["output"] = kept_in_chunks(output, micro_rows * positions["byte"], chunk)
    if "vocabulary" in found:
        from bytelm.model.vocabulary import LATENTS

        (pieces,) = found["vocabulary"].matrices
        kept["vocabulary"] = kept_in_chunks(pieces, micro_rows * positions["patch"], LATENTS)
    step_bytes = data.rows_per_step * data.row_bytes
    return RunPlan(
        num_gpus=num_gpus,
        gpu=gpu,
        mfu=mfu,
        parameters=costs.model.parameters,
        training_flops=costs.model.training,
        parts={
            name: PartMemory(
                state=TRAINING_BYTES * part.parameters / shared,
                activations=element * kept[name],
            )
            for name, part in found.items()
        },
        gathered=_gathered(found, element, num_gpus, reshards=train.reshard),
        rows=rows,
        micro_rows=micro_rows,
        step_bytes=step_bytes,
        run_bytes=step_bytes * train.steps,
    )


def kept_elements(part: Part, positions: dict[str, int], checkpointing: str = "none") -> float:
    """Return the elements of activations that the backward pass keeps of a part for one row.

    Args:
        part: the part.
        positions: bytes and patches of the row, as ``byte`` and ``patch``.
        checkpointing: activation checkpointing of blocks: ``none``, ``block`` or ``selective``.
            ``block`` keeps the inputs of all blocks, and all of one while it is repeated;
            ``selective`` keeps the outputs of matrices.
    """
    stack = part.self_attention

    def total(inputs: bool) -> int:
        return sum(
            m.copies * m.vectors * (m.inputs * inputs + m.outputs) * positions[m.per]
            for m in part.matrices
        )

    everything = ACTIVATION_FACTOR * total(inputs=True)
    if stack is None or checkpointing == "none":
        return everything
    inputs = stack.num_layers * part.matrices[0].inputs * positions[stack.per]
    one = everything / stack.num_layers
    return inputs + one + (total(inputs=False) if checkpointing == "selective" else 0.0)


def kept_in_chunks(output: Matrix, positions: int, chunk: int) -> int:
    """Return the elements that are kept for logits whose cross-entropy is computed in chunks.

    All states are kept, and while a chunk is repeated, its normalised states and log-probabilities.

    Args:
        output: the matrix that makes the logits.
        positions: positions in a forward pass, of all its rows.
        chunk: positions in a chunk.
    """
    return output.inputs * positions + (output.inputs + output.outputs) * min(chunk, positions)


def _gathered(parts: dict[str, Part], element: int, num_gpus: int, *, reshards: bool) -> float:
    """Return the bytes of gathered weights and of their gradients before they are summed.

    Blocks are gathered one by one, the next while one is computed; the embeddings are one group,
    the rest another, which stays gathered. Gradients are summed in fp32.
    """
    everything = sum(part.parameters for part in parts.values())
    if num_gpus == 1:
        # The copies that autocast makes.
        return float(element * everything) if element < 4 else 0.0
    embeddings = rest = 0
    largest = 0.0
    for name, part in parts.items():
        if part.self_attention is not None:
            largest = max(largest, part.parameters / part.self_attention.num_layers)
        elif "embedding" in name:
            embeddings += part.parameters
        else:
            rest += part.parameters
    most = max(largest * (3 * element + 4), embeddings * (2 * element + 4))
    return float(most + element * (rest if reshards else everything))
