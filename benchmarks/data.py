"""Suite `data`: text to prepared shards, shards to packed rows. On the CPU."""

import json
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.settings import Settings
from benchmarks.subjects import PATCH_SIZE, random_words
from benchmarks.timing import Sample, measure, time_once
from bytelm import codec
from bytelm.checkpoint import save_model
from bytelm.config import (
    FittedNgramConfig,
    ModelDescription,
    NgramConfig,
    Packing,
    Recipe,
    TransformerConfig,
    load_recipe,
)
from bytelm.data import Dataset, Loader, PrepareOptions, prepare
from bytelm.lm import ScorerLM, build_lm
from bytelm.model.transformer import Transformer
from bytelm.patching import EntropyRule, Patcher, SpaceRule
from bytelm.scoring import fit_ngram_scorer
from bytelm.training import Trainer
from bytelm.training.rows import load_rows
from bytelm.units import ByteUnits, PatchUnits, Units

TEXT_BYTES, QUICK_TEXT_BYTES = 4_000_000, 100_000
DOCUMENT_BYTES = 2000
ROW_BYTES, QUICK_ROW_BYTES = 8192, 512
ROWS_PER_STEP = 4
STEPS, QUICK_STEPS = 16, 2
RECIPE = "blt-1m"
NGRAM_BYTES, TRANSFORMER_BYTES, QUICK_SHARED_BYTES = 96_000_000, 1_500_000, 200_000
"""Text that one worker and two prepare, in turns, for each kind of scorer."""
SHARED_REPEATS = 3
TRANSFORMER = TransformerConfig(dim=128, num_layers=2, num_heads=4, ffn_dim=512, window=512)


