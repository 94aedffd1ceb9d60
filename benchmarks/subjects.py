"""What is measured: one model in two implementations, with the same weights, and its inputs."""

import tempfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.models.blt import modeling_blt

from benchmarks.settings import Device, Precision, Settings
from bytelm import codec, interop
from bytelm.config import BLTConfig
from bytelm.lm import PatchedLM
from bytelm.model.blt import BLT
from bytelm.patching import Patches, build_patches

PATCH_SIZE = 4
"""Mean bytes per patch."""

THEIRS_HAS_WINDOWS = hasattr(modeling_blt, "create_sliding_window_causal_mask")
"""Whether this version of ``transformers`` applies the windows that it has options for."""

# Herman Melville, Moby-Dick (1851).
PARAGRAPH = b"""\
Call me Ishmael. Some years ago - never mind how long precisely - having little or no money in \
my purse, and nothing particular to interest me on shore, I thought I would sail about a little \
and see the watery part of the world. It is a way I have of driving off the spleen and \
regulating the circulation. Whenever I find myself growing grim about the mouth; whenever it is \
a damp, drizzly November in my soul; whenever I find myself involuntarily pausing before coffin \
warehouses, and bringing up the rear of every funeral I meet; and especially whenever my hypos \
get such an upper hand of me, that it requires a strong moral principle to prevent me from \
deliberately stepping into the street, and methodically knocking people's hats off - then, I \
account it high time to get to sea as soon as I can. This is my substitute for pistol and ball. \
With a philosophical flourish Cato throws himself upon his sword; I quietly take to the ship. \
There is nothing surprising in this. If they but knew it, almost all men in their degree, some \
time or other, cherish very nearly the same feelings towards the ocean with me.
"""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model that both implementations have."""

    local_dim: int = 256
    local_heads: int = 4
    local_ffn: int = 768
    encoder_layers: int = 1
    decoder_layers: int = 4
    global_dim: int = 512
    global_heads: int = 8
    global_ffn: int = 1536
    global_layers: int = 6
    slots: int = 2
    window: int = 512
    num_buckets: int = 2600
    patcher_dim: int = 128
    patcher_heads: int = 2
    patcher_ffn: int = 384
    patcher_layers: int = 2


COMPARISON = Shape()
"""31 million parameters, of which 4 million are hash embeddings."""
QUICK = Shape(
    local_dim=32,
    local_heads=2,
    local_ffn=48,
    decoder_layers=2,
    global_dim=48,
    global_heads=2,
    global_ffn=64,
    global_layers=2,
    window=16,
    num_buckets=97,
    patcher_dim=32,
    patcher_heads=2,
    patcher_ffn=48,
)


def shape_of(quick: bool) -> Shape:
    """The comparison model, or one that is small enough for tests."""
    return QUICK if quick else COMPARISON


def takes_part(settings: Settings, num_bytes: int) -> bool:
    """Whether theirs is measured on texts of a length.

    Versions without windows compute the same only up to the length of ours.
    """
    if not THEIRS_HAS_WINDOWS and num_bytes > shape_of(settings.quick).window:
        return False
    return num_bytes <= settings.theirs_up_to


class Pair(NamedTuple):
    """One model in both implementations."""

    ours: PatchedLM
    theirs: Any
    """``transformers.BltForCausalLM``; only right with ``use_cache=False``."""
    config: BLTConfig

    @property
    def num_parameters(self) -> int:
        """Of both, scorer included."""
        return sum(p.numel() for p in self.theirs.parameters())


def build_pair(shape: Shape, device: Device = "cpu") -> Pair:
    """The model, with the same random weights on both sides.

    The BLT takes gradients, its scorer does not.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    theirs: Any = transformers.BltForCausalLM(their_config(shape)).eval()
    randomize(theirs)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(Path(folder) / "hf")
        lm = interop.import_hf(Path(folder) / "hf")
    assert isinstance(lm.module, PatchedLM)
    assert isinstance(lm.config.model, BLTConfig)
    lm.module.blt.requires_grad_(True)
    return Pair(lm.module.to(device), theirs.to(device), lm.config.model)


