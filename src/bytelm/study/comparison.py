"""Comparisons: from the table to curves, laws and crossovers."""

from collections import defaultdict
from dataclasses import dataclass

from bytelm.study.fit import Bootstrap, Crossover, Curve, find_crossover
from bytelm.study.plan import ComparisonConfig, Plan
from bytelm.study.table import select


@dataclass(frozen=True)
class Comparison:
    """Runs set beside each other."""

    name: str
    config: ComparisonConfig
    rows: list[int]
    """Of the table: every run that takes part."""
    curves: list[Curve]
    """Of families (or families at a size) with at least one run; none for a plain table."""
    crossovers: list[Crossover]
    left_out: tuple[str, ...]
    """Members left out, and why."""


def compare(name: str, plan: Plan, bootstrap: Bootstrap) -> Comparison:
    """Work out one comparison of a plan from the runs that are finished."""
    config = plan.comparisons[name]
    if config.kind == "table":
        members = set(config.families)
        rows = [
            number
            for number, row in enumerate(bootstrap.results.rows)
            if row["family"] in members or f"{row['family']}/{row['size']}" in members
        ]
        return Comparison(name, config, rows, [], [], ())
    axis = "flops" if config.kind == "training" else "train_bytes"
    chosen: dict[str, list[int]] = {}
    for member in config.families:
        rows = select(bootstrap.results, [member])
        if rows:
            chosen[member] = best_sizes(bootstrap, rows) if config.kind == "training" else rows
    left_out = _unlike(config, bootstrap, chosen) if config.kind == "inference" else {}
    curves = {
        member: bootstrap.curve(_label(plan, member), rows, lambda row: _budget(row, axis))
        for member, rows in chosen.items()
        if member not in left_out
    }
    base = curves.get(config.baseline or "")
    crossovers = [
        find_crossover(curve, base) for curve in curves.values() if base and curve is not base
    ]
    rows = [row for member in curves for row in chosen[member]]
    return Comparison(
        name, config, rows, list(curves.values()), crossovers, tuple(left_out.values())
    )


def best_sizes(bootstrap: Bootstrap, rows: list[int]) -> list[int]:
    """Of each budget, the runs of the size whose mean over seeds is lowest."""
    groups: dict[float, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number in rows:
        row = bootstrap.results.rows[number]
        groups[row["budget_flops"] or row["flops"]][row["size"]].append(number)
    chosen: list[int] = []
    for sizes in groups.values():
        chosen += min(sizes.values(), key=lambda numbers: bootstrap.bpb[numbers].mean())
    return chosen


def _unlike(
    config: ComparisonConfig, bootstrap: Bootstrap, chosen: dict[str, list[int]]
) -> dict[str, str]:
    """Members whose inference FLOPs are not those of the baseline, and by how much."""
    first = config.baseline if config.baseline in chosen else next(iter(chosen), None)
    if first is None:
        return {}
    wanted = bootstrap.results.rows[chosen[first][0]]["inference_flops"]
    found = {}
    for member, rows in chosen.items():
        flops = bootstrap.results.rows[rows[0]]["inference_flops"]
        if abs(flops / wanted - 1) > config.tolerance:
            found[member] = (
                f"{member} costs {flops:.3g} FLOPs per byte at inference, "
                f"{flops / wanted - 1:+.1%} from {first}'s {wanted:.3g}: "
                f"beyond the tolerance of {config.tolerance:.0%}"
            )
    return found


def _budget(row: dict, axis: str) -> float:
    """Where a run stands: seeds of one budget at one place."""
    if axis == "flops":
        return float(row["budget_flops"] or row["flops"])
    # Rows are filled to a slightly different share with every seed.
    return float(f"{row['train_bytes']:.2g}")


def _label(plan: Plan, member: str) -> str:
    return plan.family(member.partition("/")[0]).label
