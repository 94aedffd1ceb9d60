"""The table of a study: a row for each run, and one for each run and held-out document.

Both are Parquet, which any tool reads, and all that figures and pages are made of::

    results.parquet     a run: what it was, what it cost, what it reached
    documents.parquet   run, document, source, nats, bytes
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bytelm.checkpoint import replacing
from bytelm.errors import DataError
from bytelm.study.plan import Plan, plan_runs
from bytelm.study.runs import finished_result

RESULTS, DOCUMENTS = "results.parquet", "documents.parquet"

RUN_SCHEMA = pa.schema(
    [
        ("run", pa.string()),
        ("family", pa.string()),
        ("label", pa.string()),
        ("size", pa.string()),
        ("seed", pa.int64()),
        ("settings", pa.string()),
        ("budget_flops", pa.float64()),
        ("budget_bytes", pa.float64()),
        ("flops", pa.float64()),
        ("scorer_flops", pa.float64()),
        ("scorer_training_flops", pa.float64()),
        ("steps", pa.int64()),
        ("train_bytes", pa.int64()),
        ("epochs", pa.float64()),
        ("parameters", pa.int64()),
        ("table_parameters", pa.int64()),
        ("unit_bytes", pa.float64()),
        ("inference_flops", pa.float64()),
        ("bpb", pa.float64()),
        ("evaluated_bytes", pa.int64()),
        ("padded_bytes", pa.float64()),
        ("padded_patches", pa.float64()),
        ("seconds", pa.float64()),
        ("peak_bytes", pa.int64()),
        ("slices", pa.int64()),
        ("machines", pa.string()),
        ("failure", pa.string()),
        ("recipe", pa.string()),
    ]
)
DOCUMENT_SCHEMA = pa.schema(
    [
        ("run", pa.string()),
        ("document", pa.int64()),
        ("source", pa.string()),
        ("nats", pa.float64()),
        ("bytes", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Results:
    """Finished runs, and the likelihood of each held-out document under each."""

    rows: list[dict[str, Any]]
    nats: NDArray[np.float64]
    """``nats[run, document]``, of the runs in ``rows``."""
    num_bytes: NDArray[np.float64]
    """Of each document."""
    sources: tuple[str, ...]
    """Of each document."""
    failures: tuple[str, ...] = ()
    """Of runs that diverged, which are in none of the above."""

    def bits_per_byte(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of every run, each document counted ``weights[document]`` times."""
        return (self.nats @ weights) / (self.num_bytes @ weights) / math.log(2)

    def by_source(self, row: int) -> dict[str, float]:
        """Bits per byte of a run by source."""
        names = np.array(self.sources)
        return {
            name: float(
                self.nats[row, names == name].sum()
                / self.num_bytes[names == name].sum()
                / math.log(2)
            )
            for name in sorted(set(self.sources))
        }


def budget(row: dict[str, Any]) -> float:
    """Of a run, as planned: in training FLOPs, or in bytes."""
    return float(row["budget_flops"] or row["budget_bytes"])


def write_table(plan: Plan, out: Path) -> tuple[int, int]:
    """Table the finished runs of a study; how many there are, and how many runs in all.

    Args:
        plan: of the study.
        out: its folder; the tables go to :func:`table_folder`.

    Raises:
        ConfigError: a run was made by other settings than the plan's.
    """
    rows, documents = [], []
    runs = plan_runs(plan)
    for run in runs:
        result = finished_result(plan, run, out)
        if result is None:
            continue
        rows.append(_row(result))
        documents += [{"run": run.name, **one} for one in result.get("documents", ())]
    if rows:
        folder = table_folder(plan, out)
        folder.mkdir(exist_ok=True)
        _replace(pa.Table.from_pylist(documents, DOCUMENT_SCHEMA), folder / DOCUMENTS)
        _replace(pa.Table.from_pylist(rows, RUN_SCHEMA), folder / RESULTS)
    return len(rows), len(runs)


def table_folder(plan: Plan, out: Path) -> Path:
    """Where the tables, figures and page of a plan go: several plans may share a study's folder."""
    return out / plan.name


def _replace(table: pa.Table, path: Path) -> None:
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


def read_table(folder: Path, plan: Plan | None = None) -> Results:
    """The table in a folder, without runs that failed.

    Args:
        folder: of a study, or a copy of its two files.
        plan: where given, only families of this plan are kept.

    Raises:
        DataError: there is no table, or its runs were measured on different text.
    """
    try:
        rows = pq.read_table(folder / RESULTS).to_pylist()
        documents = pq.read_table(folder / DOCUMENTS)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{folder} holds no table of a study: {error}") from None
    mine = [row for row in rows if not plan or row["family"] in plan.families]
    kept = [row for row in mine if row["failure"] is None]
    failures = [f"{row['run']}: {row['failure']}" for row in mine if row["failure"] is not None]
    names = {row["run"]: number for number, row in enumerate(kept)}
    columns = documents.to_pydict()
    numbers = sorted(set(columns["document"]))
    at = {number: column for column, number in enumerate(numbers)}
    nats = np.full((len(kept), len(numbers)), np.nan)
    num_bytes = np.zeros(len(numbers))
    sources = [""] * len(numbers)
    for run, number, source, one_nats, one_bytes in zip(*columns.values(), strict=True):
        if run not in names:
            continue
        column = at[number]
        nats[names[run], column] = one_nats
        if num_bytes[column] not in (0, one_bytes):
            raise DataError(f"{folder}: runs were measured on different text; run them again")
        num_bytes[column] = one_bytes
        sources[column] = source
    used = num_bytes > 0
    if np.isnan(nats[:, used]).any():
        raise DataError(f"{folder}: runs were measured on different documents; run them again")
    picked = [s for s, keep in zip(sources, used, strict=True) if keep]
    return Results(kept, nats[:, used], num_bytes[used], tuple(picked), tuple(failures))


def _row(result: dict[str, Any]) -> dict[str, Any]:
    run = result["run"]
    plain = {name: result.get(name) for name in RUN_SCHEMA.names if name not in ("run", "machines")}
    return {
        **plain,
        "run": run["name"],
        "family": run["family"],
        "size": run["size"],
        "seed": run["seed"],
        "settings": json.dumps(dict(run["settings"])),
        "budget_flops": run["flops"],
        "budget_bytes": run["bytes"],
        "machines": json.dumps(result.get("machines", [])),
        "recipe": json.dumps(result["recipe"]),
    }
