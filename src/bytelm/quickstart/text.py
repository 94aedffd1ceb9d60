"""The text of the quickstart: as much of it as the time allows, prepared and scored."""

import random
import sysconfig
import time
from itertools import accumulate
from pathlib import Path

import numpy as np

from bytelm.config import EntropyPatching, NgramRecipe, load_recipe
from bytelm.data import Manifest, PrepareOptions, ReadOptions, find_inputs, prepare
from bytelm.data.calibration import calibrate_folder
from bytelm.errors import DataError
from bytelm.progress import Progress
from bytelm.scoring import fit_ngram_scorer
from bytelm.training import fit_ngrams

PATCH_SIZE = 4.5
MIN_BYTES, MAX_BYTES = 100_000, 16_000_000
"""Least text, and most: a model reads a part of it once."""
COUNTED_SHARE = 0.25
"""Share of the text that the scorer counts; entropies of counted text are lower than of other."""
CUT_BYTES, MIN_PARTS = 32_768, 200
"""Most bytes of a document, and least documents that a file is cut into."""
TEXT_SHARE = 0.2
"""Most of the time that preparing and scoring the text take."""
PROBE_BYTES = 65_536


def affordable_bytes(seconds: float) -> int:
    """Return the amount of text that this computer prepares in a share of the time.

    Args:
        seconds: time of the whole quickstart.
    """
    ids = np.random.default_rng(0).geometric(0.05, PROBE_BYTES).clip(max=255)
    began = time.monotonic()
    fit_ngram_scorer([ids], _counting(PROBE_BYTES).model)
    per_byte = (time.monotonic() - began) / PROBE_BYTES
    # Scoring a byte takes about half as long as counting one.
    wanted = TEXT_SHARE * seconds / (per_byte * (COUNTED_SHARE + 0.5))
    return round(min(max(wanted, 4 * MIN_BYTES), MAX_BYTES))


def _counting(max_bytes: int, *overrides: str) -> NgramRecipe:
    recipe = load_recipe("quickstart-entropy", [f"model.max_bytes={max_bytes}", *overrides])
    assert isinstance(recipe, NgramRecipe)
    return recipe


def _library(max_bytes: int) -> list[Path]:
    """Return files of the standard library, in random order, up to about ``max_bytes``."""
    library = Path(sysconfig.get_paths()["stdlib"])
    # Installed packages may live inside the library's folder; they differ between machines.
    parts = [p for p in sorted(library.iterdir()) if not p.name.endswith("-packages")]
    files = [p for part in parts for p in ([part] if part.is_file() else sorted(part.rglob("*")))]
    return _some([p for p in files if p.suffix == ".py" and p.is_file()], max_bytes)


def _sample(data: Path, out: Path, max_bytes: int) -> tuple[list[str], ReadOptions]:
    """Return the input, or some of its files if there is more text than wanted, and how to read."""
    found = [one for one in find_inputs([str(data)], ReadOptions(), (out,)) if one.is_read]
    paths = [one.path for one in found if one.path is not None and one.path.is_file()]
    size = sum(path.stat().st_size for path in paths)
    # Long documents are cut, so that a part of a single file can be held out.
    parts = max(min(size, max_bytes) // MIN_PARTS, 512)
    read = ReadOptions(cut_bytes=min(parts, CUT_BYTES), max_bytes=max_bytes)
    if len(paths) < len(found) or size <= max_bytes:
        return [str(data)], read
    return [str(path) for path in _some(paths, max_bytes)], read


def _some(files: list[Path], max_bytes: int) -> list[Path]:
    """Return files in random order, until they hold ``max_bytes``."""
    files = list(files)
    random.Random(0).shuffle(files)
    ends = accumulate((path.stat().st_size for path in files[:-1]), initial=0)
    return [path for path, begin in zip(files, ends, strict=True) if begin < max_bytes]


def prepare_text(data: Path | None, out: Path, max_bytes: int, progress: Progress) -> Manifest:
    """Prepare the documents of the text, with a few held out.

    Args:
        data: file or folder; ``None`` for the standard library of the running Python.
        out: folder of the quickstart.
        max_bytes: approximate size of the text.
        progress: receives the progress.

    Raises:
        DataError: the text cannot be read, or there is too little of it.
    """
    if data is None:
        arguments = [f"python={path}" for path in _library(max_bytes)]
        read = ReadOptions(include="*.py")
    else:
        arguments, read = _sample(data, out, max_bytes)
    options = PrepareOptions(read=read, validation_share=0.03, leave_out=(out,))
    with progress.preparing() as report:
        manifest = prepare(arguments, out / "text", options, report)
    held_out = sum(s.text_bytes for s in manifest.sources("validation").values())
    everything = sum(s.text_bytes for s in manifest.sources().values())
    progress.note(f"{everything:,} bytes, {held_out:,} of them held out")
    if everything < MIN_BYTES or not held_out:
        raise DataError(
            f"{data or 'the standard library'} holds {everything:,} bytes, of which {held_out:,} "
            f"could be held out: the quickstart needs at least {MIN_BYTES:,} bytes in several "
            "documents"
        )
    return manifest


def score_text(text: Manifest, out: Path, seed: int, progress: Progress) -> float:
    """Count n-grams, score the text, and return the threshold of :data:`PATCH_SIZE`, in nats."""
    progress.stage("counting n-grams, for a scorer")
    size = sum(s.text_bytes for s in text.sources("train").values())
    counted_bytes = max(round(COUNTED_SHARE * size), MIN_BYTES)
    fit_ngrams(
        _counting(counted_bytes, f"data.path={out / 'text'}", f"seed={seed}"), out / "entropy"
    )
    progress.stage(f"scoring the text; finding a threshold for {PATCH_SIZE} bytes per patch")
    options = PrepareOptions(scorer=out / "entropy")
    with progress.preparing() as report:
        prepare([str(out / "text")], out / "scored", options, report)
    rule = calibrate_folder(out / "scored", EntropyPatching(), PATCH_SIZE).rule
    return EntropyPatching.model_validate(rule).threshold or 0.0
