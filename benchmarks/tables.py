"""Tables of a record, in Markdown, from its JSON alone."""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

from benchmarks.settings import SUITES
from benchmarks.summary import Ratio, clocks, median, minimum, pair_ratio

Measurement = dict[str, Any]
Section = dict[str, Any]

CLOCK_NAMES = {"cpu": "CPU time", "wall": "wall time", "device": "time between CUDA events"}


def draw(record: dict[str, Any]) -> str:
    """All tables of a record."""
    parts = [f"# Benchmarks of {record['date']}", _LEGEND]
    sections = record["sections"]
    origins = {_origin(section) for section in sections.values()}
    if len(origins) == 1:
        parts += origins
    for name in sorted(sections, key=lambda name: (SUITES.index(_suite(name)), name)):
        section = sections[name]
        parts += [f"## {name}", _command(section)]
        if len(origins) > 1:
            parts.append(_origin(section))
        parts += _TABLES[_suite(name)](section["results"])
    return "\n\n".join(parts) + "\n"


_LEGEND = (
    "Ours is bytelm; theirs is `BltForCausalLM` of `transformers` with the same weights, uncached, "
    "in the same process, the two taking turns. Times are minimum / median. *theirs/ours* is the "
    "median of the ratios of neighbouring samples, in brackets the smallest and the largest."
)


def _suite(name: str) -> str:
    return name.partition(",")[0]


def _origin(section: Section) -> str:
    """Where the figures of a section come from."""
    run = section["run"]
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    state = " with uncommitted changes" if run["dirty"] else ""
    hardware = run.get("device") or run["processor"]
    return (
        f"Commit {run['commit'][:12]}{state}; {versions}; {hardware}, {run['system']}; "
        f"{run['threads']} thread(s)."
    )


def _command(section: Section) -> str:
    settings = section["run"]["settings"]
    note = section["run"].get("note")
    return (
        f"`{section['run']['command']}`: {settings['repeats']} sample(s) of each, ours in "
        f"{settings['precision']}, theirs in float32; {section['seconds']:.0f} s in all."
        f"{f' {note}' if note else ''}"
    )


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left, numbers to the right."""
    lines = ["| " + " | ".join(heads) + " |"]
    lines.append("|" + "|".join(["---", *["---:"] * (len(heads) - 1)]) + "|")
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def seconds(value: float) -> str:
    """A time, in three significant digits."""
    if value < 1e-3:
        return f"{value * 1e6:.3g} µs"
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def times(samples: Sequence[dict[str, float]], clock: str) -> str:
    """Minimum and median."""
    return f"{seconds(minimum(samples, clock))} / {seconds(median(samples, clock))}"


def ratio(value: Ratio) -> str:
    """A ratio and its spread."""
    return f"**{value.median:.3g}** ({value.lowest:.3g} to {value.highest:.3g})"


def _title(clock: str) -> str:
    name = CLOCK_NAMES[clock]
    return name[0].upper() + name[1:]


def _by_clock(
    measurements: Sequence[Measurement],
    heads: Sequence[str],
    cells: Callable[[Measurement], Sequence[str]],
    others: Sequence[str],
) -> list[str]:
    """For each clock a table of times, ours and others', and of their ratios."""
    parts = []
    for clock in clocks(measurements[0]["samples"]["ours"]):
        columns = [*heads, "ours"]
        columns += [text for other in others for text in (other, f"{other} / ours")]
        rows = []
        for one in measurements:
            samples = one["samples"]
            row = [*cells(one), times(samples["ours"], clock)]
            for other in others:
                if other in samples:
                    pairs = pair_ratio(samples["ours"], samples[other], clock)
                    row += [times(samples[other], clock), ratio(pairs)]
                else:
                    row += ["", ""]
            rows.append(row)
        parts.append(f"{_title(clock)}:\n\n{table(columns, rows)}")
    return parts


