"""Plans of studies, written in YAML.

::

    text        training text and held-out text
    scorers     entropy models by name, each from a recipe
    base        the part of a recipe that all runs share
    families    a label, a recipe over the base, and sizes: recipes over that
    runs        families x sizes x budgets x seeds x settings, each entry a grid
    comparisons which runs are compared, and with which baseline

A plan may be ``like`` another, a family like another of its plan, and the recipe of a family or of
a size like a shipped one: see :mod:`bytelm.study.inheritance`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from bytelm.config import Node, nearest
from bytelm.config.kinds import Int
from bytelm.config.model import Positive
from bytelm.config.names import earlier_path, modern_path
from bytelm.config.recipe import Fraction, Seed
from bytelm.errors import ConfigError

Budget = Annotated[float, Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^[\w.-]+$")]
Colour = Literal["blue", "vermilion", "black", "green", "purple", "orange", "sky", "grey"]
Partial = dict[str, Any]
"""Part of a recipe: some of its sections, and some keys of each; ``like: NAME`` puts a shipped
recipe below them."""
STDLIB = "{stdlib}"
"""Placeholder in a plan's texts for the sources of the running Python's standard library."""


class TextConfig(Node):
    """Training text and held-out text of a study."""

    train: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    """Files, folders and globs, as ``bytelm data prepare`` takes them; ``{stdlib}`` stands for the
    sources of the running Python's standard library."""
    validation: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Files, folders and globs that are held out as a whole."""
    validation_share: Fraction | None = None
    """Share of the other documents that is held out, chosen by the hash of their content."""
    evaluated_bytes: Positive = 1_000_000
    """Bytes of held-out text that every run is measured on."""
    skipped_bytes: Annotated[Int, Field(ge=0)] = 0
    """Bytes of held-out text to skip first, for example those that learning rates were tuned on."""


class ScorerPlan(Node):
    """An entropy model."""

    recipe: str = "entropy-ngram"
    """Name of a shipped recipe, or a path."""
    overrides: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """``key.path=value``, as ``bytelm train`` takes them."""


class Family(Node):
    """Models of one kind, at several sizes."""

    label: str
    """Name on pages and in figures."""
    colour: Colour | None = None
    """Colour in figures; null for one that no other family has, as long as there are any. Families
    of one colour differ in their marks."""
    recipe: Partial = Field(default_factory=dict)
    sizes: dict[Name, Partial] = Field(default_factory=dict)
    """Recipes over the family's, by the name of the size."""
    scorer: str | None = None
    """Entropy model whose entropies cut the patches."""
    vocab_size: Annotated[Int, Field(ge=260)] | None = None
    """Size of the tokenizer's vocabulary, for families that read tokens."""
    unit_bytes: Annotated[float, Field(gt=0)] | None = None
    """Bytes per patch or token that a dry run without data assumes."""


class RunsConfig(Node):
    """A grid of runs."""

    families: Annotated[tuple[str, ...] | None, Field(strict=False)] = None
    """Names of families; null for all."""
    sizes: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    flops: Annotated[tuple[Budget, ...], Field(strict=False)] = ()
    """Budgets in training FLOPs, from which the number of steps follows."""
    bytes: Annotated[tuple[Budget, ...], Field(strict=False)] = ()
    """Budgets in bytes of training text instead."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1, strict=False)] = (0,)
    settings: dict[str, list[Any]] = Field(default_factory=dict)
    """Values of single recipe settings, ``key.path: [...]``: one run for each combination."""

    @model_validator(mode="after")
    def _one_kind_of_budget(self) -> "RunsConfig":
        if bool(self.flops) == bool(self.bytes):
            raise ValueError("a grid of runs needs either flops or bytes")
        return self


class ComparisonConfig(Node):
    """Runs that are compared with one another."""

    kind: Literal["training", "inference", "table"]
    """``training``: the best size of each family against training FLOPs. ``inference``: one size
    of each, equal in FLOPs per byte, against training bytes. ``table``: a table without a fit."""
    title: str
    families: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    """Families, or ``family/size``."""
    baseline: str | None = None
    """The member that the others are compared with."""
    tolerance: Annotated[float, Field(gt=0)] = 0.05
    """``inference``: how far FLOPs per byte may differ from the baseline's, as a share of it."""


