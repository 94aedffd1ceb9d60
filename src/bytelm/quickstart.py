"""The quickstart: train, evaluate and sample a small BLT on this computer, in minutes.

Nothing is downloaded: by default the text is the Python standard library, which is present wherever
this runs. The steps are the commands a user would type, so the folder is an example of everything
that the package writes. Each step can be interrupted; the same command resumes it.
"""

import lzma
import os
import platform
import shutil
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
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
from bytelm.errors import BytelmError, ConfigError, DataError
from bytelm.evaluation import total
from bytelm.figures import check_matplotlib, draw_curves, draw_entropies, draw_rules
from bytelm.inference import Sampling
from bytelm.language_model import LanguageModel, load
from bytelm.progress import Progress
from bytelm.storage import is_vacant, read_json, write_json, write_text
from bytelm.tracking import read_jsonl
from bytelm.training import StepCost, TrainingResult, fit_ngrams, step_cost, train
from bytelm.training.run import METRICS
from bytelm.version import __version__

PATCH_SIZE = 4.5
FLOPS = 4e12
"""Training FLOPs of each of the two models, if the time allows."""
RESERVED_SHARE = 0.22
"""Share of the time kept for validation, evaluation, sampling and figures."""
MIN_BYTES = 100_000
HELD_OUT_BYTES = 150_000
PLAN, RESULTS, REPORT = "plan.json", "results.json", "report.md"
STAGES = 7


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
        BytelmError: training was stopped; running it again resumes it.
    """
    began = time.monotonic()
    check_matplotlib()
    if not 0 <= seed < 2**63:
        raise ConfigError(f"the seed must be between 0 and 2^63 - 1, not {seed}")
    progress = progress or Progress()
    with _claimed(out, data, seed):
        progress.stage("reading text")
        text = _prepare_text(data, out, progress)
        progress.stage("counting n-grams, for a scorer")
        counted = load_recipe("quickstart-entropy", [f"data.path={out / 'text'}", f"seed={seed}"])
        assert isinstance(counted, NgramRecipe)
        fit_ngrams(counted, out / "entropy")
        progress.stage(f"scoring the text; finding a threshold for {PATCH_SIZE} bytes per patch")
        threshold = _score(out, progress)
    progress.note(f"threshold {threshold:.3f} nats")

    left = 60 * minutes * (1 - RESERVED_SHARE) - (time.monotonic() - began)
    plan = _plan(out, seed, left, progress)
    progress.stage(f"training a BLT for {plan['blt']} steps")
    blt = _train("blt", out, plan, seed, progress)
    progress.stage(f"training a plain byte transformer for {plan['byte']} steps, the same FLOPs")
    byte = _train("byte", out, plan, seed, progress)

    progress.stage("evaluating on held-out files")
    lm, baseline = load(out / "blt", "cpu"), load(out / "byte", "cpu")
    documents = _held_out(out / "text")
    rows = [
        _measure("BLT, entropy patches", lm, documents, blt),
        _measure("byte transformer", baseline, documents, byte),
        _xz(documents),
    ]
    progress.stage("sampling and drawing")
    prompt = documents[0][:60]
    sampling = Sampling(temperature=0.7, top_p=0.95, seed=seed)
    sample = lm.generate(prompt, max_bytes=400, sampling=sampling)
    snippet = documents[0][:192]
    _draw(out, lm, snippet)
    found = Quickstart(rows, prompt, sample, time.monotonic() - began, out)
    _write_report(found, text, threshold)
    return found


def _prepare_text(data: Path | None, out: Path, progress: Progress) -> Manifest:
    """Prepare the documents of the text, with a few held out."""
    if data is None:
        library = Path(sysconfig.get_paths()["stdlib"])
        # Installed packages may live inside the library's folder; they differ between machines.
        parts = [p for p in sorted(library.iterdir()) if not p.name.endswith("-packages")]
        arguments = [f"python={p}" for p in parts if p.is_dir() or p.suffix == ".py"]
        read = ReadOptions(include="*.py")
    else:
        arguments = [str(data)]
        # Long documents are cut, so that a part of a single file can be held out.
        read = ReadOptions(cut_bytes=32_768)
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


def _training_recipe(name: str, out: Path, seed: int, steps: int) -> Recipe:
    overrides = [
        f"data.path={out / ('scored' if name == 'blt' else 'text')}",
        f"train.seed={seed}",
        f"train.steps={steps}",
        f"train.validate_every={max(steps // 6, 1)}",
        f"train.checkpoint_every={max(steps // 4, 1)}",
    ]
    recipe = load_recipe(f"quickstart-{name}", overrides)
    assert isinstance(recipe, Recipe)
    return recipe


@contextmanager
def _claimed(out: Path, data: Path | None, seed: int) -> Iterator[None]:
    """Claim the folder, and give it back if the block fails before anything was trained.

    So another text can be tried after one that cannot be used. An interruption keeps the claim:
    the same command resumes.
    """
    is_new = not out.exists()
    _claim(out, data, seed)
    try:
        yield
    except Exception:
        if read_json(out / PLAN)["steps"] is None:
            for name in ("text", "entropy", "scored"):
                shutil.rmtree(out / name, ignore_errors=True)
            (out / PLAN).unlink()
            if is_new:
                with suppress(OSError):
                    out.rmdir()
        raise


def _claim(out: Path, data: Path | None, seed: int) -> None:
    """Create the folder of a new quickstart, or check that an existing one has these settings."""
    settings = {"data": None if data is None else str(data.resolve()), "seed": seed}
    if not (out / PLAN).exists():
        if not is_vacant(out):
            raise ConfigError(f"{out} is not empty and holds no quickstart: choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / PLAN, {"settings": settings, "steps": None})
        return
    found = read_json(out / PLAN)["settings"]
    if found != settings:
        raise ConfigError(
            f"{out} holds a quickstart with other settings ({found}): choose another --out, or "
            "remove it"
        )


def _plan(out: Path, seed: int, seconds: float, progress: Progress) -> dict[str, int]:
    """Return the steps of both models, at equal FLOPs; a resumed run keeps those it has."""
    plan = read_json(out / PLAN)
    if plan["steps"] is not None:
        return plan["steps"]
    costs = {name: step_cost(_training_recipe(name, out, seed, 1)) for name in ("blt", "byte")}
    steps = equal_flops(costs, FLOPS, seconds)
    flops = steps["blt"] * costs["blt"].flops
    if flops < 0.9 * FLOPS:
        progress.note(
            f"time allows {flops / FLOPS:.0%} of the usual training: --minutes gives more"
        )
    write_json(out / PLAN, {**plan, "steps": steps})
    return steps


def equal_flops(costs: dict[str, StepCost], flops: float, seconds: float) -> dict[str, int]:
    """Return the steps of several models such that all spend the same FLOPs within the time.

    Args:
        costs: cost of one step, by model.
        flops: FLOPs to spend on each model, if the time allows.
        seconds: time for all models together.
    """
    seconds_per_flop = sum(cost.seconds / cost.flops for cost in costs.values())
    affordable = min(flops, max(seconds, 0.0) / seconds_per_flop)
    return {name: max(round(affordable / cost.flops), 1) for name, cost in costs.items()}


def _train(
    name: str, out: Path, plan: dict[str, int], seed: int, progress: Progress
) -> TrainingResult:
    recipe = _training_recipe(name, out, seed, plan[name])
    result = train(recipe, out / name, callbacks=[progress.training(name)])
    if not result.finished:
        raise BytelmError(f"stopped in step {result.step}: the same command resumes from there")
    return result


def _held_out(folder: Path) -> list[bytes]:
    """Return whole held-out documents, about :data:`HELD_OUT_BYTES`, those to quote from first."""
    dataset = Dataset(folder, "validation")
    documents, size = [], 0
    for index in range(len(dataset)):
        documents.append(dataset.document(index))
        size += len(documents[-1])
        if size > HELD_OUT_BYTES:
            break
    # The first document is quoted, so it must be long enough.
    documents.sort(key=lambda document: len(document) < 2000)
    return documents


def _measure(name: str, lm: LanguageModel, documents: list[bytes], result: TrainingResult) -> Row:
    labelled = [("", document) for document in documents]
    likelihood = total(lm.likelihood(labelled, stride=lm.context_bytes // 2).values())
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


HEADINGS = ["model", "bits/byte", "bytes/patch", "params", "+ hashed", "bytes read"]


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
        ]
        for row in rows
    ]


def _write_report(found: Quickstart, text: Manifest, threshold: float) -> None:
    rows, prompt, sample, seconds, out = found
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    versions = f"bytelm {__version__}, torch {torch.__version__}"
    write_json(
        out / RESULTS,
        {
            "rows": [asdict(row) for row in rows],
            "threshold": threshold,
            "seconds": seconds,
            "machine": machine,
            "versions": versions,
        },
    )
    lines = [" | ".join(HEADINGS), " | ".join("---" for _ in HEADINGS)]
    lines += [" | ".join(row) for row in table_rows(rows)]
    table = "\n".join(f"| {line} |" for line in lines)
    documents = sum(s.documents for s in text.sources().values())
    size = sum(s.text_bytes for s in text.sources().values())
    shown = (prompt + sample).decode("utf-8", "replace")
    write_text(
        out / REPORT,
        f"""# Quickstart

{documents:,} documents, {size:,} bytes; {seconds / 60:.1f} minutes on {machine}; {versions}.

{table}

Bits per byte of held-out files: lower is better. The models were trained on other files of the same
kind; `xz` sees only the file that it compresses. Each model was trained with
{rows[0].flops or 0:.2e} FLOPs. Hash embeddings ("+ hashed") are looked up, not multiplied, so they
cost no FLOPs and are counted separately. The entropy model is an n-gram scorer, made by counting.

![training](training.svg)

## Patches

A grey line stands before each byte that starts a patch: where the entropy of its prediction is
above {threshold:.3f} nats.

![entropies](entropies.svg)
![rules](rules.svg)

## A sample

The first {len(prompt)} bytes are the prompt.

~~~
{shown}
~~~
""",
    )