def their_config(shape: Shape) -> transformers.BltConfig:
    """The shape in the options of ``transformers``."""
    between = {"hidden_size_global": shape.global_dim, "cross_attn_k": shape.slots}
    local = (shape.local_dim, shape.local_heads, shape.local_ffn)
    encoder = _stack(*local, shape.encoder_layers) | between | {"cross_attn_all_layers": False}
    decoder = _stack(*local, shape.decoder_layers) | between | {"cross_attn_all_layers": True}
    patcher = _stack(
        shape.patcher_dim, shape.patcher_heads, shape.patcher_ffn, shape.patcher_layers, 10_000.0
    )
    return transformers.BltConfig(
        cross_attn_k=shape.slots,
        encoder_hash_byte_group_size=[3, 4, 5, 6, 7, 8],
        encoder_hash_byte_group_vocab=shape.num_buckets,
        encoder_hash_byte_group_nb_functions=1,
        patching_threshold=0.0,
        local_attention_window_len=shape.window,
        encoder_config=encoder,
        decoder_config=decoder,
        global_config=_stack(
            shape.global_dim, shape.global_heads, shape.global_ffn, shape.global_layers
        ),
        patcher_config=patcher | {"sliding_window": shape.window},
    )


def _stack(dim: int, heads: int, ffn: int, layers: int, theta: float = 5e5) -> dict[str, Any]:
    return {
        "hidden_size": dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": dim // heads,
        "intermediate_size": ffn,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Weights of about unit gain, norms away from 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
            if "norm" in name:
                parameter.mul_(0.3).add_(1.0)


class Inputs(NamedTuple):
    """A row of random bytes, and its patches as either implementation takes them."""

    ids: Tensor
    patches: Patches
    patch_lengths: Tensor

    @property
    def num_bytes(self) -> int:
        """In the row."""
        return self.ids.shape[1]


def random_inputs(num_bytes: int, device: Device = "cpu", seed: int = 0) -> Inputs:
    """A row that begins with BOS, cut at random into patches of ``PATCH_SIZE`` bytes on average."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(codec.OFFSET, codec.VOCAB_SIZE, (1, num_bytes), generator=generator)
    ids[0, 0] = codec.BOS
    next_boundary = torch.rand(1, num_bytes, generator=generator) < 1 / PATCH_SIZE
    next_boundary[:, 0] = True
    # Nothing begins after the row, which the two would count differently.
    next_boundary[:, -1] = False
    starts = torch.cat((torch.tensor([0]), next_boundary[0].nonzero().flatten() + 1))
    lengths = torch.diff(starts, append=torch.tensor([num_bytes]))[None]
    return Inputs(ids.to(device), build_patches(next_boundary.to(device)), lengths.to(device))


def our_logits(blt: BLT, row: Inputs, precision: Precision = "float32") -> Tensor:
    """What ours makes of a row."""
    with autocast(row.ids.device.type, precision):
        return blt(row.ids, row.patches)


def their_logits(theirs: Any, row: Inputs) -> Tensor:
    """What theirs makes of a row."""
    return theirs(row.ids, patch_lengths=row.patch_lengths, use_cache=False).logits


def autocast(device: str, precision: Precision) -> AbstractContextManager[object]:
    """The context that ours runs in."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device, torch.bfloat16)


def english(num_bytes: int) -> bytes:
    """English text of a length, a paragraph over and over."""
    return (PARAGRAPH * (num_bytes // len(PARAGRAPH) + 1))[:num_bytes]


def random_words(num_bytes: int, seed: int = 0) -> bytes:
    """The words of the paragraph in random order: text that does not repeat."""
    words = PARAGRAPH.decode().split()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(words), (num_bytes // 3 + 1,), generator=generator).tolist()
    return " ".join(words[i] for i in drawn).encode()[:num_bytes]