def _model(results: Section) -> list[str]:
    measurements = results["measurements"]
    gap = max(results["gaps"].values(), default=None)
    agreed = "" if gap is None else f" Logits of the two differ by at most {gap:.1e}."
    intro = f"{results['parameters'] / 1e6:.1f} million parameters, scorer included.{agreed}"
    parts = _by_clock(
        measurements, ["pass", "bytes"], lambda m: [m["pass"], f"{m['bytes']:,}"], ["theirs"]
    )
    return [intro, *parts, _growth(measurements), _flops(results)]


def _growth(measurements: Sequence[Measurement]) -> str:
    """How much longer a row of twice the length takes."""
    rows = []
    for name in dict.fromkeys(m["pass"] for m in measurements):
        of_pass = [m for m in measurements if m["pass"] == name]
        for short, long in pairwise(of_pass):
            cells = [name, f"{short['bytes']:,} to {long['bytes']:,}"]
            for subject in ("ours", "theirs"):
                both = [m["samples"].get(subject) for m in (short, long)]
                if all(both):
                    clock = clocks(both[0])[0]
                    cells.append(f"{minimum(both[1], clock) / minimum(both[0], clock):.2f}")
                else:
                    cells.append("")
            rows.append(cells)
    heads = ["pass", "bytes", "ours", "theirs"]
    return f"Times as long for twice the bytes, by minimum:\n\n{table(heads, rows)}"


def _flops(results: Section) -> str:
    matmul = results["matmul"]
    clock = clocks(matmul["samples"])[0]
    peak = matmul["flops"] / minimum(matmul["samples"], clock)
    rows = []
    for one in results["measurements"]:
        rate = one["flops"] / minimum(one["samples"]["ours"], clock)
        per_byte = one["flops"] / one["bytes"] / 1e6
        size = one["bytes"] / max(one["patches"], 1)
        cells = [one["pass"], f"{one['bytes']:,}", f"{size:.2f}", f"{per_byte:.1f}"]
        rows.append([*cells, f"{rate / 1e9:.1f}", f"{rate / peak:.0%}"])
    heads = ["pass", "bytes", "bytes / patch", "MFLOPs / byte", "GFLOP/s", "of the matrix product"]
    shape = " x ".join(map(str, matmul["shape"]))
    return (
        f"Ours, in FLOPs by our own count, over {CLOCK_NAMES[clock]}; a matrix product of {shape} "
        f"ran at {peak / 1e9:.1f} GFLOP/s in the same run:\n\n{table(heads, rows)}"
    )


def _cross_attention(results: Section) -> list[str]:
    measurements = results["measurements"]
    others = ["theirs", "theirs, with its mask"]
    return _by_clock(
        measurements, ["layer", "bytes"], lambda m: [m["layer"], f"{m['bytes']:,}"], others
    )


def _generation(results: Section) -> list[str]:
    measurements = results["measurements"]
    parts = []
    for clock in clocks(measurements[0]["samples"]["steps"]):
        rows = [_generation_row(one, clock) for one in measurements]
        heads = ["prompt", "bytes / patch", "ours, prompt", "ours, bytes/s", "theirs, bytes/s"]
        heads.append("theirs / ours, whole")
        parts.append(f"{_title(clock)}:\n\n{table(heads, rows)}")
    their_bytes = max(m["their_bytes"] for m in measurements)
    agreed = all(m["same_bytes"] == m["their_bytes"] for m in measurements)
    return [
        f"{measurements[0]['new_bytes']} bytes by ours and {their_bytes} by theirs, which "
        f"{'are the same ones' if agreed else 'differ: the precision does'}. The rate of ours is "
        "that of the steps after the prompt, at the fastest; the ratio is of seconds per byte, the "
        "prompt counted in.",
        *parts,
    ]


