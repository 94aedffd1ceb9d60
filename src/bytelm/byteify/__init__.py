"""Byteify a donor: a BLT whose global transformer is a token model of the Llama family.

::

    donor's blocks  ->  global transformer       to 1e-5 on every layer
    random weights  ->  encoder, decoder, hash embeddings
    text            ->  scorer, and a threshold: patches as long as the donor's tokens

(Paper section 6.2.) The checkpoint predicts bytes only after training, for which a recipe is
written into its folder: the global transformer learns at a tenth of the others' rate.
"""

import json
from collections.abc import Iterable
from os import PathLike, fspath
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bytelm import codec
from bytelm.byteify.donor import Donor, find_source, open_donor
from bytelm.byteify.patches import DonorPatches, TextSample, find_patches, sample_text
from bytelm.byteify.teacher import read_vocabulary
from bytelm.byteify.transplant import check_layers, transplant, transplant_vocabulary
from bytelm.checkpoint import write_model
from bytelm.config import BLTConfig, ModelDescription, parse
from bytelm.data import ReadOptions
from bytelm.errors import ConfigError
from bytelm.lm import PatchedLM, build_lm
from bytelm.model.blt import BLT
from bytelm.model.vocabulary import Trie, build_trie
from bytelm.progress import Progress
from bytelm.storage import at_home, atomic_folder, check_absent, write_text

__all__ = ["RECIPE", "Byteified", "LocalSizes", "byteify"]

RECIPE = "train.yaml"
"""File of the recipe in the checkpoint's folder."""
CHECKED_TOKENS = 64
"""Tokens of the text that the transplanted layers are checked on."""
HEAD_DIM = 64


class LocalSizes(NamedTuple):
    """Sizes of the fresh parts of a byteified model."""

    dim: int | None = None
    """Width of encoder and decoder, a multiple of 64; ``None`` for about 0.4 times the donor's."""
    encoder_layers: int = 1
    decoder_layers: int = 3
    window: int = 256
    num_buckets: int = 32_768
    """Hash embeddings per n-gram size."""


class Byteified(NamedTuple):
    """A byteified model that was written."""

    folder: Path
    description: ModelDescription
    bytes_per_token: float
    """Of the donor, on the text."""
    num_copied: int
    """Parameters from the donor."""
    num_fresh: int
    """Random parameters."""
    largest_error: float
    """Largest relative error of a transplanted layer's output."""
    window: int | None
    """Tokens that the donor's attention sees, if it has a window; the model's sees all patches."""


def byteify(
    donor: str | PathLike[str],
    texts: str | PathLike[str] | Iterable[str | PathLike[str]],
    out: str | PathLike[str],
    *,
    scorer: str | PathLike[str] | None = None,
    boundaries: bool = False,
    vocabulary: bool = False,
    patch_size: float | None = None,
    sizes: LocalSizes | None = None,
    seed: int = 0,
    read: ReadOptions | None = None,
    progress: Progress | None = None,
) -> Byteified:
    """Write a BLT whose global transformer is a donor, with a recipe to train it.

    Args:
        donor: folder, GGUF file or Hub repository of a model of the Llama family.
        texts: inputs to find patches on, as for :func:`bytelm.prepare`; some of them are read.
        out: folder of the checkpoint to create.
        scorer: checkpoint of the scorer; ``None`` to count n-grams in the text.
        boundaries: let the scorer tell where the donor's tokens probably end
            (:mod:`bytelm.byteify.boundaries`), instead of entropies.
        vocabulary: keep the donor's embeddings and head (:mod:`bytelm.model.vocabulary`), which
            needs boundaries.
        patch_size: mean bytes per patch; ``None`` for the donor's bytes per token.
        sizes: sizes of encoder and decoder.
        seed: seed of the random weights.
        read: options of reading the text.
        progress: receives the progress.

    Raises:
        CheckpointError: the donor cannot be transplanted, the scorer cannot be loaded, or ``out``
            exists or cannot be written.
        ConfigError: a size is wrong, both a scorer and boundaries are asked for, or a vocabulary
            without boundaries.
        DataError: the text cannot be read, or there is too little of it.
        PatchingError: no threshold gives the patch size.
    """
    target, progress = at_home(out), progress or Progress()
    check_absent(target)
    if boundaries and scorer is not None:
        raise ConfigError("--boundaries and --scorer exclude each other: leave out one of them")
    if vocabulary and not boundaries:
        raise ConfigError("a vocabulary needs patches like its tokens: add --boundaries")
    find_source(donor)
    if isinstance(texts, str | PathLike):
        texts = [texts]
    with progress.waiting("reading the text"):
        text = sample_text([fspath(one) for one in texts], read or ReadOptions())
    with progress.waiting("loading the donor"):
        opened = open_donor(donor)
    pieces = read_vocabulary(opened).pieces() if vocabulary else []
    trie = build_trie([piece for piece, _ in pieces]) if vocabulary else None
    config = _config(opened, sizes or LocalSizes(), trie)
    with progress.waiting("finding patches"):
        path = None if scorer is None else at_home(scorer)
        patches = find_patches(opened, text, path, patch_size, boundaries=boundaries)
    with progress.waiting("transplanting"):
        lm, description, recipe = _made(opened, config, patches, text, target, seed)
        if trie is not None:
            assert lm.blt.vocabulary is not None
            transplant_vocabulary(opened, lm.blt.vocabulary, pieces, trie)
        return _write(opened, lm, description, recipe, patches, text, target)


