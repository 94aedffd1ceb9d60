"""Part `parity`: fast paths beside their readable twins on this device, gradients included.

Each is held against its twin in the same precision and, so that rounding can be told from error,
both against the twin in float64 on the same (rounded) inputs. Figures are largest absolute
differences; ``scale`` is the largest absolute value.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.parts.models import MEDIUM_BLT, TINY_BLT, TINY_SCORER, Batch, batches, build
from benchmarks.parts.notes import Notes, Target
from bytelm import kernels
from bytelm.inference import Session
from bytelm.lm import PatchedLM
from bytelm.patching import EntropyRule, Patcher
from bytelm.scoring import TransformerScorer

Function = Callable[..., Any]


class Case(NamedTuple):
    """A fast path and its twin: functions of the inputs, to a tensor or some."""

    fast: Function
    twin: Function
    inputs: dict[str, Tensor]


class Sizes(NamedTuple):
    """Of the inputs; the length fills no block exactly."""

    batch: int
    length: int
    heads: int
    head_dim: int
    window: int
    patches: int
    slots: int


def run(target: Target, notes: Notes) -> None:
    """Compare every fast path in both precisions, then whole models."""
    for precision in (torch.float32, torch.bfloat16):
        for name, case in cases(target).items():
            label = f"{name}, {str(precision).removeprefix('torch.')}"
            with notes.attempt(label):
                notes.put(label, compare(case, precision, target.device))
    compare_models(target, notes)


def cases(target: Target) -> dict[str, Case]:
    """Everything in ``bytelm.kernels`` that has a twin and runs on a GPU."""
    sizes = Sizes(2, 1000, 8, 64, 512, 200, 2)
    if target.tiny:
        sizes = Sizes(2, 50, 2, 16, 16, 12, 2)
    batch = next(batches(target, sizes.batch, sizes.length))
    return {**_attention(sizes, batch), **_segments(sizes, batch)}


def _attention(sizes: Sizes, batch: Batch) -> dict[str, Case]:
    shape = (sizes.batch, sizes.length, sizes.heads, sizes.head_dim)
    inputs = _random(queries=shape, keys=shape, values=shape)
    documents = (batch.ids % 97 == 0).long().cumsum(1)  # documents of about 100 bytes

    def case(window: int | None) -> Case:
        mask = kernels.Mask(documents, window)
        plan = kernels.plan_attention(mask)
        return Case(
            lambda *x: kernels.attention(*x, plan),
            lambda *x: kernels.reference_attention(*x, mask),
            inputs,
        )

    return {"attention, no window": case(None), "attention, window": case(sizes.window)}


def _segments(sizes: Sizes, batch: Batch) -> dict[str, Case]:
    num_patches = sizes.patches
    ids = batch.patches().encoder_ids.clamp(max=num_patches)  # the last bytes belong to none
    per_byte = (sizes.batch, sizes.length, sizes.heads, sizes.head_dim)
    per_slot = (sizes.batch, num_patches, sizes.slots, sizes.heads, sizes.head_dim)
    reads = ids.clamp(max=num_patches - 1)
    return {
        "segment_max": Case(
            lambda x: kernels.segment_max(x, ids, num_patches),
            lambda x: kernels.reference_segment_max(x, ids, num_patches),
            _random(values=(*per_byte[:2], 64)),
        ),
        "encoder_cross_attention": Case(
            lambda *x: kernels.encoder_cross_attention(*x, ids),
            lambda *x: kernels.reference_encoder_cross_attention(*x, ids),
            _random(queries=per_slot, keys=per_byte, values=per_byte),
        ),
        "decoder_cross_attention": Case(
            lambda *x: kernels.decoder_cross_attention(*x, reads),
            lambda *x: kernels.reference_decoder_cross_attention(*x, reads),
            _random(queries=per_byte, keys=per_slot, values=per_slot),
        ),
    }


def _random(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def compare(case: Case, precision: torch.dtype, device: str) -> dict[str, dict[str, float]]:
    """Largest differences of outputs and of gradients by every input."""
    rounded = {name: x.to(device, precision) for name, x in case.inputs.items()}
    exact_inputs = {name: x.double() for name, x in rounded.items()}
    fast = outputs_and_gradients(case.fast, rounded)
    # Twins are written for the CPU: new tensors go where they are told.
    with torch.device(device):
        twin = outputs_and_gradients(case.twin, rounded)
        exact = outputs_and_gradients(case.twin, exact_inputs)
    return {
        name: {
            "fast - twin": largest(fast[name] - twin[name]),
            "fast - float64": largest(fast[name] - exact[name]),
            "twin - float64": largest(twin[name] - exact[name]),
            "scale": largest(exact[name]),
        }
        for name in exact
    }


def outputs_and_gradients(function: Function, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a function makes of inputs, and the gradients of a random sum of it, in float64."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    out = function(*leaves.values())
    outs: Sequence[Tensor] = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(1)
    noise = [torch.randn(x.shape, generator=generator, device="cpu").to(x.device) for x in outs]
    torch.stack([(x.double() * n).sum() for x, n in zip(outs, noise, strict=True)]).sum().backward()
    found = {f"output {i}": x.detach().double() for i, x in enumerate(outs)}
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        found[f"gradient of {name}"] = leaf.grad.double()
    return found


def largest(x: Tensor) -> float:
    """Largest absolute value."""
    return float(x.abs().max())


def compare_models(target: Target, notes: Notes) -> None:
    """A BLT of modest size: devices, precisions, compiled or not, whole or as a session."""
    notes.put("float32 matrix products", torch.get_float32_matmul_precision())
    config = TINY_BLT if target.tiny else MEDIUM_BLT
    batch = next(batches(target, 2, 100 if target.tiny else 1000))
    on_cpu = Batch(*(x.cpu() for x in batch[:3]), batch.num_patches)
    model = build(config, "cpu")
    reference = _logits_and_gradient(model, on_cpu)
    model = model.to(target.device)
    here = _logits_and_gradient(model, batch)
    notes.put("model, float32 against the CPU", _differences(here, reference))
    with notes.attempt("model, bfloat16"), torch.autocast(target.device, torch.bfloat16):
        low = _logits_and_gradient(model, batch)
        notes.put("model, bfloat16 against float32", _differences(low, here))
    with notes.attempt("session"):
        notes.put("session against one pass", _session_gap(model, batch, target))
    if target.tiny:
        return  # the training part compiles as well
    with notes.attempt("model, compiled"):
        model.compile(dynamic=False)
        compiled = _logits_and_gradient(model, batch)
        notes.put("model, compiled against eager", _differences(compiled, here))


def _logits_and_gradient(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    logits = model(batch.ids, batch.patches())
    batch.loss(logits).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    return logits.detach().double().cpu(), gradient.double().cpu()


def _differences(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> dict[str, float]:
    return {
        "logits, largest": largest(a[0] - b[0]),
        "logits, scale": largest(b[0]),
        "gradient, relative norm": float((a[1] - b[1]).norm() / b[1].norm()),
    }


@torch.no_grad()
def _session_gap(blt: Any, batch: Batch, target: Target) -> float:
    """Largest difference between the logits of a session, fed in pieces, and of one pass."""
    scorer = TransformerScorer(build(TINY_SCORER, target.device))
    ids = batch.ids[:1]
    values = scorer.entropies(ids).flatten().sort().values
    middle = 3 * len(values) // 4
    threshold = float(values[middle : middle + 2].mean())
    model = PatchedLM(blt, Patcher(EntropyRule(threshold=threshold)), scorer).eval()
    session = Session(model)
    pieces = [ids[0, :40], *ids[0, 40:60].split(1), ids[0, 60:]]
    return largest(torch.cat([session.feed(piece) for piece in pieces]) - model(ids)[0])
