"""Plans: what a study compares, written in YAML.

::

    text        what is read, and what is held out
    scorers     entropy models by name, each from a recipe
    base        what all recipes share
    families    a label, a recipe over the base, and sizes: recipes over that
    runs        families x sizes x budgets x seeds x settings, each entry a grid
    comparisons which runs are set beside each other, and against which baseline
    like        another plan, whose text, scorers, base and families these go over

A recipe of a run is the shipped one that its size names with ``recipe``, if it does, then the base,
then the family's, then the size's, merged section by section, then the run's own settings. Its
number of steps follows from its budget.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from bytelm.config import (
    CalibratedPatching,
    Node,
    Recipe,
    TransformerConfig,
    load_recipe,
    nearest,
    parse,
    read_mapping,
    recipe_text,
    shipped_names,
    shipped_text,
)
from bytelm.config.nodes import Fraction, Positive, Seed
from bytelm.errors import ConfigError

Budget = Annotated[float, Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^[\w.-]+$")]
Partial = dict[str, Any]
"""Some of a recipe."""
GIVEN = (
    ("train", "steps", "runs"),
    ("train", "seed", "runs"),
    ("data", "path", "text"),
    ("data", "tokenizer", "vocab_size of a family"),
)
"""What no recipe of a plan may say: section, key, and the part of the plan it follows from."""
STDLIB = "{stdlib}"
"""In a plan's texts, the sources of the standard library of the running Python."""


class TextConfig(Node):
    """What is read."""

    train: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    """Files, folders and globs, as ``bytelm data prepare`` takes them; ``{stdlib}`` stands for the
    sources of the running Python's standard library."""
    validation: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Texts held out whole."""
    validation_share: Fraction | None = None
    """Share of the other documents held out, by the hash of what they hold."""
    evaluated_bytes: Positive = 1_000_000
    """Held-out text that every run is measured on."""
    skipped_bytes: Annotated[int, Field(ge=0)] = 0
    """Held-out text to leave out first: what rates were tuned on should not decide."""


class ScorerPlan(Node):
    """An entropy model."""

    recipe: str = "entropy-ngram"
    overrides: Annotated[tuple[str, ...], Field(strict=False)] = ()


class Family(Node):
    """Models of one kind, at several sizes."""

    label: str
    like: str | None = None
    """A family whose recipe and sizes this one's go over."""
    recipe: Partial = Field(default_factory=dict)
    sizes: dict[Name, Partial] = Field(default_factory=dict)
    """By name; a size may hold ``recipe: NAME`` beside sections, for a shipped recipe below all."""
    scorer: str | None = None
    """Entropy model whose entropies cut the patches."""
    vocab_size: Annotated[int, Field(ge=260)] | None = None
    """Of the tokenizer, for families that read tokens."""
    unit_bytes: Annotated[float, Field(gt=0)] | None = None
    """Bytes per patch or token that a dry run without data assumes."""


class RunsConfig(Node):
    """A grid of runs."""

    families: Annotated[tuple[str, ...] | None, Field(strict=False)] = None
    """Names; null for all."""
    sizes: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    flops: Annotated[tuple[Budget, ...], Field(strict=False)] = ()
    """Training FLOPs, counted exactly; the number of steps follows."""
    bytes: Annotated[tuple[Budget, ...], Field(strict=False)] = ()
    """Training text instead, in bytes of rows."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1, strict=False)] = (0,)
    settings: dict[str, list[Any]] = Field(default_factory=dict)
    """Values of single recipe settings, ``key.path: [...]``: one run for each combination."""

    @model_validator(mode="after")
    def _one_kind_of_budget(self) -> "RunsConfig":
        if bool(self.flops) == bool(self.bytes):
            raise ValueError("a grid of runs needs either flops or bytes")
        return self


class ComparisonConfig(Node):
    """Runs set beside each other."""

    kind: Literal["training", "inference", "table"]
    """``training``: each family's best size against training FLOPs. ``inference``: one size of
    each, alike in FLOPs per byte, against training bytes. ``table``: rows, no fit."""
    title: str
    families: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    """Families, or ``family/size``."""
    baseline: str | None = None
    """The member that crossovers are sought with."""
    tolerance: Annotated[float, Field(gt=0)] = 0.05
    """``inference``: how far FLOPs per byte may differ from the baseline's."""


