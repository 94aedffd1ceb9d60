"""Console tables of data, likelihood and costs, and coloured patches."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bytelm.accounting import SCORER, TRAINING_BYTES, Breakdown, PartCost
from bytelm.config import CalibratedPatching, Recipe
from bytelm.data import Manifest
from bytelm.data.dataset import Calibration, SourceStatistics
from bytelm.data.statistics import BIN, NUM_BINS, estimate_patch_size
from bytelm.language_model import PatchedText
from bytelm.likelihood import Likelihood, total
from bytelm.quickstart import HEADINGS, REPORT, Quickstart, table_rows
from bytelm.study import Cost, Plan
from bytelm.terminal import Terminal, escape_controls, escape_line

PATCH_STYLES = ("black on sky_blue2", "black on light_goldenrod2")
FEW_BYTES = 10_000
"""Held-out bytes below which a warning is due: a single unusual document decides the result."""
COSTS_WIDTH = 170
"""Width, in characters, of the table of a study's costs."""
BARS = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
"""Bars of a histogram, of rising height."""
PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def show_data(console: Console, folder: Path, manifest: Manifest) -> None:
    """Show the contents of prepared data, by source.

    Bytes per patch and the longest patch are those of a sample of each source, unless the reports
    of the calibration are about all of it.
    """
    table = Table(title=f"{folder}", title_justify="left", box=None, pad_edge=False)
    for name in ("source", "documents", "bytes", "held out"):
        table.add_column(name, justify="left" if name == "source" else "right")
    sources = manifest.sources()
    is_masked = any(one.trained_bytes is not None for one in sources.values())
    if is_masked:
        table.add_column("trained on", justify="right")
    calibration = manifest.calibration
    if calibration:
        known = calibration.sources
        counted = all(
            n in known and known[n].sampled_bytes >= sources[n].text_bytes for n in sources
        )
        table.add_column("bytes/patch" if counted else "bytes/patch (sample)", justify="right")
        table.add_column("longest", justify="right")
    held_out = manifest.sources("validation")
    for name, one in sources.items():
        row = [escape_line(name), f"{one.documents:,}", f"{one.text_bytes:,}"]
        row.append(f"{held_out[name].text_bytes:,}" if name in held_out else "0")
        if is_masked:
            trained = one.text_bytes if one.trained_bytes is None else one.trained_bytes
            row.append(f"{trained:,}")
        if calibration and name in calibration.sources:
            report = calibration.sources[name]
            row += [f"{report.patch_size:.2f}", f"{report.longest:,}"]
        table.add_row(*row)
    console.print(table)
    left_out = [
        f"{name.replace('_', ' ')}: {count:,}"
        for name, count in manifest.left_out.model_dump().items()
        if count
    ]
    if left_out:
        console.print(f"left out: {', '.join(left_out)}")
    if not held_out:
        console.print(
            "nothing is held out, so training will not be validated: `bytelm data prepare` holds "
            "out inputs (`--validation INPUT`) or a share (`--validation-share 0.1`)",
            style="yellow",
            soft_wrap=True,
        )
    num_bytes = sum(
        one.text_bytes if one.trained_bytes is None else one.trained_bytes
        for one in held_out.values()
    )
    if held_out and num_bytes < FEW_BYTES:
        console.print(
            f"only {num_bytes:,} bytes are held out, so bits per byte will be noisy: `bytelm data "
            "prepare` holds out more with a larger `--validation-share`, or inputs of your choice "
            "with `--validation INPUT`",
            style="yellow",
            soft_wrap=True,
        )
    if manifest.scorer:
        reset = ", context reset at newlines" if manifest.scorer.reset_at_newline else ""
        console.print(f"entropies by scorer {manifest.scorer.fingerprint}{reset}")
    if calibration:
        rule = _rule_text(calibration.rule)
        console.print(f"patches of {calibration.patch_size:.3f} bytes: {rule}", soft_wrap=True)


