"""What a trained run has reached: likelihood of the held-out documents, and what it took."""

import hashlib
import json
import platform
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch

import bytelm
from bytelm.checkpoint import load_model
from bytelm.data import Dataset
from bytelm.evaluation import Likelihood, dataset_pieces, evaluate_pieces, total
from bytelm.model.ngram import NgramScorer
from bytelm.study.plan import Plan
from bytelm.study.settling import Settled, inference_flops, scorer_training_flops
from bytelm.tokens import load_tokenizer
from bytelm.tracking import read_jsonl
from bytelm.training.run import METRICS
from bytelm.training.setup import choose_device
from bytelm.version import __version__

SLICES = "slices.jsonl"
"""In a run's folder, a line for each time it was worked on."""
BEGIN = '{"steps": '
"""Of each of its lines."""


def measure(
    plan: Plan, settled: Settled, out: Path, folder: Path, train_bytes: int
) -> dict[str, Any]:
    """All there is to say of a trained run, JSON-ready.

    Args:
        plan: of the study.
        settled: the run.
        out: folder of the study.
        folder: of the run, with its metrics and slices.
        train_bytes: text it has read.
    """
    about = describe(plan, settled, out)
    by_document, sources = held_out_likelihood(plan, settled, folder)
    whole = total(by_document.values())
    unit = whole.patch_size if whole.num_patches else None
    slices = read_slices(folder)
    padded = [row for row in read_jsonl(folder / METRICS) if "padded_bytes" in row]
    return {
        **about,
        "train_bytes": train_bytes,
        "epochs": train_bytes / about["text_bytes"],
        "bpb": whole.bits_per_byte,
        "unit_bytes": unit,
        "inference_flops": inference_flops(settled.recipe, unit),
        "evaluated_bytes": whole.num_bytes,
        "padded_bytes": _mean([row["padded_bytes"] for row in padded]),
        "padded_patches": _mean([row.get("padded_patches", 0.0) for row in padded]),
        "seconds": sum(one["seconds"] for one in slices),
        "peak_bytes": max(one["peak_bytes"] for one in slices),
        "slices": len(slices),
        "machines": _distinct(one["machine"] for one in slices),
        "failure": None,
        "documents": [
            {"document": n, "source": sources[n], "nats": one.nats, "bytes": one.num_bytes}
            for n, one in sorted(by_document.items())
        ],
    }


def held_out_likelihood(
    plan: Plan, settled: Settled, folder: Path
) -> tuple[dict[int, Likelihood], dict[int, str]]:
    """Likelihood of held-out documents by number, and their sources.

    The pieces are the same for all runs of a study whose rows have the same length.
    """
    data = settled.recipe.data
    assert data.path is not None
    held_out = Dataset(Path(data.path), "validation")
    module, _ = load_model(folder, choose_device(settled.recipe.train))
    assert not isinstance(module, NgramScorer)
    pieces = (
        piece._replace(label=str(piece.stretch.document))
        for piece in dataset_pieces(
            held_out,
            max_bytes=plan.text.evaluated_bytes,
            context_bytes=data.row_bytes,
            skip_bytes=plan.text.skipped_bytes,
        )
    )
    found = evaluate_pieces(module, pieces, context_bytes=data.row_bytes)
    by_document = {int(label): one for label, one in found.items()}
    names, ids = held_out.source_names, held_out.source_ids
    return by_document, {number: names[int(ids[number])] for number in by_document}


def read_slices(folder: Path) -> list[dict[str, Any]]:
    """Lines of the times a run was worked on; one that a power cut left unfinished is dropped.

    What was written after it begins on the same line.
    """
    found = []
    for line in (folder / SLICES).read_text("utf-8").splitlines():
        with suppress(ValueError):
            found.append(json.loads(line[line.rfind(BEGIN) :]))
    return found


def describe(plan: Plan, settled: Settled, out: Path) -> dict[str, Any]:
    """What a run is, trained or not."""
    run, recipe = settled.run, settled.recipe
    family = plan.family(run.family)
    text_bytes = int(Dataset(out / "text", "train").lengths.sum())
    scorer_training = scorer_training_flops(out, family.scorer) if family.scorer else 0.0
    parameters, tables = settled.parameters()
    assert recipe.data.path is not None
    return {
        "run": asdict(run),
        "label": family.label,
        "steps": settled.steps,
        "flops": settled.flops,
        "scorer_flops": settled.steps * settled.scorer_step_flops,
        "scorer_training_flops": scorer_training,
        "parameters": parameters,
        "table_parameters": tables,
        "text_bytes": text_bytes,
        "recipe": recipe.model_dump(mode="json"),
        "evaluated": plan.text.model_dump(include={"evaluated_bytes", "skipped_bytes"}),
        "counts_scorer": settled.counts_scorer,
        "data": Dataset(Path(recipe.data.path), "train").manifest.fingerprint,
        "tokenizer": (
            load_tokenizer(Path(recipe.data.tokenizer)).fingerprint
            if recipe.data.tokenizer
            else None
        ),
    }


@cache
def source_hash() -> str:
    """A short hash of the package's code: runs of one table should be made by one."""
    root = Path(bytelm.__file__).parent
    parts = [path.read_bytes() for path in sorted(root.rglob("*.py"))]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


def machine(device: torch.device) -> dict[str, Any]:
    """Where a slice ran."""
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
