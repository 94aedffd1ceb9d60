"""The plan of a run on several GPUs, as tables."""

from rich.console import Console
from rich.table import Table

from bytelm.accounting import RunPlan
from bytelm.config import Recipe
from bytelm.display.tables import si


def show_plan(console: Console, plan: RunPlan, recipe: Recipe, *, name: str, gpu: str) -> None:
    """Show what a run needs: memory by part, time, and the sizes of checkpoints."""
    count = f"{plan.num_gpus:,} x {gpu}"
    console.print(
        f"{name} on {count}: {plan.rows:,} rows of {recipe.data.row_bytes:,} bytes a step"
    )
    console.print("\nmemory of each GPU, GB", style="bold")
    console.print(_memory_table(plan))
    console.print()
    console.print(_summary(plan, recipe))


def _memory_table(plan: RunPlan) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("part", no_wrap=True)
    for column in ("weights, gradients, moments", "activations"):
        table.add_column(column, justify="right")
    for part, memory in plan.parts.items():
        table.add_row(part, _gigabytes(memory.state), _gigabytes(memory.activations))
    table.add_row("gathered weights and gradients", _gigabytes(plan.gathered), "")
    table.add_row(
        "total",
        _gigabytes(plan.gathered + sum(part.state for part in plan.parts.values())),
        _gigabytes(sum(part.activations for part in plan.parts.values())),
        style="bold",
    )
    return table


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:.2f}"


def _summary(plan: RunPlan, recipe: Recipe) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    steps, every = recipe.train.steps, recipe.train.checkpoint_every
    speed = plan.bytes_per_second
    room = f"{plan.memory / 1e9:.1f} GB of {plan.usable / 1e9:.1f} GB that can be used"
    table.add_row("memory", f"{room}, {plan.micro_rows} rows in a forward pass")
    table.add_row("parameters", f"{si(plan.parameters)}")
    table.add_row("training", f"{si(plan.training_flops)}FLOPs per byte")
    table.add_row(
        "speed",
        f"{si(speed)}B/s at an MFU of {plan.mfu:.0%}, {si(plan.step_bytes / speed)}s a step",
    )
    table.add_row("run", f"{steps:,} steps, {si(plan.run_bytes)}B of text, {plan.days:.3g} days")
    table.add_row(
        "checkpoint",
        f"{si(plan.model_file)}B of weights and {si(plan.optimizer_file)}B of moments, every "
        f"{si(every * plan.step_bytes / speed)}s",
    )
    return table
