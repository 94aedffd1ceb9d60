"""Load plans from YAML, and build the recipes of their runs.

The recipe of a run is the plan's base, with its family's recipe, its size and its settings laid
over it in this order. Where one of them says ``like: NAME``, that shipped recipe lies below all of
them. The number of steps follows from the run's budget.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from bytelm.config import (
    CalibratedPatching,
    Recipe,
    load_recipe,
    nearest,
    parse,
    read_mapping,
    recipe_text,
    shipped_names,
    shipped_text,
)
from bytelm.config.names import modern_path
from bytelm.errors import ConfigError
from bytelm.study.inheritance import LIKE, inherit, merge
from bytelm.study.plan import Partial, Plan, Run, plan_runs

GIVEN = (
    ("train", "steps", "runs"),
    ("train", "seed", "runs"),
    ("data", "path", "text"),
    ("data", "tokenizer", "vocab_size of a family"),
)
"""Settings that no recipe of a plan may hold: section, key, and the part of the plan that sets
them."""
NOT_INHERITED = (*((section, key) for section, key, _ in GIVEN), ("optimizer", "warmup_steps"))
"""Settings of a shipped recipe that belong to a run of another length on other data."""


def plan_names() -> list[str]:
    """Return the names of the shipped plans."""
    return shipped_names("plans")


def load_plan(name: str, overrides: Iterable[str] = ()) -> Plan:
    """Read a shipped plan, or one on disk, with ``key.path=value`` overrides applied.

    Raises:
        ConfigError: the plan or an override cannot be used, a run's recipe is not valid, or two
            runs are the same.
    """
    where = f"plan {name!r}"

    def read(other: str, overrides: Iterable[str] = ()) -> dict[str, Any]:
        return read_mapping(shipped_text("plans", other), f"plan {other!r}", overrides)

    plan = parse_plan(inherit(read(name, overrides), read, where, (name,)), where)
    for run in plan_runs(plan):
        run_recipe(plan, run)
    for scorer, one in plan.scorers.items():
        try:
            recipe = load_recipe(one.recipe, one.overrides)
        except ConfigError as error:
            raise ConfigError(f"{where}: scorers.{scorer}: {error}") from None
        if isinstance(recipe, Recipe) and not recipe.model.can_score:
            raise ConfigError(
                f"{where}: scorers.{scorer}: {one.recipe} is not an entropy model: use an n-gram "
                "scorer, or a byte transformer with a window"
            )
    return plan


def parse_plan(data: Mapping[str, Any], where: str) -> Plan:
    """Build a plan from plain data, whose families may be like one another.

    A scorer, family or comparison that is null is left out, so that a plan can drop what it
    inherits.

    Raises:
        ConfigError: the data is not a plan.
    """
    data = dict(data)
    for section in ("scorers", "families", "comparisons"):
        if isinstance(found := data.get(section), Mapping):
            data[section] = {name: one for name, one in found.items() if one is not None}
    if isinstance(families := data.get("families"), Mapping):
        data["families"] = {name: _family(name, families, where) for name in families}
    return parse(Plan, data, where)


def run_recipe(plan: Plan, run: Run) -> Recipe:
    """Return the recipe of a run, without its data and its number of steps.

    Raises:
        ConfigError: it is not valid.
    """
    family = plan.families[run.family]
    where = f"run {run.name!r} of plan {plan.name!r}"
    size = dict(family.sizes[run.size])
    if isinstance(size.get("recipe"), str):  # the earlier name of the key
        size = {LIKE: size.pop("recipe"), **size}
    data = merge(merge(plan.base, family.recipe), size)
    if family.vocab_size is not None:
        data = merge(data, {"model": {"vocab_size": family.vocab_size}})
    for path, value in run.settings:
        for key in reversed(modern_path(path, data).split(".")):
            value = {key: value}
        data = merge(data, value)
    for section, key, source in GIVEN:
        mine = data.get(section)
        if isinstance(mine, Mapping) and key in mine:
            raise ConfigError(
                f"{where}: {section}.{key} follows from the plan's {source}; remove it"
            )
    data = inherit(data, lambda name: _shipped(name, where), where)
    # The number of steps depends on the data, which need not be there yet.
    data = merge(data, {"train": {"steps": 1, "seed": run.seed}})
    recipe = parse(Recipe, data, where)
    if isinstance(recipe.patching, CalibratedPatching) and family.scorer is None:
        raise ConfigError(
            f"{where}: {recipe.patching.kind} patches need entropies; add "
            f"families.{run.family}.scorer, one of {', '.join(plan.scorers) or 'scorers'}"
        )
    return recipe


def _family(name: str, families: Mapping[str, Any], where: str) -> Any:
    """Return a family with everything it inherits from others of the plan."""
    here = f"{where}: families.{name}"

    def sibling(other: str) -> Mapping[str, Any]:
        if not isinstance(families.get(other), Mapping):
            raise ConfigError(
                f"{here}.{LIKE}: {other!r} is not one of {', '.join(families)}"
                f"{nearest(other, families)}"
            )
        return families[other]

    family = families[name]
    return inherit(family, sibling, here, (name,)) if isinstance(family, Mapping) else family


def _shipped(name: str, where: str) -> Partial:
    """Read the sections of a recipe that runs of a plan may inherit."""
    try:
        data = read_mapping(recipe_text(name), f"recipe {name!r}")
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    for section, key in NOT_INHERITED:
        if isinstance(mine := data.get(section), dict):
            mine.pop(key, None)
    return data


def with_steps(plan: Plan, recipe: Recipe, steps: int) -> Recipe:
    """Return a recipe with its number of steps, and with what follows from it.

    That is the warm-up, and how often the run reports, validates and saves; a setting that the
    plan makes itself stays.
    """
    often = max(steps // 8, 1)
    usual = {
        "log_every": max(steps // 200, 1),
        "validate_every": often,
        "checkpoint_every": often,
        "keep_checkpoints": 1,
    }
    settings = {k: v for k, v in usual.items() if k not in recipe.train.model_fields_set}
    train_config = recipe.train.model_copy(update={"steps": steps, **settings})
    optimizer = recipe.optimizer
    if "warmup_steps" not in optimizer.model_fields_set:
        warmup = {"warmup_steps": round(plan.warmup_share * steps)}
        optimizer = optimizer.model_copy(update=warmup)
    return recipe.model_copy(update={"train": train_config, "optimizer": optimizer})
