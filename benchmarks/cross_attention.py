"""Suite `cross-attention`: one cross-attention layer alone, dense masks against segments.

Projections, norms and residual are part of a layer. The mask is built once per forward pass by
``transformers`` and shared by its decoder layers, so the time without it is the fairer one for deep
decoders; with it, for the encoder's one layer.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.models.blt import modeling_blt

from benchmarks.settings import Settings
from benchmarks.subjects import Inputs, Pair, autocast, build_pair, random_inputs, shape_of
from benchmarks.timing import measure

LENGTHS, QUICK_LENGTHS = (2048, 4096, 8192), (64,)
TOLERANCE = 1e-4


@torch.no_grad()
def run(settings: Settings, report: Callable[[str], None]) -> dict[str, Any]:
    """Time the decoder's layer and the encoder's at every length."""
    pair = build_pair(shape_of(settings.quick), settings.device)
    measurements = []
    for num_bytes in QUICK_LENGTHS if settings.quick else LENGTHS:
        row = random_inputs(num_bytes, settings.device)
        for layer, subjects in (("decoder", _decoder), ("encoder", _encoder)):
            report(f"cross-attention: {layer}, {num_bytes:,} bytes")
            runs = subjects(pair, row, settings)
            gap = float((runs["ours"]() - runs["theirs"]()).abs().max())
            if settings.precision == "float32":
                assert gap < TOLERANCE, f"the {layer} layers differ by {gap}"
            samples = measure(runs, settings.repeats, settings.device)
            measurements.append(
                {
                    "layer": layer,
                    "bytes": num_bytes,
                    "patches": row.patches.num_patches,
                    "gap": gap,
                    "samples": samples,
                }
            )
    return {"measurements": measurements}


def _decoder(pair: Pair, row: Inputs, settings: Settings) -> dict[str, Callable[[], Tensor]]:
    """Bytes read the slots of their latent."""
    states, slots = _states_and_slots(pair, row)
    ours: Any = pair.ours.blt.decoder.cross_attention[0]
    theirs = pair.theirs.model.local_decoder.cross_attn_layers[0]

    def dense(mask: Tensor) -> Tensor:
        out, _ = theirs(
            hidden_states=states, cross_attention_states=slots.flatten(1, 2), attention_mask=mask
        )
        return states + out

    def segments() -> Tensor:
        with autocast(settings.device, settings.precision):
            return ours(states, *ours.project_keys_values(slots), row.patches.decoder_ids)

    mask = _mask(pair, row, of_decoder=True)
    return {
        "ours": segments,
        "theirs": lambda: dense(mask),
        "theirs, with its mask": lambda: dense(_mask(pair, row, of_decoder=True)),
    }


def _encoder(pair: Pair, row: Inputs, settings: Settings) -> dict[str, Callable[[], Tensor]]:
    """The slots of a patch read its bytes."""
    states, slots = _states_and_slots(pair, row)
    ours = pair.ours.blt.encoder.cross_attention[0]
    theirs = pair.theirs.model.local_encoder.cross_attn_layers[0]

    def dense(mask: Tensor) -> Tensor:
        queries = slots.flatten(1, 2)
        out, _ = theirs(hidden_states=queries, cross_attention_states=states, attention_mask=mask)
        return (queries + out).view_as(slots)

    def segments() -> Tensor:
        with autocast(settings.device, settings.precision):
            return ours(slots, states, row.patches.encoder_ids)

    mask = _mask(pair, row, of_decoder=False)
    return {
        "ours": segments,
        "theirs": lambda: dense(mask),
        "theirs, with its mask": lambda: dense(_mask(pair, row, of_decoder=False)),
    }


def _states_and_slots(pair: Pair, row: Inputs) -> tuple[Tensor, Tensor]:
    local_dim, slots = pair.config.local.dim, pair.config.cross_attention.slots
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, row.num_bytes, local_dim, generator=generator)
    vectors = torch.randn(1, row.patches.num_patches, slots, local_dim, generator=generator)
    return states.to(row.ids.device), vectors.to(row.ids.device)


def _mask(pair: Pair, row: Inputs, *, of_decoder: bool) -> Tensor:
    """The dense mask, as the forward pass of ``transformers`` builds it."""
    lengths = row.patch_lengths
    patch_ids = pair.theirs.model._patch_ids_from_lengths(
        lengths[:, 1:] if of_decoder else lengths, row.num_bytes
    )
    mask: Any = modeling_blt._prepare_patch_cross_attention_mask(  # not a tuple as annotated
        patch_ids=patch_ids,
        num_patches=lengths.shape[1],
        sequence_length=row.num_bytes,
        patches_as_queries=not of_decoder,
        cross_attn_k=pair.config.cross_attention.slots,
        dtype=torch.float32,
    )
    return mask