class Plan(Node):
    """Everything a study compares."""

    name: str
    title: str
    text: TextConfig
    scorers: dict[str, ScorerPlan] = Field(default_factory=dict)
    include_scorer: bool = False
    """Whether a run's FLOPs include scoring the text that it reads. Training the entropy model,
    which many runs share, is never included; tables list it in a column of its own."""
    warmup_share: Fraction = 0.05
    """Length of the linear warm-up as a share of a run's steps."""
    base: Partial = Field(default_factory=dict)
    families: Annotated[dict[Name, Family], Field(min_length=1)]
    runs: Annotated[tuple[RunsConfig, ...], Field(min_length=1, strict=False)]
    comparisons: dict[str, ComparisonConfig] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _families_are_valid(self) -> "Plan":
        labels = [family.label for family in self.families.values()]
        for name, family in self.families.items():
            if labels.count(family.label) > 1:
                raise ValueError(
                    f"families.{name}.label: another family has the label {family.label!r} too"
                )
            if family.scorer is not None:
                _check(family.scorer, self.scorers, f"families.{name}.scorer")
        for number, runs in enumerate(self.runs):
            for name in runs.families or ():
                _check(name, self.families, f"runs.{number}.families")
        return self

    @model_validator(mode="after")
    def _comparisons_are_valid(self) -> "Plan":
        for name, comparison in self.comparisons.items():
            where = f"comparisons.{name}"
            for member in comparison.families:
                family, _, size = member.partition("/")
                _check(family, self.families, f"{where}.families")
                sizes = self.families[family].sizes
                if size:
                    _check(size, sizes, f"{where}.families")
                elif comparison.kind == "inference":
                    raise ValueError(
                        f"{where}.families: {member!r} must name a size too, as "
                        f"{member}/{next(iter(sizes), 'SIZE')}: only models of one size cost the "
                        "same"
                    )
            if comparison.baseline is not None:
                _check(comparison.baseline, comparison.families, f"{where}.baseline")
            elif comparison.kind == "inference":
                raise ValueError(f"{where}.baseline: an inference comparison needs one")
        return self

    def label(self, member: str) -> str:
        """Return the label of a family, or of one of its sizes."""
        name, _, size = member.partition("/")
        alike = [
            other
            for comparison in self.comparisons.values()
            for other in comparison.families
            if other != member and other.partition("/")[0] == name and member in comparison.families
        ]
        return f"{self.families[name].label}, {size}" if alike else self.families[name].label


@dataclass(frozen=True)
class Run:
    """One training run of a study."""

    name: str
    """Unique in the study; its folder has this name."""
    family: str
    size: str
    seed: int
    flops: float | None
    bytes: float | None
    settings: tuple[tuple[str, Any], ...]


def plan_runs(plan: Plan) -> list[Run]:
    """Return all runs, in the order of the plan.

    Raises:
        ConfigError: a family lacks a size, or two runs are the same.
    """
    runs: list[Run] = []
    for grid in plan.runs:
        for family, size in product(grid.families or plan.families, grid.sizes):
            if size not in plan.families[family].sizes:
                known = ", ".join(plan.families[family].sizes) or "none"
                raise ConfigError(f"family {family!r} has no size {size!r}: it has {known}")
            values = [[(key, v) for v in choices] for key, choices in grid.settings.items()]
            budgets: list[tuple[float | None, float | None]] = []
            budgets += [(flops, None) for flops in grid.flops]
            budgets += [(None, num_bytes) for num_bytes in grid.bytes]
            for budget, seed, settings in product(budgets, grid.seeds, product(*values)):
                runs.append(_run(family, size, seed, *budget, settings))
    names = [_name(run, modern_path) for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ConfigError(f"two entries of runs make the same run {twice!r}: remove one")
    return runs


def _run(
    family: str,
    size: str,
    seed: int,
    flops: float | None,
    num_bytes: float | None,
    settings: tuple[tuple[str, Any], ...],
) -> Run:
    run = Run("", family, size, seed, flops, num_bytes, settings)
    return replace(run, name=_name(run, str))


def alternative_names(run: Run) -> list[str]:
    """Return the names of a run with the present and the earlier names of its settings."""
    return [_name(run, modern_path), _name(run, earlier_path)]


def _name(run: Run, rename: Callable[[str], str]) -> str:
    budget = f"{run.flops:.3g}flops" if run.flops is not None else f"{run.bytes:.3g}bytes"
    parts = [run.family, run.size, budget.replace("+", "")]
    parts += [f"{rename(path)}={value}".replace("/", "-") for path, value in run.settings]
    return "_".join([*parts, f"s{run.seed}"])


def _check(name: str, valid: Iterable[str], where: str) -> None:
    valid = list(valid)
    if name not in valid:
        raise ValueError(
            f"{where}: {name!r} is not one of {', '.join(valid)}{nearest(name, valid)}"
        )
