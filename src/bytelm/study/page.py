"""Page of a study: tables, fits, crossovers and figures, made only from the stored tables."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bytelm.storage import write_text
from bytelm.study import words
from bytelm.study.bootstrap import Bootstrap, Difference
from bytelm.study.comparison import Comparison, compare
from bytelm.study.drawing import (
    draw_comparison,
    draw_costs,
    draw_differences,
    draw_frontiers,
    draw_units,
)
from bytelm.study.fit import MIN_POINTS_FOR_FLOOR, Curve
from bytelm.study.measuring import DOCUMENTS, FULL_ROWS
from bytelm.study.palette import looks
from bytelm.study.plan import Plan
from bytelm.study.resources import RESIDENT
from bytelm.study.table import budget, read_table

PAGE = "results.md"
FOREST = "differences.svg"
ABOUT_FOREST = (
    "Differences from the baselines of the tables below, with 95% intervals: blue where the "
    "interval is below 0 (ahead), red where it is above (behind)."
)
ABOUT_COSTS = (
    "Seconds depend on what else the machine did; rates are per second of its processors where "
    "those were measured. Peaks of anonymous memory leave out memory-mapped text and entropies; "
    "peaks of resident memory, which earlier versions measured, count the pages of them that were "
    "read. A peak is mixed if some slices of a run measured the one and some the other: it is the "
    "largest of both."
)
UNPAIRED = "\u2020"
"""Mark of differences of runs that have no seed in common."""
AXES = {"training": "training FLOPs", "inference": "training bytes"}


def write_page(plan: Plan, tables: Path, out: Path) -> Path:
    """Write the page of a study and draw its figures.

    Args:
        plan: the plan of the study.
        tables: folder of the two Parquet files.
        out: folder of the page and its figures.

    Raises:
        DataError: the tables are missing, or hold no run of the plan.
        ConfigError: matplotlib is missing.
    """
    results = read_table(tables, plan)
    bootstrap = Bootstrap(results)
    out.mkdir(parents=True, exist_ok=True)
    rows, look = results.rows, looks(plan)
    lines = [f"# {plan.title}", "", *_preamble(plan, bootstrap), ""]
    comparisons = {name: compare(name, plan, bootstrap) for name in plan.comparisons}
    forest = [one for one in comparisons.values() if one.differences and not one.curves]
    if forest:
        draw_differences({one.config.title: one.every_difference for one in forest}, out / FOREST)
        lines += [f"![Differences]({FOREST})", "", ABOUT_FOREST, ""]
    for name, comparison in comparisons.items():
        config = comparison.config
        if not comparison.rows:
            left_out = [f"- {why}" for why in comparison.left_out]
            lines += [f"## {config.title}", "", "Nothing to show yet.", "", *left_out, ""]
            continue
        lines += [f"## {config.title}", ""]
        if comparison.curves:
            draw_comparison(comparison, look, out / f"{name}.svg", AXES[config.kind])
            lines += [f"![{config.title}]({name}.svg)", "", *_summary(comparison), ""]
        lines += [*_words(comparison), *_differences(comparison)]
        if comparison.curves:
            lines += _laws(comparison)
        lines += [*_runs(comparison), ""]
        lines += [*(f"- left out: {why}" for why in comparison.left_out), ""]
    if results.failures:
        lines += ["## Diverged", "", *(f"- {failure}" for failure in results.failures), ""]
    plain = [row for row in rows if row["settings"] == "{}"] or rows
    draw_units(plain, look, out / "units.svg")
    draw_frontiers(plain, look, out / "frontiers.svg")
    draw_costs(plain, look, out / "costs.svg")
    lines += ["## Bytes per patch and quality", "", "![bytes per patch](units.svg)", ""]
    lines += ["## Inference cost, memory and quality", "", "![frontiers](frontiers.svg)", ""]
    lines += ["## Time and memory", "", "![time and memory](costs.svg)", "", ABOUT_COSTS, ""]
    lines += [*_costs(plain), ""]
    lines += ["## By source", "", *_sources(bootstrap), ""]
    write_text(out / PAGE, "\n".join(lines))
    return out / PAGE


def _preamble(plan: Plan, bootstrap: Bootstrap) -> list[str]:
    rows = bootstrap.results.rows
    counts = Counter(_machine(row) for row in rows)
    machines = "; ".join(f"{name} ({count} runs)" for name, count in counts.items())
    sources = Counter(source for row in rows for source in _sources_of(row))
    counted_sources = ", ".join(f"`{name}` ({count} runs)" for name, count in sources.items())
    off = [abs(row["flops"] / row["budget_flops"] - 1) for row in rows if row["budget_flops"]]
    worst = max(off, default=0.0)
    met = f" Each run's FLOPs are within {worst:.2%} of its budget." if off else ""
    counted = "counted in" if plan.include_scorer else "left out of"
    spread = (
        f"Seeds of one configuration differ by {bootstrap.noise.total:.2%} (standard deviation)."
        if bootstrap.noise.total
        else "No configuration has several seeds, so intervals do not include the noise of seeds."
    )
    return [
        f"Plan `{plan.name}`: {len(rows)} runs, {sum(r['flops'] for r in rows):.3g} training FLOPs "
        f"in all.{met} FLOPs include padding. {_attention(rows)} Scoring the training text with "
        f"the entropy model is {counted} a run's FLOPs; the table of time and memory "
        f"lists it in a column of its own, and the training of the entropy model in another. "
        f"Measured on "
        f"{int(bootstrap.results.num_bytes.sum()):,} bytes of {len(bootstrap.results.num_bytes):,} "
        f"held-out documents, none of which is in the training text. {spread}",
        "",
        f"Machines: {machines}.",
        f"Hashes of the source: {counted_sources}; the table of time and memory has each run's.",
        "Brackets are 95% bootstrap intervals over held-out documents and seeds. Differences are "
        "those of runs with the same seed; where there are none, of the means of all seeds, marked "
        f"{UNPAIRED}. Of many intervals, one in twenty excludes 0 by chance.",
    ]


def _attention(rows: Sequence[dict[str, Any]]) -> str:
    """Say how the FLOPs of attention are counted."""
    full = sum(row["attention"] != DOCUMENTS for row in rows)
    if not full:
        return "Attention is counted within the documents of each row."
    as_one = "as if each row were one document, which is more than they compute"
    if full == len(rows):
        return f"Attention is counted {as_one}, as earlier versions did."
    return (
        f"**Budgets differ in what they count:** the attention of {full} runs is counted {as_one}, "
        f"as earlier versions did; that of {len(rows) - full} runs within documents."
    )


def _machine(row: dict[str, Any]) -> str:
    """Describe the machine of a run, or all of them if it moved."""
    machines = [
        f"{one['device']}, {one['threads']} thread(s), torch {one['torch']}, bytelm {one['bytelm']}"
        for one in json.loads(row["machines"])
    ]
    return ", then ".join(dict.fromkeys(machines))


def _sources_of(row: dict[str, Any]) -> list[str]:
    """Return the hashes of the source that trained a run, in order."""
    return list(dict.fromkeys(one["source"] for one in json.loads(row["machines"])))


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
        *("| " + " | ".join(line) + " |" for line in lines),
    ]


def _summary(comparison: Comparison) -> list[str]:
    """Return a table of bits per byte by family and budget, for the best size at each."""
    budgets = sorted({float(b) for curve in comparison.curves for b in curve.budgets})

    def line(curve: Curve) -> list[str]:
        values = zip(curve.budgets, curve.bpb, zip(curve.low, curve.high, strict=True), strict=True)
        cells = {b: _interval(float(bpb), bounds) for b, bpb, bounds in values}
        return [curve.name, *(cells.get(b, "-") for b in budgets)]

    return _table(
        [comparison.budget_name, *(f"{b:.3g}" for b in budgets)], map(line, comparison.curves)
    )


def _words(comparison: Comparison) -> list[str]:
    """Return what the intervals allow to be said of each member and the baseline."""
    if not comparison.differences:
        return []
    every = comparison.every_difference
    heads = [f"Compared with {every[0].baseline}:", ""]
    if not comparison.curves:
        return [*heads, *(f"- {line}" for line in words.groups(every)), ""]
    crossovers = {one.name: one for one in comparison.crossovers}
    lines = []
    for name, differences in comparison.differences.items():
        parts = [f"- {name}: {words.position(differences)}"]
        if name in comparison.slopes:
            parts.append(words.slope(comparison.slopes[name]))
        if (one := crossovers[name]).x is not None:
            at = f"{one.x:.3g} [{one.low:.3g}, {one.high:.3g}]"
            parts.append(f"the laws cross at {at}: {one.verdict}")
        lines.append("; ".join(parts))
    return [*heads, *lines, ""]


def _differences(comparison: Comparison) -> list[str]:
    """Return a table of the differences from the baseline by member and budget."""
    if not comparison.differences:
        return []
    every = comparison.every_difference
    budgets = sorted({one.budget for one in every})

    def line(name: str, differences: Sequence[Difference]) -> list[str]:
        cells = {one.budget: _difference(one) for one in differences}
        return [name, *(cells.get(b, "-") for b in budgets)]

    noise = comparison.bootstrap.noise
    own = f"{noise.own:.2%}" if noise.own_freedom else f"{noise.total:.2%}, taken as independent"
    heads = [comparison.budget_name, *(f"{b:.3g}" for b in budgets)]
    return [
        f"Minus {every[0].baseline}; the noise of seeds in each run of a pair is {own}:",
        "",
        *_table(heads, [line(*item) for item in comparison.differences.items()]),
        "",
    ]


def _runs(comparison: Comparison) -> list[str]:
    bootstrap = comparison.bootstrap
    rows = [bootstrap.results.rows[number] for number in comparison.rows]
    has_settings = any(row["settings"] != "{}" for row in rows)
    lines = []
    for number, row in zip(comparison.rows, rows, strict=True):
        settings = json.loads(row["settings"])
        chosen = ", ".join(f"{k.rpartition('.')[2]} {v}" for k, v in settings.items())
        base = comparison.baseline_rows.get(number)
        lines.append(
            {
                "family": row["label"],
                "size": row["size"],
                **({"settings": chosen} if has_settings else {}),
                "seed": str(row["seed"]),
                "training FLOPs": f"{row['flops']:.3g}",
                "parameters": f"{row['parameters']:,}",
                "embedding parameters": f"{row['table_parameters']:,}",
                "FLOPs/byte": f"{row['inference_flops']:.3g}",
                "bytes/unit": f"{row['unit_bytes']:.2f}" if row["unit_bytes"] else "1",
                "MB read": f"{row['train_bytes'] / 1e6:.2f}",
                "epochs": f"{row['epochs']:.2f}",
                "bits per byte": _interval(bootstrap.bpb[number], bootstrap.interval(number)),
                "minus baseline": _difference(bootstrap.difference([[number]], [base]))
                if base
                else "-",
            }
        )
    return _table(list(lines[0]), [list(line.values()) for line in lines])


def _interval(value: float, bounds: tuple[float, float]) -> str:
    return f"{value:.3f} [{bounds[0]:.3f}, {bounds[1]:.3f}]"


def _difference(one: Difference) -> str:
    mark = "" if one.seeds else UNPAIRED
    return f"{one.value:+.3f} [{one.low:+.3f}, {one.high:+.3f}]{mark}"


def _laws(comparison: Comparison) -> list[str]:
    def line(curve: Curve) -> list[str]:
        if curve.law is None:
            return [curve.name, str(len(curve.x)), "-", "-", "-", "-"]
        low, high = curve.exponent_interval()
        is_line = len(curve.x) < MIN_POINTS_FOR_FLOOR
        slope = comparison.slopes.get(curve.name)
        return [
            curve.name,
            str(len(curve.x)),
            f"{np.exp(curve.law.log_scale):.4g}",
            f"{curve.law.exponent:.4f} [{low:.4f}, {high:.4f}]",
            f"{slope.value:+.4f} [{slope.low:+.4f}, {slope.high:+.4f}]" if slope else "-",
            "0 (too few budgets)" if is_line else f"{curve.law.floor:.3f}",
        ]

    heads = ["family", "budgets", "A", "exponent", "minus baseline's", "floor"]
    laws = _table(heads, map(line, comparison.curves))
    verdicts = [
        f"- {one.name} and {one.baseline}: {one.verdict}"
        for one in comparison.crossovers
        if one.x is None
    ]
    return ["bpb = floor + A x^-exponent:", "", *laws, "", *verdicts, ""]


def _costs(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        {
            "family": row["label"],
            "size": row["size"],
            "training FLOPs": f"{row['flops']:.3g}",
            "+ scoring": f"{row['scorer_flops']:.2g}",
            "+ scorer's training": f"{row['scorer_training_flops']:.2g}",
            "seconds": f"{row['seconds']:.0f}",
            "CPU seconds": f"{row['cpu_seconds']:.0f}" if row["cpu_seconds"] else "-",
            "GFLOP per CPU second": f"{row['flops'] / row['cpu_seconds'] / 1e9:.1f}"
            if row["cpu_seconds"]
            else "-",
            "peak GB": f"{row['peak_bytes'] / 1e9:.2f} {row['memory'] or RESIDENT}",
            "padded bytes": f"{row['padded_bytes']:.1%}",
            "padded units": f"{row['padded_patches']:.1%}",
            "attention in": row["attention"] or FULL_ROWS,
            "slices": str(row["slices"]),
            "source": ", then ".join(_sources_of(row)),
        }
        for row in sorted(rows, key=lambda row: (row["flops"], row["label"]))
    ]
    return _table(list(lines[0]), [list(line.values()) for line in lines])


def _sources(bootstrap: Bootstrap) -> list[str]:
    """Return a table of bits per byte by source, for each family's best run at its top budget."""
    largest: dict[str, int] = {}
    rows = bootstrap.results.rows
    for number, row in enumerate(rows):
        if row["settings"] != "{}":
            continue
        best = largest.get(row["family"])
        key = (budget(row), -bootstrap.bpb[number])
        if best is None or key > (budget(rows[best]), -bootstrap.bpb[best]):
            largest[row["family"]] = number
    if not largest:
        return ["No run without settings of its own is finished."]
    columns = {name: bootstrap.results.by_source(number) for name, number in largest.items()}
    names = sorted(next(iter(columns.values())))
    heads = ["source", *(rows[n]["label"] for n in largest.values())]
    first = ["training FLOPs", *(f"{rows[n]['flops']:.2g}" for n in largest.values())]
    lines = [[name, *(f"{columns[f][name]:.3f}" for f in largest)] for name in names]
    return _table(heads, [first, *lines])