def show_statistics(
    console: Console,
    statistics: Mapping[str, SourceStatistics],
    calibration: Calibration | None = None,
) -> None:
    """Show the copies that were left out, and the entropies, of each source, if there are any.

    With the threshold of a calibrated entropy rule, also the bytes per patch that the histogram of
    all entropies lets expect (:func:`bytelm.data.statistics.estimate_patch_size`).
    """
    threshold = _histogram_threshold(calibration)
    table = Table(title_justify="left", box=None, pad_edge=False)
    table.add_column("source")
    has_copies = any(one.duplicate_documents for one in statistics.values())
    has_entropies = any(one.histogram for one in statistics.values())
    if has_copies:
        table.add_column("copies left out", justify="right")
        table.add_column("their bytes", justify="right")
    if has_entropies:
        table.add_column("mean entropy", justify="right")
        if threshold is not None:
            table.add_column("bytes/patch (estimate)", justify="right")
        table.add_column(f"histogram, 0 to {NUM_BINS * BIN:.1f} nats")
    for name, one in statistics.items():
        row = [escape_line(name)]
        if has_copies:
            row += [f"{one.duplicate_documents:,}", f"{one.duplicate_bytes:,}"]
        if has_entropies and one.histogram:
            row.append(f"{one.mean_entropy:.3f}")
            if threshold is not None:
                row.append(f"{estimate_patch_size(one, threshold):.2f}")
            row.append(_bars(one.histogram))
        table.add_row(*row)
    if has_copies or has_entropies:
        console.print(table)


def _histogram_threshold(calibration: Calibration | None) -> float | None:
    """Return the threshold of a rule whose patches a histogram of entropies tells, or ``None``."""
    rule = calibration.rule if calibration else {}
    threshold = rule.get("threshold")
    is_told = rule.get("kind") == "entropy" and rule.get("max_length") is None
    return threshold if is_told and isinstance(threshold, float) else None


def _bars(counts: Sequence[int]) -> str:
    """Return a character for each two counts, whose height is their sum."""
    sums = [sum(counts[i : i + 2]) for i in range(0, len(counts), 2)]
    top = max(sums) or 1
    # What is there at all is seen.
    return "".join(BARS[math.ceil(one / top * (len(BARS) - 1))] for one in sums)


def show_likelihood(
    console: Console, by_source: Mapping[str, Likelihood], units: str = "patches"
) -> None:
    """Show the bits per byte by source, and of all sources together.

    Args:
        console: the console.
        by_source: the likelihoods.
        units: name of the units whose mean size is shown.
    """
    rows = sorted(by_source.items())
    everything = total(by_source.values())
    table = Table(box=None, pad_edge=False)
    table.add_column("source")
    size_name = "bytes/token" if units == "tokens" else "bytes/patch"
    for name in ("bytes", "bits per byte", size_name):
        table.add_column(name, justify="right")
    if len(rows) > 1:
        rows.append(("all", everything))
    for name, one in rows:
        size = f"{one.unit_bytes:.2f}" if one.num_units else "-"
        bpb = f"{one.bits_per_byte:.4f}" if one.num_bytes else "-"
        table.add_row(escape_line(name), f"{one.num_bytes:,}", bpb, size)
    console.print(table)


def show_patches(console: Console, patched: PatchedText) -> None:
    r"""Show a text with patches in alternating colours, or divided by bars without colours.

    Control characters and bytes that are not UTF-8 are escaped (``\x1b``); between bars, a bar of
    the text is ``\|`` and a backslash ``\\``.
    """
    shown = Text()
    is_plain = not console.is_terminal or console.no_color
    for number, patch in enumerate(patched.patches):
        content = patch.decode("utf-8", "surrogateescape")
        if is_plain:
            # Where bars divide patches, those in the text must be told from them.
            content = ("|" if number else "") + re.sub(r"([|\\])", r"\\\1", content)
        shown.append(escape_controls(content), PATCH_STYLES[number % 2])
    console.print(shown, soft_wrap=True)
    console.print(
        f"{len(patched.data):,} bytes, {len(patched.boundaries):,} patches, "
        f"{patched.patch_size:.2f} bytes each ({_rule_text(patched.rule.model_dump())})",
        style="dim",
        soft_wrap=True,
    )


def _rule_text(rule: Mapping[str, object]) -> str:
    """Return a rule as text, such as ``entropy, threshold 1.613``."""
    options = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in rule.items()
        if value is not None and name not in ("kind", "patch_size")
    ]
    return ", ".join([str(rule["kind"]), *options])


