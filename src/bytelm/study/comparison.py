"""Comparisons of families: curves, power laws and crossovers, made from the table."""

from collections import defaultdict
from dataclasses import dataclass

from bytelm.study.bootstrap import Bootstrap, Difference
from bytelm.study.fit import Crossover, Curve, SlopeDifference, compare_slopes, find_crossover
from bytelm.study.plan import ComparisonConfig, Plan
from bytelm.study.table import budget


@dataclass(frozen=True)
class Comparison:
    """Runs of several families, and the curves fitted to them."""

    name: str
    config: ComparisonConfig
    rows: list[int]
    """Rows of the table in the comparison."""
    bootstrap: Bootstrap
    """Replicates with the noise of seeds of these runs."""
    curves: list[Curve]
    """A curve for each member that has a run; empty for a plain table."""
    baseline: Curve | None
    """The baseline's curve."""
    differences: dict[str, list[Difference]]
    """Differences from the baseline by member, at each budget that both have."""
    slopes: dict[str, SlopeDifference]
    """Differences of the laws' exponents by curve."""
    crossovers: list[Crossover]
    left_out: list[str]
    """Reasons why members are missing."""
    baseline_rows: dict[int, list[int]]
    """Rows of the baseline at the budget of each other row."""
    budget_name: str
    """Unit that budgets were planned in."""

    @property
    def every_difference(self) -> list[Difference]:
        """Return the differences of all members."""
        return [one for some in self.differences.values() for one in some]


def compare(name: str, plan: Plan, bootstrap: Bootstrap) -> Comparison:
    """Make one comparison of a plan from the runs that are finished."""
    config = plan.comparisons[name]
    members = {member: _rows(bootstrap, member, config) for member in config.families}
    left_out = [f"{member}: no run is finished" for member, rows in members.items() if not rows]
    members = {member: rows for member, rows in members.items() if rows}
    if config.kind == "inference":
        unlike = _unlike(config, bootstrap, members)
        left_out += unlike.values()
        members = {member: rows for member, rows in members.items() if member not in unlike}
    rows = [row for rows in members.values() for row in rows]
    bootstrap = bootstrap.among(rows) if rows else bootstrap
    base = members.get(config.baseline or "", [])
    plain = _plain(bootstrap, base)
    base_rows = {row: _same_budget(bootstrap, row, plain) for row in rows if row not in base}
    in_flops = {bootstrap.results.rows[row]["budget_flops"] is not None for row in rows}
    planned = " or ".join({True: "training FLOPs", False: "bytes of rows"}[b] for b in in_flops)
    differences = _differences(plan, config, bootstrap, members)
    curves = {}
    if config.kind != "table":
        axis = "flops" if config.kind == "training" else "train_bytes"
        curves = {
            member: bootstrap.curve(plan.label(member), _by_budget(bootstrap, rows), axis)
            for member, rows in members.items()
        }
    baseline = curves.get(config.baseline or "")
    others = [curve for curve in curves.values() if curve is not baseline]
    return Comparison(
        name=name,
        config=config,
        rows=rows,
        bootstrap=bootstrap,
        curves=list(curves.values()),
        baseline=baseline,
        differences=differences,
        slopes=_slopes(others, baseline) if baseline else {},
        crossovers=[find_crossover(curve, baseline) for curve in others] if baseline else [],
        left_out=left_out,
        baseline_rows=base_rows,
        budget_name=planned,
    )


def _slopes(curves: list[Curve], baseline: Curve) -> dict[str, SlopeDifference]:
    found = {curve.name: compare_slopes(curve, baseline) for curve in curves}
    return {name: slope for name, slope in found.items() if slope is not None}


def _differences(
    plan: Plan, config: ComparisonConfig, bootstrap: Bootstrap, members: dict[str, list[int]]
) -> dict[str, list[Difference]]:
    """Return the differences of each member from the baseline, at each budget that both have."""
    base = config.baseline
    if base not in members:
        return {}
    table = bootstrap.results.rows
    baseline = _by_budget(bootstrap, _plain(bootstrap, members[base]))
    by_budget = {budget(table[sizes[0][0]]): sizes for sizes in baseline}
    found: dict[str, list[Difference]] = defaultdict(list)
    for member, rows in members.items():
        if member == base:
            continue
        for sizes in _by_budget(bootstrap, _plain(bootstrap, rows)):
            if (at := budget(table[sizes[0][0]])) in by_budget:
                names = plan.label(member), plan.label(base)
                one = bootstrap.difference(sizes, by_budget[at], names)
                found[plan.label(member)].append(one)
    return {label: sorted(some, key=lambda one: one.budget) for label, some in found.items()}


def _rows(bootstrap: Bootstrap, member: str, config: ComparisonConfig) -> list[int]:
    """Return the rows of a family or of one of its sizes.

    Runs with settings of their own take part in tables only.
    """
    family, _, size = member.partition("/")
    return [
        number
        for number, row in enumerate(bootstrap.results.rows)
        if row["family"] == family
        and size in ("", row["size"])
        and (config.kind == "table" or row["settings"] == "{}")
    ]


def _plain(bootstrap: Bootstrap, rows: list[int]) -> list[int]:
    """Return the rows that have no settings of their own."""
    return [number for number in rows if bootstrap.results.rows[number]["settings"] == "{}"]


def _by_budget(bootstrap: Bootstrap, rows: list[int]) -> list[list[list[int]]]:
    """Group rows by budget, size and seed."""
    groups: dict[float, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number in rows:
        row = bootstrap.results.rows[number]
        groups[budget(row)][row["size"]].append(number)
    return [list(sizes.values()) for sizes in groups.values()]


def _same_budget(bootstrap: Bootstrap, row: int, base: list[int]) -> list[int]:
    """Return the baseline's rows at the budget of a row, for its best size there."""
    rows = bootstrap.results.rows
    same = [other for other in base if budget(rows[other]) == budget(rows[row])]
    if not same:
        return []
    (sizes,) = _by_budget(bootstrap, same)
    return min(sizes, key=lambda numbers: bootstrap.bpb[numbers].mean())


def _unlike(
    config: ComparisonConfig, bootstrap: Bootstrap, members: dict[str, list[int]]
) -> dict[str, str]:
    """Return the members whose inference FLOPs differ from the baseline's, and by how much."""
    if config.baseline not in members:
        why = f"{{}} cannot be compared: the baseline {config.baseline} has no finished run"
        return {member: why.format(member) for member in members}
    wanted = bootstrap.results.rows[members[config.baseline][0]]["inference_flops"]
    found = {}
    for member, rows in members.items():
        flops = bootstrap.results.rows[rows[0]]["inference_flops"]
        if abs(flops / wanted - 1) > config.tolerance:
            found[member] = (
                f"{member} costs {flops:.3g} FLOPs per byte at inference, "
                f"{flops / wanted - 1:+.1%} from {config.baseline}'s {wanted:.3g}: beyond the "
                f"tolerance of {config.tolerance:.0%}"
            )
    return found