def _generation_row(one: Measurement, clock: str) -> list[str]:
    samples = one["samples"]
    cells = [
        f"{one['prompt_bytes']:,}",
        f"{one['patch_size']:.2f}",
        times(samples["prefill"], clock),
        f"{one['new_bytes'] / minimum(samples['steps'], clock):.1f}",
    ]
    if "theirs" not in samples:
        return [*cells, "", ""]
    whole = [
        {clock: prefill[clock] + steps[clock]}
        for prefill, steps in zip(samples["prefill"], samples["steps"], strict=True)
    ]
    pairs = pair_ratio(whole, samples["theirs"], clock, one["new_bytes"] / one["their_bytes"])
    rate = one["their_bytes"] / minimum(samples["theirs"], clock)
    return [*cells, f"{rate:.2f}", ratio(pairs)]


def _engine(results: Section) -> list[str]:
    sessions, *engines = results["measurements"]
    new_bytes = results["new_bytes"]
    parts = []
    for clock in clocks(sessions["samples"]["steps"]):
        rows = []
        for one in results["measurements"]:
            samples, count = one["samples"], one["requests"]
            made = _made(one, new_bytes)
            rate = made / minimum(samples["steps"], clock)
            name = "sessions, one by one" if one is sessions else f"engine, {count} at once"
            name += f", {one['kind']}" if one.get("kind") else ""
            cells = [name, f"{rate:.1f}", times(samples["prompts"], clock)]
            if one is not sessions:
                scale = made / _made(sessions, new_bytes)
                pairs = pair_ratio(samples["steps"], sessions["samples"]["steps"], clock, scale)
                ours, theirs = (_whole(each["samples"], clock) for each in (one, sessions))
                of_all = one["bytes"] / sessions["bytes"]
                cells += [ratio(pairs), ratio(pair_ratio(ours, theirs, clock, of_all))]
            rows.append(cells + [""] * (5 - len(cells)))
        heads = ["subject", "bytes/s", "prompts", "times the sessions", "prompts included"]
        parts.append(f"{_title(clock)}:\n\n{table(heads, rows)}")
    same = ", ".join("{} of {}".format(*one["same"]) for one in engines)
    intro = (
        f"{new_bytes} bytes after prompts of {results['prompt_bytes']}, of which the sessions have "
        f"{sessions['requests']}, in patches of {results['patch_size']:.2f}. Rates are of the "
        "steps after the prompts, all requests under way, at the fastest; "
        "with the prompts go the bytes made while they were read. Texts equal those of "
        f"the sessions: {same}."
    )
    drafts = [_drafts(one) for one in engines if "stats" in one]
    return [intro, *parts, *drafts, _first_bytes(results["first_bytes"])]


def _made(one: Measurement, new_bytes: int) -> int:
    # Records of earlier versions have subjects without drafts only.
    return one.get("made", one["requests"] * new_bytes)


def _drafts(one: Measurement) -> str:
    stats = one["stats"]
    made, passes = stats["bytes_generated"], stats["passes"]
    each = ", ".join(f"{name.replace('_', ' ')} {n / made:.2f}" for name, n in passes.items())
    return (
        f"Drafts: {stats['num_accepted']} of {stats['num_drafted']} drafted bytes were accepted; "
        f"passes per byte: {each}; {stats['bytes_moved'] / made / 1e6:.1f} MB of weights per byte."
    )


def _whole(samples: dict[str, Any], clock: str) -> list[dict[str, float]]:
    pairs = zip(samples["prompts"], samples["steps"], strict=True)
    return [{clock: prompt[clock] + steps[clock]} for prompt, steps in pairs]