def _config(donor: Donor, sizes: LocalSizes, trie: Trie | None) -> BLTConfig:
    """Return the configuration of a byteified model.

    Raises:
        ConfigError: the width is no multiple of a head's.
    """
    dim = sizes.dim or max(round(0.4 * donor.stack.dim / HEAD_DIM), 1) * HEAD_DIM
    if dim % HEAD_DIM:
        raise ConfigError(f"the local width {dim} must be a multiple of {HEAD_DIM}, such as 256")
    heads = dim // HEAD_DIM
    slots = max(-(-donor.stack.dim // dim), 1)
    config: dict[str, Any] = {
        "local": {
            "dim": dim,
            "num_heads": heads,
            "ffn_dim": round(8 / 3 * dim / 32) * 32,
            "encoder_layers": sizes.encoder_layers,
            "decoder_layers": sizes.decoder_layers,
            "window": sizes.window,
        },
        "global_model": donor.stack.model_dump(mode="json"),
        "cross_attention": {"slots": slots, "num_heads": heads},
        "hash_embeddings": {"num_buckets": sizes.num_buckets},
    }
    if trie is not None:
        embedding, head = donor.model.get_input_embeddings(), donor.model.get_output_embeddings()
        config["vocabulary"] = {
            "size": int(trie["ends"][0]),
            "nodes": len(trie["begins"]),
            "widest": int(trie["branches"].diff().max()),
            "tied": embedding.weight is head.weight,
        }
    return parse(BLTConfig, config, "the byteified model")


def _made(
    donor: Donor,
    config: BLTConfig,
    patches: DonorPatches,
    text: TextSample,
    target: Path,
    seed: int,
) -> tuple[PatchedLM, ModelDescription, str]:
    """Return a model with the donor's blocks, its description, and a recipe."""
    copied = ["global", *(["vocabulary"] if config.vocabulary else [])]
    recipe, context_bytes = _recipe(target, donor.name, dict.fromkeys(copied, 0.1))
    description = ModelDescription(
        model=config, patching=patches.rule, scorer=patches.config, context_bytes=context_bytes
    )
    lm = build_lm(description, scorer=patches.scorer)
    assert isinstance(lm, PatchedLM)
    lm.blt.init_weights(torch.Generator().manual_seed(seed))
    transplant(donor, lm.blt.global_model)
    _match_scales(lm.blt, donor, lm, text.calibration[0])
    return lm, description, recipe


def _write(
    donor: Donor,
    lm: PatchedLM,
    description: ModelDescription,
    recipe: str,
    patches: DonorPatches,
    text: TextSample,
    target: Path,
) -> Byteified:
    sample = text.calibration[0].decode("utf-8", "ignore")
    tokens = torch.tensor([donor.encode(sample)[:CHECKED_TOKENS]])
    error = check_layers(donor, lm.blt.global_model, tokens)
    record = {"byteified_from": donor.name, "bytes_per_token": patches.bytes_per_token}
    with atomic_folder(target) as folder:
        write_model(folder, lm, description, record)
        write_text(folder / RECIPE, recipe)
    own = [lm.blt.global_model, *([] if lm.blt.vocabulary is None else [lm.blt.vocabulary])]
    copied = sum(weight.numel() for part in own for weight in part.parameters())
    every = sum(weight.numel() for weight in lm.blt.parameters())
    return Byteified(
        target,
        description,
        patches.bytes_per_token,
        copied,
        every - copied,
        error,
        donor.window,
    )


@torch.no_grad()
def _match_scales(blt: BLT, donor: Donor, lm: PatchedLM, sample: bytes) -> None:
    """Let patch vectors begin with the size of token embeddings, and latents with the final norm.

    The donor's final norm is ``g h / rms(h)``. Cross-attention normalises projected latents, so
    ``W diag(g) h`` makes the same keys and values as ``W (g h / rms(h))``: the columns of the
    latents' projection are multiplied by ``g``.
    """
    ids = torch.from_numpy(codec.encode(sample[:2048]))[None]
    patches = lm.segment(ids).patches
    states, _ = blt.encode(ids, patches.documents, patches.positions)
    vectors = blt.encoder.patch_vectors(states, patches.encoder_ids, patches.num_patches)
    wanted = donor.model.get_input_embeddings().weight.square().mean().sqrt()
    last = blt.encoder.patch_projection or blt.encoder.pool_projection
    assert last is not None
    last.weight.mul_(wanted / vectors.square().mean().sqrt())
    blt.decoder.latent_projection.weight.mul_(donor.model.model.norm.weight)
    if blt.vocabulary is not None:
        blt.decoder.output.weight[-1] = 0  # the gate


def _recipe(target: Path, donor: str, multipliers: dict[str, float]) -> tuple[str, int]:
    """Return the text of the recipe that trains the checkpoint on, and the bytes of its rows."""
    row_bytes = 2048
    return (
        f"""\
# Trains a byteified model: the blocks of {json.dumps(donor)}, a fresh encoder and decoder.
#   bytelm data prepare TEXT --scorer {target} --out DATA
#   bytelm train {target / RECIPE} data.path=DATA --out RUN
init: {{from: {json.dumps(str(target.resolve()))}}}
data: {{row_bytes: {row_bytes}, rows_per_step: 4}}
optimizer: {{learning_rate: 1.0e-3, warmup_steps: 100, lr_multipliers: {json.dumps(multipliers)}}}
train:
  {{steps: 2000, micro_rows: 2, validate_every: 200, validation_bytes: 200000,
   checkpoint_every: 200}}
""",
        row_bytes,
    )
