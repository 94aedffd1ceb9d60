"""The quickstart: train, evaluate and sample a small BLT on this computer, in minutes.

Nothing is downloaded: by default the text is the Python standard library, which is present wherever
this runs. The steps are the commands a user would type, so the folder is an example of everything
that the package writes. Each step can be interrupted; the same command resumes it.
"""

import lzma
import math
import os
import platform
import random
import shutil
import sysconfig
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch

from bytelm.accounting import parameters_by_part
from bytelm.config import (
    EntropyPatching,
    NgramRecipe,
    Recipe,
    SpacePatching,
    StaticPatching,
    load_recipe,
)
from bytelm.data import Dataset, Manifest, PrepareOptions, ReadOptions, prepare
from bytelm.data.calibration import calibrate_folder
from bytelm.errors import ConfigError, DataError
from bytelm.evaluation import Likelihood, total
from bytelm.figures import check_matplotlib, draw_curves, draw_entropies, draw_rules
from bytelm.inference import Sampling
from bytelm.language_model import LanguageModel, load
from bytelm.progress import Callback, Progress
from bytelm.storage import is_vacant, read_json, write_json, write_text
from bytelm.tracking import read_jsonl
from bytelm.training import TrainingResult, Turns, fit_ngrams, train_in_turns
from bytelm.training.run import METRICS
from bytelm.version import __version__

PATCH_SIZE = 4.5
FLOPS = 4e12
"""Training FLOPs of each of the two models, if the time allows."""
MIN_FLOPS = FLOPS / 2
"""Fewer FLOPs than these say little: the BLT is not better than xz."""
EVALUATION_SHARE, DRAWING_SHARE = 0.06, 0.03
"""Shares of the time kept for evaluation, and for sampling and figures."""
PROBE_SECONDS = 10.0
"""Time of training by which its speed is judged."""
CUT_BYTES = 32_768
MIN_BYTES = 100_000
TEXT_BYTES, TEXT_BYTES_PER_MINUTE = 16_000_000, 4_000_000
"""Most text of the standard library, in all and for the time; a model reads a part of it once."""
COUNTED_SHARE = 0.25
"""Share of the text that the scorer counts; entropies of counted text are lower than of other."""
HELD_OUT_BYTES = 150_000
PLAN, RESULTS, REPORT = "plan.json", "results.json", "report.md"
STAGES = 6


@dataclass(frozen=True)
class Row:
    """Row of the table of results."""

    name: str
    bits_per_byte: float
    patch_size: float | None = None
    parameters: int | None = None
    """Parameters without hash embeddings, which are look-ups."""
    hash_parameters: int | None = None
    """Parameters in hash embeddings."""
    flops: float | None = None
    train_bytes: int | None = None


class Quickstart(NamedTuple):
    """Results of a quickstart; its report has the figures."""

    rows: list[Row]
    evaluated_bytes: int
    """Held-out text that the bits per byte are measured on."""
    caution: str | None
    """Why the results say little, if the training was much shorter than usual."""
    prompt: bytes
    sample: bytes
    """The BLT's continuation of the prompt."""
    seconds: float
    out: Path