def _first_bytes(measurements: Sequence[Measurement]) -> str:
    clock = clocks(measurements[0]["samples"]["first"])[0]
    rows = []
    for one in measurements:
        samples, long = one["samples"], one["long_bytes"]
        steps = f"{min(one['num_steps'])} to {max(one['num_steps'])}"
        cells = [f"{one['busy']}", f"{long:,}" if long else "", steps]
        cells += [times(samples["step"], clock), times(samples["first"], clock)]
        rows.append([*cells, ratio(pair_ratio(samples["step"], samples["first"], clock))])
    heads = ["busy slots", "prompt being read", "steps", "a step of the others", "first byte"]
    heads.append("in such steps")
    return (
        f"First byte of a prompt of {measurements[0]['prompt_bytes']} bytes, by "
        f"{CLOCK_NAMES[clock]}:\n\n{table(heads, rows)}"
    )


def _memory(results: Section) -> list[str]:
    if results.get("note"):
        return [results["note"]]
    rows = []
    for one in results["measurements"]:
        peaks = one["peak_bytes"]
        cells = [one["pass"], f"{one['bytes']:,}", f"{peaks['ours'] / 2**20:,.0f}"]
        if "theirs" in peaks:
            share = peaks["theirs"] / max(peaks["ours"], 1)
            cells += [f"{peaks['theirs'] / 2**20:,.0f}", f"**{share:.2f}**"]
        rows.append(cells + [""] * (5 - len(cells)))
    heads = ["pass", "bytes", "ours, MiB", "theirs, MiB", "theirs / ours"]
    return [f"Peak beyond the model itself, one pass each:\n\n{table(heads, rows)}"]


def _scorer(results: Section) -> list[str]:
    measurements = results["measurements"]
    clock = clocks(measurements[0]["samples"]["ours"])[0]
    rows = []
    for one in measurements:
        samples, rates = one["samples"], []
        for subject in ("ours", "theirs"):
            if subject in samples:
                rates.append(f"{one['bytes'] / minimum(samples[subject], clock):,.0f}")
        if "theirs" in samples:
            rates.append(ratio(pair_ratio(samples["ours"], samples["theirs"], clock)))
        rows.append([one["scorer"], one["way"], *rates, *[""] * (3 - len(rates))])
    heads = ["scorer", "way", "ours, bytes/s", "theirs, bytes/s", "theirs / ours"]
    return [f"By {CLOCK_NAMES[clock]}, rates at the fastest:\n\n{table(heads, rows)}"]


def _data(results: Section) -> list[str]:
    parts = []
    for clock in ("cpu", "wall"):
        rows = []
        for one in results["measurements"]:
            samples = one["samples"]["ours"]
            rate = one["bytes"] / minimum(samples, clock) / 1e6
            per_row = one.get("rows", 0) / minimum(samples, clock)
            rows.append([one["what"], times(samples, clock), f"{rate:.2f}"])
            rows[-1].append(f"{per_row:,.1f}" if per_row else "")
            training = one["samples"].get("training")
            rows[-1].append(ratio(pair_ratio(samples, training, clock)) if training else "")
        heads = ["what", "ours", "MB/s", "rows/s", "training / loading"]
        parts.append(f"{_title(clock)}:\n\n{table(heads, rows)}")
    # Records of earlier versions have none.
    return [*parts, _workers(results["workers"])] if "workers" in results else parts


def _workers(measurements: Sequence[Measurement]) -> str:
    rows = []
    for one in measurements:
        samples = one["samples"]
        pairs = pair_ratio(samples["two"], samples["one"], "wall")
        cells = [one["scorer"], f"{one['bytes'] / 1e6:g}"]
        rows.append([*cells, *(times(samples[n], "wall") for n in ("one", "two")), ratio(pairs)])
    heads = ["scorer", "MB", "one worker", "two workers", "one / two"]
    title = "Whole preparations by one worker and by two, in turns, by wall time"
    return f"{title}:\n\n{table(heads, rows)}"


_TABLES: dict[str, Callable[[Section], list[str]]] = {
    "model": _model,
    "cross-attention": _cross_attention,
    "generation": _generation,
    "engine": _engine,
    "memory": _memory,
    "scorer": _scorer,
    "data": _data,
}