def run(settings: Settings, report: Callable[[str], None]) -> dict[str, Any]:
    """Time preparation with and without entropies, and the loader with each kind of patcher."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        text = random_words(QUICK_TEXT_BYTES if settings.quick else TEXT_BYTES)
        (work / "text.jsonl").write_text(_documents(text))
        (work / "text.txt").write_bytes(text)
        _save_scorer(text[: len(text) // 4], work / "scorer")
        report("data: preparation")
        measurements = _prepare(work, len(text), settings)
        report("data: preparation by one worker and by two")
        workers = _share(work, settings)
        report("data: loader")
        measurements += _load(work, settings)
        report("data: loader and trainer")
        measurements.append(_load_and_train(work, settings))
    return {"measurements": measurements, "workers": workers}


def _documents(text: bytes) -> str:
    pieces = (text[at : at + DOCUMENT_BYTES] for at in range(0, len(text), DOCUMENT_BYTES))
    return "".join(json.dumps({"text": piece.decode()}) + "\n" for piece in pieces)


def _save_scorer(text: bytes, folder: Path) -> None:
    config = NgramConfig()
    scorer = fit_ngram_scorer([codec.encode(text)], config)
    fitted = FittedNgramConfig(max_order=config.max_order, num_contexts=len(scorer.keys))
    save_model(folder, ScorerLM(scorer), ModelDescription(model=fitted))


def _prepare(work: Path, num_bytes: int, settings: Settings) -> list[dict[str, Any]]:
    measurements = []
    for name, scorer in (("plain", None), ("with an n-gram scorer", work / "scorer")):
        samples: list[Sample] = []
        options = PrepareOptions(scorer=scorer, workers=1)
        inputs = [str(work / "text.jsonl")]
        prepare(inputs, work / name, options)  # warm up
        for number in range(settings.repeats):
            out = work / f"{name}-{number}"
            samples.append(time_once(partial(prepare, inputs, out, options), "cpu"))
        what = f"preparation, {name}"
        measurements.append({"what": what, "bytes": num_bytes, "samples": {"ours": samples}})
    return measurements


def _share(work: Path, settings: Settings) -> list[dict[str, Any]]:
    """Whole preparations by one worker and by two, in turns: two need as many free cores."""
    _save_transformer(work / "transformer")
    kinds = {
        "n-gram scorer": (work / "scorer", NGRAM_BYTES),
        "transformer, 2 layers of 128": (work / "transformer", TRANSFORMER_BYTES),
    }
    measurements = []
    for name, (scorer, num_bytes) in kinds.items():
        text = random_words(QUICK_SHARED_BYTES if settings.quick else num_bytes)
        path = work / "shared.jsonl"
        path.write_text(_documents(text))
        samples: dict[str, list[Sample]] = {"one": [], "two": []}
        for _ in range(min(settings.repeats, SHARED_REPEATS)):
            for workers, (_, taken) in enumerate(samples.items(), 1):
                options = PrepareOptions(scorer=scorer, workers=workers)
                out = work / "shared"
                taken.append(time_once(partial(prepare, [str(path)], out, options), "cpu"))
                shutil.rmtree(out)
        measurements.append({"scorer": name, "bytes": len(text), "samples": samples})
    return measurements


def _save_transformer(folder: Path) -> None:
    description = ModelDescription(model=TRANSFORMER)
    lm = build_lm(description)
    assert isinstance(lm.trained, Transformer)
    lm.trained.init_weights(torch.Generator().manual_seed(0))
    save_model(folder, lm, description)


def _load(work: Path, settings: Settings) -> list[dict[str, Any]]:
    """Steps of a loader: rows read, patched, packed and stacked."""
    dataset = Dataset(work / "with an n-gram scorer", "train")
    # Not calibrated: entropies of random words by n-grams have too few values for that.
    threshold = float(np.quantile(dataset.entropies(0, 0, DOCUMENT_BYTES), 1 - 1 / PATCH_SIZE))
    entropy_patches = PatchUnits(Patcher(EntropyRule(threshold=threshold)))
    # One document, whose spans are whole rows: the cost of a byte, without that of a document.
    prepare([str(work / "text.txt")], work / "long", PrepareOptions(validation_share=0.0))
    long = Dataset(work / "long", "train")
    ways: dict[str, tuple[Dataset, Units, Packing]] = {
        "no patches": (dataset, ByteUnits(), "in-order"),
        "no patches, a long document": (long, ByteUnits(), "in-order"),
        "space patches": (dataset, PatchUnits(Patcher(SpaceRule())), "in-order"),
        "entropy patches": (dataset, entropy_patches, "in-order"),
        "entropy patches, balanced": (dataset, entropy_patches, "balanced"),
    }
    row_bytes = QUICK_ROW_BYTES if settings.quick else ROW_BYTES
    steps = QUICK_STEPS if settings.quick else STEPS
    measurements = []
    for name, (data, units, packing) in ways.items():
        # In order, patches do not end a row; balanced rows use up their room for them.
        room = row_bytes // 2 if packing == "in-order" else round(row_bytes / PATCH_SIZE)
        loader = Loader(
            data,
            units=units,
            row_bytes=row_bytes,
            row_units=room if units.has_budget else None,
            rows_per_step=ROWS_PER_STEP,
            packing=packing,
        )

        def read(loader: Loader = loader) -> None:
            for _ in range(steps):
                loader.next_batch()

        rows = steps * ROWS_PER_STEP
        measurements.append(
            {
                "what": f"loader, {name}",
                "bytes": rows * row_bytes,
                "rows": rows,
                "samples": measure({"ours": read}, settings.repeats, "cpu"),
            }
        )
    return measurements


def _load_and_train(work: Path, settings: Settings) -> dict[str, Any]:
    """Steps of a recipe's loader, and whole steps of its training, which load as well, in turns."""
    overrides = [f"data.path={work / 'plain'}", "patching={kind: space}", "train.device=cpu"]
    if settings.quick:
        overrides += [f"data.row_bytes={QUICK_ROW_BYTES}", "data.rows_per_step=1"]
    recipe = load_recipe(RECIPE, overrides)
    assert isinstance(recipe, Recipe)
    trainer = Trainer(recipe)
    loader = load_rows(trainer.recipe, trainer.setup.dataset, trainer.lm.units)
    subjects = {"ours": loader.next_batch, "training": trainer.step}
    rows = recipe.data.rows_per_step
    return {
        "what": f"loader, recipe {RECIPE} with space patches",
        "bytes": rows * recipe.data.row_bytes,
        "rows": rows,
        "samples": measure(subjects, settings.repeats, "cpu"),
    }
