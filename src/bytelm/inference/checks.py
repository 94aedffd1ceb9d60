"""Checks of what a decoding state is given, before anything of the state changes."""

import torch
from torch import Tensor

from bytelm.slots import Slots

NOT_BEGUN = "the first id of a document must be given to prefill, not to decode"


def check_prefill(
    ids: Tensor, slot: int, num_slots: int, vocab_size: int, device: torch.device
) -> None:
    """Check the arguments of a prefill."""
    if not 0 <= slot < num_slots:
        raise ValueError(f"slot {slot} is outside 0..{num_slots - 1}")
    _check_ids(ids, vocab_size, device)


def check_decode(
    ids: Tensor, slots: Slots, num_slots: int, vocab_size: int, device: torch.device
) -> None:
    """Check the arguments of a decode."""
    count = num_slots if slots is None else len(slots)
    if slots is not None and not (count == 1 and 0 <= slots[0] < num_slots):
        distinct = set(slots)
        if len(distinct) < count or not distinct <= set(range(num_slots)):
            raise ValueError(f"slots {list(slots)} must be different and within 0..{num_slots - 1}")
    _check_ids(ids, vocab_size, device)
    if len(ids) != count:
        raise ValueError(f"{len(ids)} ids were given for {count} slots; give one for each")


def _check_ids(ids: Tensor, vocab_size: int, device: torch.device) -> None:
    """Check ids against the vocabulary, on the CPU only: elsewhere the host would wait."""
    if ids.dim() != 1:
        raise ValueError(f"ids must have one axis, not shape {list(ids.shape)}")
    if ids.device != device:
        raise ValueError(f"the ids are on {ids.device}, the model on {device}: move the ids there")
    if not ids.is_cpu or not ids.numel():
        return
    if ids.numel() == 1:  # much faster than finding the bounds
        lowest = highest = ids.item()
    else:
        lowest, highest = (bound.item() for bound in ids.aminmax())
    if not (lowest >= 0 and highest < vocab_size):
        bad = lowest if lowest < 0 else highest
        raise ValueError(f"id {bad} is outside 0..{vocab_size - 1}")
