"""Tables of a study: one row for each run, and one for each run and held-out document.

Figures and pages are made from these two Parquet files alone::

    results.parquet     a run: what it was, what it cost, what it reached
    documents.parquet   run, document, source, nats, bytes
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bytelm.errors import DataError
from bytelm.storage import atomic_file, to_json
from bytelm.study.plan import Plan, plan_runs
from bytelm.study.results import finished_result

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
        ("attention", pa.string()),
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
        ("cpu_seconds", pa.float64()),
        ("peak_bytes", pa.int64()),
        ("memory", pa.string()),
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
    """Finished runs, and the likelihood of every held-out document under each of them."""

    rows: list[dict[str, Any]]
    nats: NDArray[np.float64]
    """``nats[run, document]``, with runs in the order of ``rows``."""
    num_bytes: NDArray[np.float64]
    """Length of each document in bytes."""
    sources: tuple[str, ...]
    """Source of each document."""
    failures: tuple[str, ...] = ()
    """Runs that diverged, which are in none of the above, and why."""

    def bits_per_byte(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the bits per byte of every run, with weights for the documents."""
        return (self.nats @ weights) / (self.num_bytes @ weights) / math.log(2)

    def by_source(self, row: int) -> dict[str, float]:
        """Return the bits per byte of a run by source."""
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
    """Return the planned budget of a run, in training FLOPs or in bytes."""
    return float(row["budget_flops"] or row["budget_bytes"])


def write_table(plan: Plan, out: Path) -> tuple[int, int]:
    """Write the finished runs of a study to its two tables.

    Args:
        plan: the plan of the study.
        out: folder of the study; the tables go to :func:`table_folder`.

    Returns:
        The number of finished runs, and of all runs.

    Raises:
        ConfigError: a result was made with other settings than the plan's, or from other data.
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
    """Return the folder of a plan's tables, figures and page within that of a study."""
    return out / plan.name


def _replace(table: pa.Table, path: Path) -> None:
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary)


def find_table(plan: Plan, folder: Path) -> Path:
    """Return the folder of a plan's tables: the one that is given, or the one in a study's folder.

    Raises:
        DataError: there is no table.
    """
    for one in (folder, table_folder(plan, folder)):
        if (one / RESULTS).is_file():
            return one
    found = [str(path.parent) for path in sorted(folder.glob(f"*/{RESULTS}"))]
    hint = f"; there are tables in {', '.join(found)}" if found else ""
    raise DataError(
        f"{folder} holds no table of a study: neither {RESULTS} nor {plan.name}/{RESULTS}{hint}"
    )


def read_table(folder: Path, plan: Plan | None = None) -> Results:
    """Read the tables in a folder, without runs that failed.

    Args:
        folder: folder of the two files.
        plan: keep only the families of this plan, with its labels; ``None`` for all.

    Raises:
        DataError: there is no table, or its runs were measured on different text.
    """
    try:
        rows = pq.read_table(folder / RESULTS).to_pylist()
        # Tables of earlier versions lack some columns.
        rows = [{**dict.fromkeys(RUN_SCHEMA.names), **row} for row in rows]
        documents = pq.read_table(folder / DOCUMENTS)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{folder} holds no table of a study: {error}") from None
    if plan is not None:
        rows = [row for row in rows if row["family"] in plan.families]
        # Labels may have changed since the runs.
        rows = [{**row, "label": plan.families[row["family"]].label} for row in rows]
    kept = [row for row in rows if row["failure"] is None]
    failures = [f"{row['run']}: {row['failure']}" for row in rows if row["failure"] is not None]
    names = [row["run"] for row in kept]
    mine = np.isin(documents["run"].to_numpy(), names)
    columns = {name: documents[name].to_numpy()[mine] for name in documents.column_names}
    _, first, at = np.unique(columns["document"], return_index=True, return_inverse=True)
    # The last digits of sums depend on the order in memory: keep it, to reproduce old figures.
    nats = np.full((len(names), len(first)), np.nan, order="F")
    nats[[names.index(run) for run in columns["run"]], at] = columns["nats"]
    num_bytes = columns["bytes"][first].astype(float)
    if (columns["bytes"] != num_bytes[at]).any():
        raise DataError(f"{folder}: runs were measured on different text; run them again")
    if np.isnan(nats).any():
        raise DataError(f"{folder}: runs were measured on different documents; run them again")
    return Results(kept, nats, num_bytes, tuple(columns["source"][first]), tuple(failures))


def _row(result: dict[str, Any]) -> dict[str, Any]:
    run = result["run"]
    plain = {name: result.get(name) for name in RUN_SCHEMA.names if name not in ("run", "machines")}
    return {
        **plain,
        "run": run["name"],
        "family": run["family"],
        "size": run["size"],
        "seed": run["seed"],
        "settings": to_json(dict(run["settings"])),
        "budget_flops": run["flops"],
        "budget_bytes": run["bytes"],
        "machines": to_json(result.get("machines", [])),
        "recipe": to_json(result["recipe"]),
    }