def run_quickstart(
    data: Path | None,
    out: Path,
    *,
    minutes: float = 6.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Quickstart:
    """Run the quickstart, or resume the one in the folder.

    Args:
        data: file or folder of text; ``None`` for the standard library of the running Python.
        out: folder of the run.
        minutes: maximum duration; a shorter one means less training.
        seed: seed of weights and data order.
        progress: receives the progress, in :data:`STAGES` stages.

    Raises:
        ConfigError: ``out`` holds a quickstart with other settings, or matplotlib is missing.
        DataError: the text cannot be read, or there is too little of it.
        Stopped: training was stopped; running it again resumes it.
    """
    began = time.monotonic()
    check_matplotlib()
    if not 0 <= seed < 2**63:
        raise ConfigError(f"the seed must be between 0 and 2^63 - 1, not {seed}")
    progress = progress or Progress()
    with _claimed(out, data, seed, minutes):
        progress.stage("reading text")
        text = _prepare_text(data, out, progress)
        progress.stage("counting n-grams, for a scorer")
        size = sum(s.text_bytes for s in text.sources("train").values())
        counted_bytes = min(max(round(COUNTED_SHARE * size), MIN_BYTES), 6_000_000)
        counted = load_recipe(
            "quickstart-entropy",
            [f"data.path={out / 'text'}", f"seed={seed}", f"model.max_bytes={counted_bytes}"],
        )
        assert isinstance(counted, NgramRecipe)
        fit_ngrams(counted, out / "entropy")
        progress.stage(f"scoring the text; finding a threshold for {PATCH_SIZE} bytes per patch")
        threshold = _score(out, progress)
    progress.note(f"threshold {threshold:.3f} nats")

    write_json(out / PLAN, {**read_json(out / PLAN), "is_training": True})
    progress.stage("training a BLT and a plain byte transformer in turns, with the same FLOPs")
    coach = _Coach(progress, out, began, minutes)
    results = coach.train(seed)

    progress.stage("evaluating on held-out files")
    lm, baseline = load(out / "blt", "cpu"), load(out / "byte", "cpu")
    documents = _held_out(out / "text")
    end = began + 60 * minutes * (1 - DRAWING_SHARE)
    documents, likelihoods = _evaluate([lm, baseline], documents, end)
    rows = [
        _row("BLT, entropy patches", lm, likelihoods[0], results[0]),
        _row("byte transformer", baseline, likelihoods[1], results[1]),
        _xz(documents),
    ]
    progress.stage("sampling and drawing")
    prompt = documents[0][:60]
    sample = _sample(lm, prompt, seed, end + 60 * minutes * DRAWING_SHARE / 2)
    snippet = documents[0][:192]
    _draw(out, lm, snippet)
    found = Quickstart(
        rows,
        sum(map(len, documents)),
        coach.caution(results[0].flops),
        prompt,
        sample,
        time.monotonic() - began,
        out,
    )
    _write_report(found, text, threshold)
    return found


def _library(max_bytes: int) -> list[Path]:
    """Return files of the standard library, in random order, up to about ``max_bytes``."""
    library = Path(sysconfig.get_paths()["stdlib"])
    # Installed packages may live inside the library's folder; they differ between machines.
    parts = [p for p in sorted(library.iterdir()) if not p.name.endswith("-packages")]
    files = [p for part in parts for p in ([part] if part.is_file() else sorted(part.rglob("*")))]
    files = [p for p in files if p.suffix == ".py" and p.is_file()]
    random.Random(0).shuffle(files)
    ends = accumulate(path.stat().st_size for path in files)
    return [path for path, end in zip(files, ends, strict=True) if end <= max_bytes]


def _prepare_text(data: Path | None, out: Path, progress: Progress) -> Manifest:
    """Prepare the documents of the text, with a few held out."""
    max_bytes = read_json(out / PLAN)["text_bytes"]
    if data is None:
        arguments = [f"python={path}" for path in _library(max_bytes)]
        read = ReadOptions(include="*.py")
    else:
        arguments = [str(data)]
        # Long documents are cut, so that a part of a single file can be held out.
        read = ReadOptions(cut_bytes=CUT_BYTES)
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


def _score(out: Path, progress: Progress) -> float:
    options = PrepareOptions(scorer=out / "entropy")
    with progress.preparing() as report:
        prepare([str(out / "text")], out / "scored", options, report)
    rule = calibrate_folder(out / "scored", EntropyPatching(), PATCH_SIZE).rule
    return EntropyPatching.model_validate(rule).threshold or 0.0


def _training_recipe(name: str, out: Path, seed: int) -> Recipe:
    overrides = [
        f"data.path={out / ('scored' if name == 'blt' else 'text')}",
        f"train.seed={seed}",
        # The clock decides the number of steps, and when to validate.
        *(f"train.{name}={10**9}" for name in ("steps", "validate_every", "checkpoint_every")),
    ]
    recipe = load_recipe(f"quickstart-{name}", overrides)
    assert isinstance(recipe, Recipe)
    return recipe


class _Coach:
    """Training of the two models within the time, with its progress and warnings."""

    def __init__(self, progress: Progress, out: Path, began: float, minutes: float) -> None:
        self._progress, self._out = progress, out
        self._began, self._minutes = began, minutes
        self._preparation = time.monotonic() - began
        self._figures: dict[str, str] = {}
        self._wanted: int | None = None

    def train(self, seed: int) -> list[TrainingResult]:
        """Train both models; returns the results of the BLT and of the byte transformer."""
        recipes = [(_training_recipe(n, self._out, seed), self._out / n) for n in ("blt", "byte")]
        callbacks = [_Latest(name, self._figures, self._progress) for name in ("BLT", "byte")]
        deadline = self._began + 60 * self._minutes * (1 - EVALUATION_SHARE - DRAWING_SHARE)
        with self._progress.counting("training", 100) as count:

            def report(turns: Turns) -> None:
                count(int(100 * turns.share), ", ".join(self._figures.values()))
                self._check_speed(turns)

            return train_in_turns(recipes, FLOPS, deadline, callbacks=callbacks, report=report)

    def _check_speed(self, turns: Turns) -> None:
        """Say once if the time will not be enough; ``_wanted`` is the time that would be."""
        if turns.seconds < min(PROBE_SECONDS, 0.1 * 60 * self._minutes):
            return
        training = 2 * FLOPS / turns.flops_per_second
        share = 1 - EVALUATION_SHARE - DRAWING_SHARE
        is_first = self._wanted is None
        self._wanted = math.ceil(1.1 * (self._preparation + training) / share / 60)
        if is_first and turns.reachable < MIN_FLOPS:
            self._progress.note(self._advice(turns.reachable))

    def caution(self, flops: float) -> str | None:
        """Return a warning if a model got fewer FLOPs than a meaningful comparison needs."""
        return self._advice(flops) if flops < 0.99 * MIN_FLOPS else None

    def _advice(self, flops: float) -> str:
        wanted = self._wanted
        if wanted is None:
            wanted = math.ceil(self._minutes * FLOPS / max(flops, 1.0))
        return (
            f"{self._minutes:g} minutes allow {flops / FLOPS:.0%} of the usual training on this "
            "computer now, too little for a meaningful result: "
            f"--minutes {wanted}, with another --out, would allow all of it"
        )


class _Latest(Callback):
    """Latest metrics of a model, for the progress of both."""

    def __init__(self, name: str, figures: dict[str, str], progress: Progress) -> None:
        self._name, self._figures, self._progress = name, figures, progress

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        if "validation_bpb" in metrics:
            bpb = metrics["validation_bpb"]
            self._progress.note(f"{self._name}, step {step}: held-out {bpb:.3f} bpb")
        else:
            self._figures[self._name] = f"{self._name} {metrics['bpb']:.3f} bpb"


@contextmanager
def _claimed(out: Path, data: Path | None, seed: int, minutes: float) -> Iterator[None]:
    """Claim the folder, and give it back if the block fails before anything was trained.

    So another text can be tried after one that cannot be used. An interruption keeps the claim:
    the same command resumes.
    """
    is_new = not out.exists()
    _claim(out, data, seed, minutes)
    try:
        yield
    except Exception:
        if not read_json(out / PLAN)["is_training"]:
            for name in ("text", "entropy", "scored"):
                shutil.rmtree(out / name, ignore_errors=True)
            (out / PLAN).unlink()
            if is_new:
                with suppress(OSError):
                    out.rmdir()
        raise


def _claim(out: Path, data: Path | None, seed: int, minutes: float) -> None:
    """Create the folder of a new quickstart, or check that an existing one has these settings."""
    settings = {"data": None if data is None else str(data.resolve()), "seed": seed}
    if not (out / PLAN).exists():
        if not is_vacant(out):
            raise ConfigError(f"{out} is not empty and holds no quickstart: choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        text_bytes = min(TEXT_BYTES, round(minutes * TEXT_BYTES_PER_MINUTE))
        plan = {"settings": settings, "text_bytes": text_bytes, "is_training": False}
        write_json(out / PLAN, plan)
        return
    found = read_json(out / PLAN)["settings"]
    if found != settings:
        raise ConfigError(
            f"{out} holds a quickstart with other settings ({found}): choose another --out, or "
            "remove it"
        )


def _held_out(folder: Path) -> list[bytes]:
    """Return held-out documents, about :data:`HELD_OUT_BYTES`, those to quote from first."""
    dataset = Dataset(folder, "validation")
    documents, size = [], 0
    for index in range(len(dataset)):
        # Cut, so that the evaluation can end on time.
        documents.append(dataset.document(index)[:CUT_BYTES])
        size += len(documents[-1])
        if size > HELD_OUT_BYTES:
            break
    # The first document is quoted, so it must be long enough.
    documents.sort(key=lambda document: len(document) < 2000)
    return documents


def _evaluate(
    lms: list[LanguageModel], documents: list[bytes], end: float
) -> tuple[list[bytes], list[Likelihood]]:
    """Return the documents that were evaluated until ``end``, and their likelihood by each model.

    All models are evaluated on the same documents, at least on one.
    """
    found: list[list[Likelihood]] = [[] for _ in lms]
    for number, document in enumerate(documents):
        if number and time.monotonic() > end:
            documents = documents[:number]
            break
        for lm, likelihoods in zip(lms, found, strict=True):
            by_label = lm.likelihood([("", document)], stride=lm.context_bytes // 2)
            likelihoods += by_label.values()
    return documents, [total(likelihoods) for likelihoods in found]


def _row(name: str, lm: LanguageModel, likelihood: Likelihood, result: TrainingResult) -> Row:
    counts = parameters_by_part(lm.config.model)
    hashed = counts.get("hash embeddings", 0)
    return Row(
        name,
        likelihood.bits_per_byte,
        likelihood.unit_bytes if likelihood.num_units else None,
        sum(counts.values()) - hashed,
        hashed,
        result.flops,
        result.bytes_seen,
    )


def _sample(lm: LanguageModel, prompt: bytes, seed: int, end: float) -> bytes:
    """Return a continuation of the prompt, a shorter one if the time is up."""
    sampling = Sampling(temperature=0.7, top_p=0.95, seed=seed)
    sample = b""
    for part in lm.stream(prompt, max_bytes=400, sampling=sampling):
        sample += part.data
        if time.monotonic() > end:
            break
    return sample


def _xz(documents: list[bytes]) -> Row:
    compressed = sum(len(lzma.compress(document, preset=9)) for document in documents)
    return Row("xz -9, per file", 8 * compressed / sum(map(len, documents)))


def _draw(out: Path, lm: LanguageModel, snippet: bytes) -> None:
    patched = lm.patch(snippet)
    draw_entropies(patched, out / "entropies.svg")
    rules = [
        patched,
        lm.patch(snippet, SpacePatching()),
        lm.patch(snippet, StaticPatching(length=4)),
    ]
    draw_rules(rules, out / "rules.svg")
    curves = {}
    for name, label in (("blt", "BLT"), ("byte", "byte transformer")):
        points = [m for m in read_jsonl(out / name / METRICS) if "validation_bpb" in m]
        flops = [m["validation_flops"] for m in points]
        curves[label] = (flops, [m["validation_bpb"] for m in points])
    draw_curves(curves, out / "training.svg", x_label="training FLOPs")


HEADINGS = ["model", "bits/byte", "bytes/patch", "params", "+ hashed", "read", "TFLOPs"]


def table_rows(rows: list[Row]) -> list[list[str]]:
    """Return the cells of the table of results, under :data:`HEADINGS`."""
    return [
        [
            row.name,
            f"{row.bits_per_byte:.3f}",
            "-" if row.patch_size is None else f"{row.patch_size:.2f}",
            "-" if row.parameters is None else f"{row.parameters / 1e6:.2f}M",
            "-" if row.hash_parameters is None else f"{row.hash_parameters / 1e6:.2f}M",
            "-" if row.train_bytes is None else f"{row.train_bytes / 1e6:.2f}M",
            "-" if row.flops is None else f"{row.flops / 1e12:.2f}",
        ]
        for row in rows
    ]


def _write_report(found: Quickstart, text: Manifest, threshold: float) -> None:
    rows, seconds, out = found.rows, found.seconds, found.out
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    versions = f"bytelm {__version__}, torch {torch.__version__}"
    write_json(
        out / RESULTS,
        {
            "rows": [asdict(row) for row in rows],
            "evaluated_bytes": found.evaluated_bytes,
            "caution": found.caution,
            "threshold": threshold,
            "seconds": seconds,
            "machine": machine,
            "versions": versions,
        },
    )
    lines = [" | ".join(HEADINGS), " | ".join("---" for _ in HEADINGS)]
    lines += [" | ".join(row) for row in table_rows(rows)]
    caution = f"\n**{found.caution}**\n" if found.caution else ""
    table = "\n".join(f"| {line} |" for line in lines)
    documents = sum(s.documents for s in text.sources().values())
    size = sum(s.text_bytes for s in text.sources().values())
    shown = (found.prompt + found.sample).decode("utf-8", "replace")
    write_text(
        out / REPORT,
        f"""# Quickstart

{documents:,} documents, {size:,} bytes; {seconds / 60:.1f} minutes on {machine}; {versions}.

{table}
{caution}
Bits per byte of {found.evaluated_bytes:,} bytes of held-out files: lower is better. The models were
trained on other files of the same kind; `xz` sees only the file that it compresses. Each model was
trained with {rows[0].flops or 0:.2e} FLOPs. Hash embeddings ("+ hashed") are looked up, not
multiplied, so they cost no FLOPs and are counted separately. The entropy model is an n-gram scorer,
made by counting.

![training](training.svg)

## Patches

A grey line stands before each byte that starts a patch: where the entropy of its prediction is
above {threshold:.3f} nats.

![entropies](entropies.svg)
![rules](rules.svg)

## A sample

The first {len(found.prompt)} bytes are the prompt.

~~~
{shown}
~~~
""",
    )
