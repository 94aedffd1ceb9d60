"""Measure a trained run: likelihood of the held-out documents, time and memory."""

import hashlib
import json
import platform
from collections.abc import Iterable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch

import bytelm
from bytelm.checkpoint import load_model
from bytelm.data import Dataset
from bytelm.storage import read_lines
from bytelm.study.costs import inference_flops
from bytelm.study.plan import Plan
from bytelm.study.resolving import Resolved
from bytelm.study.resources import RESIDENT
from bytelm.study.results import identity
from bytelm.study.text import scorer_training_flops
from bytelm.tracking import read_jsonl
from bytelm.training import Likelihood, TrainingResult, held_out_spans, measure_spans, total
from bytelm.training.run import METRICS
from bytelm.training.setup import choose_device
from bytelm.version import __version__

FULL_ROWS, DOCUMENTS = "full rows", "documents"
"""What attention is counted in: rows as if each were one document, or the documents in them."""
SLICES = "slices.jsonl"
"""File in a run's folder with a line for each slice."""
BEGIN = '{"steps": '
"""Beginning of each line of that file."""
NO_SOURCES = (
    "__main__.py",
    "cli",
    "display",
    "evaluation",
    "figures.py",
    "inference",
    "interop",
    "language_model.py",
    "progress.py",
    "quickstart.py",
    "serving",
    "tracking.py",
    "version.py",
    "study/bootstrap.py",
    "study/comparison.py",
    "study/drawing.py",
    "study/fit.py",
    "study/page.py",
    "study/words.py",
)
"""The package's code that cannot change what a run computes or how it is measured."""


def measure(
    plan: Plan, resolved: Resolved, out: Path, folder: Path, trained: TrainingResult
) -> dict[str, Any]:
    """Return the complete result of a trained run, ready for JSON.

    Args:
        plan: the plan of the study.
        resolved: the run.
        out: folder of the study.
        folder: folder of the run, with its metrics and slices.
        trained: outcome of the training.
    """
    about = describe(plan, resolved, out)
    scoring = about["scorer_flops"] if resolved.counts_scorer else 0.0
    by_document, sources = held_out_likelihood(plan, resolved, folder)
    whole = total(by_document.values())
    unit = whole.unit_bytes if whole.num_units else None
    slices = read_slices(folder)
    padded = [row for row in read_jsonl(folder / METRICS) if "padded_bytes" in row]
    return {
        **about,
        "flops": trained.flops + scoring,
        "train_bytes": trained.bytes_seen,
        "epochs": trained.bytes_seen / about["text_bytes"],
        "bpb": whole.bits_per_byte,
        "unit_bytes": unit,
        "inference_flops": inference_flops(resolved.recipe, unit),
        "evaluated_bytes": whole.num_bytes,
        "padded_bytes": _mean([row["padded_bytes"] for row in padded]),
        "padded_patches": _mean([row.get("padded_patches", 0.0) for row in padded]),
        "seconds": sum(one["seconds"] for one in slices),
        **_resources(slices),
        "slices": len(slices),
        "machines": _distinct(one["machine"] for one in slices),
        "failure": None,
        "documents": [
            {"document": n, "source": sources[n], "nats": one.nats, "bytes": one.num_bytes}
            for n, one in sorted(by_document.items())
        ],
    }


def held_out_likelihood(
    plan: Plan, resolved: Resolved, folder: Path
) -> tuple[dict[int, Likelihood], dict[int, str]]:
    """Return the likelihood of the held-out documents, and their sources, by number.

    All runs of a study whose rows have the same length are measured on the same spans.
    """
    data = resolved.recipe.data
    assert data.path is not None
    held_out = Dataset(Path(data.path), "validation")
    lm, _ = load_model(folder, choose_device(resolved.recipe.train))
    spans = (
        one._replace(label=str(one.span.document))
        for one in held_out_spans(
            held_out,
            max_bytes=plan.text.evaluated_bytes,
            context_bytes=data.row_bytes,
            skip_bytes=plan.text.skipped_bytes,
        )
    )
    found = measure_spans(lm, spans, context_bytes=data.row_bytes)
    by_document = {int(label): one for label, one in found.items()}
    names, ids = held_out.source_names, held_out.source_ids
    return by_document, {number: names[int(ids[number])] for number in by_document}


def _resources(slices: list[dict[str, Any]]) -> dict[str, Any]:
    """Return time of processors and peak memory over all slices.

    Slices of earlier versions did not record the former, and their memory is of resident pages.
    """
    cpu_seconds = [one["cpu_seconds"] for one in slices if "cpu_seconds" in one]
    kinds = {one.get("memory", RESIDENT) for one in slices}
    return {
        "cpu_seconds": sum(cpu_seconds) if len(cpu_seconds) == len(slices) else None,
        "peak_bytes": max(one["peak_bytes"] for one in slices),
        "memory": kinds.pop() if len(kinds) == 1 else "mixed",
    }


def read_slices(folder: Path) -> list[dict[str, Any]]:
    """Return the record of each slice of a run, without one that a kill cut short."""
    # Earlier versions appended to a line that was cut short; its last record is complete.
    lines = read_lines(folder / SLICES)
    return [json.loads(line[line.rfind(BEGIN) :]) for line in lines]


def describe(plan: Plan, resolved: Resolved, out: Path) -> dict[str, Any]:
    """Return the part of a run's result that is known before it is trained."""
    family = plan.families[resolved.run.family]
    text_bytes = int(Dataset(out / "text", "train").lengths.sum())
    scorer_training = scorer_training_flops(out, family.scorer) if family.scorer else 0.0
    parameters, embedding_parameters = resolved.parameters()
    return {
        "run": asdict(resolved.run),
        "label": family.label,
        "steps": resolved.steps,
        "flops": resolved.flops,
        "attention": FULL_ROWS if resolved.charges_full_rows else DOCUMENTS,
        "scorer_flops": resolved.steps * resolved.scorer_step_flops,
        "scorer_training_flops": scorer_training,
        "parameters": parameters,
        "table_parameters": embedding_parameters,
        "text_bytes": text_bytes,
        "recipe": resolved.recipe.model_dump(mode="json"),
        **identity(plan, resolved.run, out),
    }


@cache
def source_hash() -> str:
    """Return a short hash of the code that decides results; tables record it for each run."""
    root = Path(bytelm.__file__).parent
    paths = [path.relative_to(root).as_posix() for path in sorted(root.rglob("*.py"))]
    left_out = tuple(f"{name}/" for name in NO_SOURCES)
    kept = [path for path in paths if not f"{path}/".startswith(left_out)]
    parts = [(root / path).read_bytes() for path in kept]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine and the software that a slice ran on."""
    on_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "bytelm": __version__,
        "python": platform.python_version(),
        "source": source_hash(),
    }


def _distinct(values: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [json.loads(one) for one in dict.fromkeys(map(json.dumps, values))]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