def patches_record(patched: PatchedText) -> dict[str, Any]:
    """Return the patches of a text as plain data."""
    return {
        "rule": patched.rule.model_dump(mode="json", exclude_none=True),
        "boundaries": patched.boundaries,
        "patches": [p.decode("utf-8", "backslashreplace") for p in patched.patches],
        "entropies": None if patched.entropies is None else patched.entropies.tolist(),
    }


def show_quickstart(console: Console, found: Quickstart) -> None:
    """Show the results of a quickstart, and commands to try next."""
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for name in HEADINGS:
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    for row in table_rows(found.rows):
        table.add_row(*row)
    console.print()
    console.print(table)
    measured = f"measured on {found.evaluated_bytes:,} bytes of held-out text"
    console.print(f"{found.rows[0].flops or 0:.2e} training FLOPs each, {measured}", style="dim")
    if found.caution:
        caution = Text(f"\n{found.caution}", style="yellow")
        console.print(caution, soft_wrap=True)
    console.print()
    shown = (found.prompt + found.sample).decode("utf-8", "replace")
    console.print(shown, highlight=False, markup=False, style="dim")
    blt = found.out / "blt"
    console.print(
        f"\n{found.seconds / 60:.1f} minutes. {found.out / REPORT} has the figures. Next:\n"
        f"  bytelm patch {blt} 'def main():'\n"
        f"  bytelm generate {blt} 'def '\n"
        f"  bytelm eval {blt} FILE",
        highlight=False,
    )


def show_study_costs(
    console: Console, plan: Plan, costs: Sequence[Cost], done: list[float]
) -> None:
    """Show the costs of a study's runs, and the share of each that is done."""
    table = Table(title=plan.title, title_justify="left", box=None, pad_edge=False)
    table.add_column("run")
    for name in ("parameters", "embeddings", "inference", "steps", "read", "epochs"):
        table.add_column(name, justify="right")
    for name in ("FLOPs", "off by", "scorer", "time", "disk", "done"):
        table.add_column(name, justify="right")
    for cost, share in zip(costs, done, strict=True):
        table.add_row(
            cost.name,
            *(si(x) for x in (cost.parameters, cost.embedding_parameters, cost.inference_flops)),
            f"{cost.steps:,}",
            f"{si(cost.train_bytes)}B",
            "-" if cost.epochs is None else f"{cost.epochs:.2f}",
            f"{cost.flops:.3g}",
            "-" if cost.deviation is None else f"{cost.deviation:+.2%}",
            si(cost.scorer_flops),
            _duration(cost.seconds),
            f"{si(cost.disk_bytes)}B",
            f"{share:.0%}",
        )
    # On a narrow terminal, wrap lines rather than cut numbers off.
    wide = Terminal(file=console.file, width=max(console.width, COSTS_WIDTH))
    wide.print(table)
    left = [1 - share for share in done]
    flops = sum(cost.flops * share for cost, share in zip(costs, left, strict=True))
    time = sum(cost.seconds * share for cost, share in zip(costs, left, strict=True))
    disk = sum(cost.disk_bytes for cost in costs)
    console.print(
        "parameters: without embeddings; inference: FLOPs per byte; off by: deviation from the "
        "budget",
        style="dim",
    )
    console.print(
        f"{len(costs)} runs, {done.count(1.0)} done; left: {flops:.3g} FLOPs, "
        f"{_duration(time)} on one worker; {si(disk)}B on disk for all"
    )


def _duration(seconds: float) -> str:
    if seconds < 5400:
        return f"{seconds / 60:,.1f} min"
    return f"{seconds / 3600:,.1f} h" if seconds < 172_800 else f"{seconds / 86400:,.0f} days"


def show_costs(
    console: Console, costs: Breakdown, recipe: Recipe, *, name: str, precision: str
) -> None:
    """Show the costs of a model by part, in forward passes and generation, and their totals."""
    console.print(f"{costs_title(costs, name)}\n")
    console.print("forward, FLOPs per byte", style="bold")
    console.print(_forward_table(costs))
    console.print(f"\ngenerating byte {costs.num_bytes:,}, in {precision}", style="bold")
    console.print(_generation_table(costs))
    console.print()
    console.print(_summary(costs, recipe))


