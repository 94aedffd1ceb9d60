"""``bytelm flops`` and ``bytelm plan``: costs of a model and of a run, from a recipe."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from bytelm.cli.app import app, console
from bytelm.config import NgramRecipe, Node, Recipe, load_recipe
from bytelm.errors import ConfigError


@app.command(context_settings={"allow_interspersed_args": True})
def flops(
    recipe: Annotated[
        str, typer.Argument(help="A shipped recipe (see `bytelm recipes`) or a YAML file.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.path=value, such as model.local.dim=256.")
    ] = None,
    patch_size: Annotated[
        float | None, typer.Option(help="Mean bytes per patch, or token. (default: the recipe's)")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=1, help="Bytes in a row, and before the one generated. (default: the recipe's)"
        ),
    ] = None,
    scorer: Annotated[
        str | None,
        typer.Option(help="Recipe of a scorer to count as well. (default: not counted)"),
    ] = None,
    precision: Annotated[
        Literal["float32", "bfloat16"],
        typer.Option(help="Precision of weights and caches in generation."),
    ] = "float32",
    figure: Annotated[
        Path | None, typer.Option(help="Draw the shares of the parts: SVG, PDF or PNG.")
    ] = None,
) -> None:
    """Show a model's parameters, FLOPs and memory by part, compared with the paper's formula.

    Nothing is built or run. FLOPs are per byte, a multiply-add is 2, and training costs three
    forward passes; a scorer is only run forward, since its entropies are computed once.

    [dim]bytelm flops blt-400m --patch-size 6 --context 8192
    bytelm flops blt-8b --scorer entropy-100m --precision bfloat16 --figure costs.svg
    bytelm flops blt-1m model.global_model.num_layers=8
    bytelm flops byte-1m
    bytelm flops token-1m --patch-size 3.2[/]
    """
    from bytelm.accounting import break_down_recipe
    from bytelm.display import cost_shares, costs_title, show_costs

    resolved = load_recipe(recipe, overrides or ())
    if isinstance(resolved, NgramRecipe):
        contexts = resolved.model.max_order * resolved.model.max_contexts
        console.print(f"an n-gram scorer of at most {contexts:,} contexts: look-ups cost no FLOPs")
        return
    costs = break_down_recipe(
        resolved,
        context=context,
        patch_size=patch_size,
        element_size={"float32": 4, "bfloat16": 2}[precision],
        scorer=None if scorer is None else _scorer_config(scorer),
    )
    name = Path(recipe).stem
    show_costs(console, costs, resolved, name=name, precision=precision)
    if figure is not None:
        from bytelm.figures import draw_shares

        draw_shares(cost_shares(costs), figure, title=costs_title(costs, name))


@app.command(context_settings={"allow_interspersed_args": True})
def plan(
    recipe: Annotated[
        str, typer.Argument(help="A shipped recipe (see `bytelm recipes`) or a YAML file.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.path=value, such as train.micro_rows=2.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")] = 8,
    gpu: Annotated[str, typer.Option(help="Kind of GPU: a100, h100, h200, b200, ...")] = "h100",
    mfu: Annotated[
        float,
        typer.Option(min=0.01, max=1.0, help="Share of the GPUs' peak FLOP/s to expect."),
    ] = 0.3,
    patch_size: Annotated[
        float | None, typer.Option(help="Mean bytes per patch, or token. (default: the recipe's)")
    ] = None,
) -> None:
    """Show what a run on several GPUs needs: memory by part, days, sizes of checkpoints.

    Nothing is built or run. Formulas and their checks are in docs/scaling.md. A recipe that does
    not fit is refused.

    [dim]bytelm plan blt-1b --gpus 8
    bytelm plan blt-8b --gpus 64 --mfu 0.35 train.activation_checkpointing=block[/]
    """
    from bytelm.accounting import GPUS, plan_run
    from bytelm.display import show_plan

    resolved = load_recipe(recipe, overrides or ())
    if isinstance(resolved, NgramRecipe):
        raise ConfigError("an n-gram scorer is counted on the CPU: plan another recipe")
    if gpu.lower() not in GPUS:
        raise ConfigError(f"--gpu {gpu!r} is not one of {', '.join(GPUS)}")
    found = plan_run(resolved, gpus, GPUS[gpu.lower()], mfu, patch_size)
    show_plan(console, found, resolved, name=Path(recipe).stem, gpu=gpu.lower())
    found.check_memory()


def _scorer_config(name: str) -> Node:
    recipe = load_recipe(name)
    if isinstance(recipe, Recipe) and recipe.model.has_patches:
        raise ConfigError(f"{name} is a BLT, not a scorer: name one such as entropy-100m")
    return recipe.model