class Plan(Node):
    """A study."""

    name: str
    title: str
    text: TextConfig
    scorers: dict[str, ScorerPlan] = Field(default_factory=dict)
    include_scorer: bool = False
    """Whether scoring the text that a run reads counts towards its FLOPs. What training an entropy
    model took, which many runs share, is given beside in either case."""
    warmup_share: Fraction = 0.05
    """Of a run's steps, the linear warm-up."""
    base: Partial = Field(default_factory=dict)
    families: Annotated[dict[Name, Family], Field(min_length=1)]
    runs: Annotated[tuple[RunsConfig, ...], Field(min_length=1, strict=False)]
    comparisons: dict[str, ComparisonConfig] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _names_exist(self) -> "Plan":
        labels = [family.label for family in self.families.values()]
        for name, family in self.families.items():
            if labels.count(family.label) > 1:
                raise ValueError(f"families.{name}.label: {family.label!r} is another's too")
            if family.like is not None:
                _check(family.like, self.families, f"families.{name}.like")
                if self.families[family.like].like is not None:
                    raise ValueError(f"families.{name}.like: {family.like!r} is itself like others")
            if family.scorer is not None:
                _check(family.scorer, self.scorers, f"families.{name}.scorer")
        for number, runs in enumerate(self.runs):
            for name in runs.families or ():
                _check(name, self.families, f"runs.{number}.families")
        for name, comparison in self.comparisons.items():
            members = comparison.families
            for member in members:
                family, _, size = member.partition("/")
                _check(family, self.families, f"comparisons.{name}.families")
                if size:
                    _check(size, self.sizes(family), f"comparisons.{name}.families")
                if not size and comparison.kind == "inference":
                    raise ValueError(
                        f"comparisons.{name}.families: {member!r} must name a size too, as "
                        f"{member}/{next(iter(self.sizes(family)), 'SIZE')}: only models of one "
                        "size cost the same"
                    )
            if comparison.baseline is not None:
                _check(comparison.baseline, members, f"comparisons.{name}.baseline")
            elif comparison.kind == "inference":
                raise ValueError(f"comparisons.{name}.baseline: an inference comparison needs one")
        return self

    def family(self, name: str) -> Family:
        """A family with what it is like merged in."""
        family = self.families[name]
        if family.like is None:
            return family
        other = self.families[family.like]
        chosen = {
            field: getattr(family if field in family.model_fields_set else other, field)
            for field in ("scorer", "vocab_size", "unit_bytes")
        }
        merged = {
            "recipe": merge(other.recipe, family.recipe),
            "sizes": merge(other.sizes, family.sizes),
        }
        return family.model_copy(update={**chosen, **merged, "like": None})

    def label(self, member: str) -> str:
        """Of a family, or of a family at a size."""
        name, _, size = member.partition("/")
        alike = [
            other
            for comparison in self.comparisons.values()
            for other in comparison.families
            if other != member and other.partition("/")[0] == name and member in comparison.families
        ]
        return f"{self.families[name].label}, {size}" if alike else self.families[name].label

    def sizes(self, family: str) -> dict[str, Partial]:
        """Sizes of a family."""
        return self.family(family).sizes


@dataclass(frozen=True)
class Run:
    """One training run of a study."""

    name: str
    """Unique in the study, and the name of its folder."""
    family: str
    size: str
    seed: int
    flops: float | None
    bytes: float | None
    settings: tuple[tuple[str, Any], ...]


def plan_names() -> list[str]:
    """Names of the shipped plans."""
    return shipped_names("plans")


def load_plan(name: str, overrides: Iterable[str] = ()) -> Plan:
    """A shipped plan, or one on disk, with ``key.path=value`` overrides applied.

    Raises:
        ConfigError: the plan or an override cannot be used, a run's recipe is not valid, or two
            runs are the same.
    """
    where = f"plan {name!r}"
    data = read_mapping(shipped_text("plans", name), where, overrides)
    if "like" in data:
        other = str(data.pop("like"))
        below = read_mapping(shipped_text("plans", other), f"plan {other!r}")
        if "like" in below:
            raise ConfigError(f"{where}: like: {other!r} is itself like another plan")
        data = merge({k: v for k, v in below.items() if k not in ("runs", "comparisons")}, data)
    plan = parse(Plan, data, where)
    for run in plan_runs(plan):
        run_recipe(plan, run)
    for scorer, one in plan.scorers.items():
        try:
            recipe = load_recipe(one.recipe, one.overrides)
        except ConfigError as error:
            raise ConfigError(f"{where}: scorers.{scorer}: {error}") from None
        if isinstance(recipe, Recipe) and not _can_score(recipe):
            raise ConfigError(
                f"{where}: scorers.{scorer}: {one.recipe} is no entropy model, which is a table or "
                "a byte transformer with a window"
            )
    return plan


