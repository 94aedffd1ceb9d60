"""The results of the quickstart, and its report."""

import lzma
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from bytelm.accounting import parameters_by_part
from bytelm.config import SpacePatching, StaticPatching
from bytelm.data import Manifest
from bytelm.figures import draw_curves, draw_entropies, draw_rules
from bytelm.language_model import LanguageModel
from bytelm.likelihood import Likelihood
from bytelm.storage import write_json, write_text
from bytelm.tracking import read_jsonl
from bytelm.training import TrainingResult
from bytelm.training.run import METRICS
from bytelm.version import __version__

RESULTS, REPORT = "results.json", "report.md"


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


def row(name: str, lm: LanguageModel, likelihood: Likelihood, result: TrainingResult) -> Row:
    """Return the row of a trained model."""
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


def xz(documents: list[bytes]) -> Row:
    """Return the row of a compressor, which has seen no other text."""
    compressed = sum(len(lzma.compress(document, preset=9)) for document in documents)
    return Row("xz -9, per file", 8 * compressed / sum(map(len, documents)))


def draw(out: Path, lm: LanguageModel, snippet: bytes) -> None:
    """Draw the figures of the report: patches of the snippet, and both trainings."""
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


def write_report(found: Quickstart, text: Manifest, threshold: float) -> None:
    """Write the results as JSON and as a page."""
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
