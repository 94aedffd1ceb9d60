"""FLOPs of packed rows: attention within documents, as the masks admit it."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import SPACE_BLT, blt_config
from bytelm.accounting import forward_flops, packed_flops, run_lengths
from bytelm.config import Recipe, TransformerConfig, parse
from bytelm.data import Batch, PrepareOptions, prepare
from bytelm.kernels.masks import Mask
from bytelm.patching import build_patches
from bytelm.training import Trainer, charges_full_rows, full_step_flops, train
from bytelm.training.flops import Stretches
from earlier import StopAt, forget_packing

SMALL = {"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 48}
lengths = st.lists(st.integers(1, 9), min_size=1, max_size=5)


def rows_of(documents: list[list[int]], length: int) -> torch.Tensor:
    """Return rows of documents of some lengths, cut or padded to one length."""
    rows = torch.full((len(documents), length), -1)
    for row, sizes in zip(rows, documents, strict=True):
        numbers = [number for number, size in enumerate(sizes) for _ in range(size)][:length]
        row[: len(numbers)] = torch.tensor(numbers)
    return rows


def pairs(documents: torch.Tensor, window: int | None) -> int:
    return int(Mask(documents, window).allowed(0, documents.shape[1]).sum())


@given(st.lists(lengths, min_size=1, max_size=3), st.integers(1, 25), st.none() | st.integers(1, 9))
def test_attention_is_counted_as_the_mask_admits_it(documents, length, window):
    rows = rows_of(documents, length)
    config = TransformerConfig(**SMALL, window=window)
    found = packed_flops(config, run_lengths(rows.numpy()))
    assert found["transformer"].attention == 2 * 4 * 32 * pairs(rows, window)
    whole = forward_flops(config, length)
    for name, part in found.items():
        assert part.linear == len(rows) * whole[name].linear


@given(st.integers(1, 30), st.integers(1, 30))
def test_a_row_of_one_document_costs_what_a_row_costs(num_bytes, num_patches):
    config = blt_config()
    lengths = np.array([num_bytes]), np.array([num_patches])
    assert packed_flops(config, *lengths) == forward_flops(config, num_bytes, num_patches)


@given(st.lists(lengths, min_size=1, max_size=3), st.integers(0, 2**25 - 1))
def test_patches_attend_to_patches_of_their_document(documents, bits):
    rows = rows_of(documents, 25)
    boundary = torch.tensor([bits >> at & 1 for at in range(25)], dtype=torch.bool)
    boundary = boundary.expand(len(rows), -1)
    patches = build_patches(boundary, rows, 30)
    empty = torch.zeros(rows.shape, dtype=torch.long)
    batch = Batch(rows, empty, empty, rows, boundary, 30, empty[:, 0], empty[:, 0])
    values = {**SPACE_BLT, "model": blt_config().model_dump(), "train": {"steps": 1}}
    recipe = parse(Recipe, values, "test")
    config = recipe.model
    parts = packed_flops(
        config, run_lengths(rows.numpy()), run_lengths(patches.patch_documents.numpy())
    )
    total = sum(part.total for part in parts.values())
    assert Stretches.of(recipe, [batch]).flops(recipe) == 3 * total
    local, outer = config.local, config.global_model
    near, far = pairs(rows, local.window), pairs(patches.patch_documents, None)
    assert parts["encoder"].attention == 4 * local.encoder_layers * local.dim * near
    assert parts["decoder"].attention == 4 * local.decoder_layers * local.dim * near
    assert parts["global"].attention == 4 * outer.num_layers * outer.dim * far


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Documents shorter and longer than a row."""
    folder = tmp_path_factory.mktemp("flops")
    rng = np.random.default_rng(2)
    lines = []
    for _ in range(60):
        words = rng.choice(["a", "byte", "patches", "of", "entropy"], rng.integers(2, 40))
        lines.append(json.dumps({"text": " ".join(words)}))
    (folder / "x.jsonl").write_text("\n".join(lines))
    prepare([str(folder / "x.jsonl")], folder / "d", PrepareOptions(validation_share=0.1))
    return folder / "d"


def recipe_of(prepared, steps, **data):
    data = {**SPACE_BLT["data"], "path": str(prepared), **data}
    values = {**SPACE_BLT, "data": data, "train": {"steps": steps, "log_every": 1}}
    return parse(Recipe, values, "test")


def test_a_run_counts_the_flops_of_its_rows_and_goes_on_counting(prepared, tmp_path):
    whole = train(recipe_of(prepared, 6), tmp_path / "whole")
    trainer = Trainer(recipe_of(prepared, 6))
    batches = [trainer.loader.next_batch() for _ in range(6)]
    assert whole.flops == Stretches.of(trainer.recipe, batches).flops(trainer.recipe)
    assert whole.flops < 6 * full_step_flops(trainer.recipe)
    # What is expected of a step is close to what it takes.
    assert 6 * trainer.step_flops == pytest.approx(whole.flops, rel=0.1)
    part = train(recipe_of(prepared, 6), tmp_path / "part", callbacks=[StopAt(3)])
    assert not part.finished
    again = train(recipe_of(prepared, 6), tmp_path / "part")
    assert again.flops == whole.flops
    assert not charges_full_rows(tmp_path / "part")


def test_a_run_of_an_earlier_version_is_charged_and_filled_as_it_began(prepared, tmp_path):
    """Its checkpoints say neither how many FLOPs were attended nor how rows are filled."""
    run, recipe = tmp_path / "run", recipe_of(prepared, 6, packing="in-order")
    assert not train(recipe, run, callbacks=[StopAt(3)]).finished
    whole = train(recipe, tmp_path / "whole")
    forget_packing(run)
    old = train(recipe_of(prepared, 6), run)
    assert charges_full_rows(run)
    trainer = Trainer(recipe)
    assert old.flops == 6 * full_step_flops(trainer.recipe) > whole.flops
    assert old.validation == whole.validation
    assert old.bytes_seen == whole.bytes_seen