def _can_score(recipe: Recipe) -> bool:
    model = recipe.model
    if not isinstance(model, TransformerConfig) or recipe.data.tokenizer is not None:
        return False
    return model.window is not None


def plan_runs(plan: Plan) -> list[Run]:
    """All runs, in the order of the plan.

    Raises:
        ConfigError: a family lacks a size, or two runs are the same.
    """
    runs: list[Run] = []
    for grid in plan.runs:
        for family, size in product(grid.families or plan.families, grid.sizes):
            if size not in plan.sizes(family):
                known = ", ".join(plan.sizes(family)) or "none"
                raise ConfigError(f"family {family!r} has no size {size!r}: it has {known}")
            values = [[(key, v) for v in choices] for key, choices in grid.settings.items()]
            budgets: list[tuple[float | None, float | None]] = []
            budgets += [(flops, None) for flops in grid.flops]
            budgets += [(None, num_bytes) for num_bytes in grid.bytes]
            for budget, seed, settings in product(budgets, grid.seeds, product(*values)):
                runs.append(_run(family, size, seed, *budget, settings))
    names = [run.name for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ConfigError(f"two entries of runs make the same run {twice!r}: remove one")
    return runs


def run_recipe(plan: Plan, run: Run) -> Recipe:
    """The recipe of a run, but for its data and its number of steps.

    Raises:
        ConfigError: it is not valid.
    """
    family = plan.family(run.family)
    size = dict(family.sizes[run.size])
    where = f"run {run.name!r} of plan {plan.name!r}"
    data = _shipped(size.pop("recipe", None), where)
    for part in (plan.base, family.recipe, size):
        data = merge(data, part)
    if family.vocab_size is not None:
        data = merge(data, {"model": {"vocab_size": family.vocab_size}})
    for path, value in run.settings:
        nested: Partial = {}
        *parents, last = path.split(".")
        at = nested
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = value
        data = merge(data, nested)
    for section, key, source in GIVEN:
        mine = data.get(section)
        if isinstance(mine, Mapping) and key in mine:
            raise ConfigError(
                f"{where}: {section}.{key} follows from the plan's {source}; remove it"
            )
    # The number of steps is not known before the data is.
    data = merge(data, {"train": {"steps": 1, "seed": run.seed}})
    recipe = parse(Recipe, data, where)
    is_calibrated = isinstance(recipe.patching, CalibratedPatching)
    if is_calibrated and family.scorer is None:
        raise ConfigError(
            f"{where}: {recipe.patching.kind if recipe.patching else ''} patches need entropies; "
            f"add families.{run.family}.scorer, one of {', '.join(plan.scorers) or 'scorers'}"
        )
    return recipe


def _shipped(recipe: object, where: str) -> Partial:
    """The sections of a shipped recipe that go below a plan's; none where none is named.

    Without what belongs to a run of another length on other data.
    """
    if recipe is None:
        return {}
    try:
        data = read_mapping(recipe_text(str(recipe)), f"recipe {recipe!r}")
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    for section, key, _ in (*GIVEN, ("optimizer", "warmup_steps", "")):
        data.get(section, {}).pop(key, None)
    return data


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``over`` laid over it, section by section; one of another kind replaces."""
    if "kind" in base and "kind" in over and base["kind"] != over["kind"]:
        return dict(over)
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = merge(below, value)
        result[key] = value
    return result


def _run(
    family: str,
    size: str,
    seed: int,
    flops: float | None,
    num_bytes: float | None,
    settings: tuple[tuple[str, Any], ...],
) -> Run:
    budget = f"{flops:.3g}flops" if flops is not None else f"{num_bytes:.3g}bytes"
    parts = [family, size, budget.replace("+", "")]
    parts += [f"{path}={value}".replace("/", "-") for path, value in settings]
    return Run("_".join([*parts, f"s{seed}"]), family, size, seed, flops, num_bytes, settings)


def _check(name: str, valid: Iterable[str], where: str) -> None:
    valid = list(valid)
    if name not in valid:
        raise ValueError(f"{where}: {name!r} is none of {', '.join(valid)}{nearest(name, valid)}")