def costs_title(costs: Breakdown, name: str) -> str:
    """Return the title: the recipe and its row size."""
    title = f"{name}: rows of {costs.num_bytes:,} bytes"
    if not costs.num_patches:
        return title
    size = costs.num_bytes / costs.num_patches
    return f"{title}, {costs.num_patches:,} {costs.unit} of {size:.3g} bytes"


def _forward_table(costs: Breakdown) -> Table:
    table = _part_table("parameters", "linear", "attention", "both", "share", "published")
    everything = costs.everything.forward
    for name, one in _rows_with_totals(costs):
        formula = costs.published.get(name)
        if name == "total":
            formula = sum(costs.published.values())
        table.add_row(
            name,
            *(si(x) for x in (one.parameters, one.linear, one.attention, one.forward)),
            f"{one.forward / everything:.0%}",
            "-" if formula is None else si(formula),
            style="bold" if name.startswith("total") else None,
        )
    return table


def _generation_table(costs: Breakdown) -> Table:
    table = _part_table("FLOPs", "weights read", "cache read", "cache kept")
    for name, one in _rows_with_totals(costs):
        memory = (one.decode.weights_read, one.decode.cache_read, one.cache)
        table.add_row(
            name,
            si(one.decode.flops),
            *(f"{si(x)}B" for x in memory),
            style="bold" if name.startswith("total") else None,
        )
    return table


def _part_table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("part", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _rows_with_totals(costs: Breakdown) -> list[tuple[str, PartCost]]:
    """Return the parts and their total, then the scorer, if counted, and the total with it."""
    rows = [(name, one) for name, one in costs.parts.items() if name != SCORER]
    rows.append(("total", costs.model))
    if SCORER in costs.parts:
        rows += [(SCORER, costs.parts[SCORER]), ("total with scorer", costs.everything)]
    return rows


def _summary(costs: Breakdown, recipe: Recipe) -> Table:
    """Return a table of the total costs of training, prefill and decoding."""
    every, data = costs.everything, recipe.data
    num_bytes = recipe.train.steps * data.rows_per_step * data.row_bytes
    state = TRAINING_BYTES * costs.model.parameters
    read = every.decode.weights_read + every.decode.cache_read
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row(
        "training",
        f"{si(every.training)} FLOPs per byte; {every.training * num_bytes:.3g} for the "
        f"{si(num_bytes)} bytes of {recipe.train.steps:,} steps",
    )
    table.add_row("", f"{si(state)}B of parameters, gradients and AdamW's moments in fp32")
    table.add_row(
        "prefill",
        f"{si(every.forward)} FLOPs per byte; {si(every.forward * costs.num_bytes)} for "
        f"{costs.num_bytes:,} bytes",
    )
    table.add_row(
        "decode",
        f"{si(every.decode.flops)} FLOPs and {si(read)}B of memory read per byte; "
        f"{si(every.cache)}B of caches",
    )
    if SCORER in costs.parts:
        table.add_row(SCORER, "counted in these; forward only in training")
    elif isinstance(recipe.patching, CalibratedPatching):
        table.add_row(SCORER, "not counted: --scorer entropy-100m adds the paper's")
    return table


def cost_shares(costs: Breakdown) -> dict[str, dict[str, float]]:
    """Return every cost by part, under a label with the total, as a figure shows them."""
    quantities = {
        "parameters": lambda one: one.parameters,
        "training, FLOPs/byte": lambda one: one.training,
        "prefill, FLOPs/byte": lambda one: one.forward,
        "decode, FLOPs/byte": lambda one: one.decode.flops,
        "decode, bytes read": lambda one: one.decode.weights_read + one.decode.cache_read,
        "caches, bytes kept": lambda one: one.cache,
    }
    return {
        f"{label}\n{si(quantity(costs.everything))}": {
            name: float(quantity(one)) for name, one in costs.parts.items()
        }
        for label, quantity in quantities.items()
    }


def si(value: float | int) -> str:
    """Return a number with three digits and an SI prefix, such as ``1.23 G``, without a unit."""
    rounded = float(f"{value:.3g}")
    power = min(int(math.log10(rounded)) // 3, len(PREFIXES) - 1) if rounded >= 1 else 0
    return f"{rounded / 1000**power:.3g} {PREFIXES[power]}"
