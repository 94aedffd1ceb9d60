"""``bytelm import`` and ``bytelm export``: convert from and to other projects' formats."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bytelm.cli.app import App, app, console

if TYPE_CHECKING:
    from bytelm.checkpoint import CheckpointConfig

import_app = App(help="Import weights from other projects' formats.", no_args_is_help=True)
export_app = App(help="Export a model to another project's format.", no_args_is_help=True)
app.add_typer(import_app, name="import")
app.add_typer(export_app, name="export")

Out = Annotated[Path, typer.Option(help="Folder to create.")]


@import_app.command("official")
def import_official(
    blt: Annotated[
        str,
        typer.Option(
            help="Folder with config.json and model.safetensors, or params.json and "
            "consolidated.pth; or a Hub repository, OWNER/NAME."
        ),
    ],
    out: Out,
    entropy: Annotated[
        str | None,
        typer.Option(help="The same for the entropy model. (default: entropy_model within --blt)"),
    ] = None,
) -> None:
    """Import a BLT and its entropy model in the format of facebookresearch/blt.

    [dim]bytelm import official --blt facebook/blt-1b --entropy facebook/blt-entropy --out blt-1b[/]
    """
    from bytelm.display import ConsoleProgress
    from bytelm.interop import convert_official

    with ConsoleProgress(console).waiting("importing"):
        config = convert_official(blt, out, entropy)
    _show(config, out)


@import_app.command("hf")
def import_hf(
    source: Annotated[
        str,
        typer.Argument(help="Folder written by save_pretrained, or a Hub repository, OWNER/NAME."),
    ],
    out: Out,
) -> None:
    """Import a BLT in the format of transformers (BltForCausalLM).

    [dim]bytelm import hf itazap/blt-1b-hf --out blt-1b[/]
    """
    from bytelm.display import ConsoleProgress
    from bytelm.interop import convert_hf

    with ConsoleProgress(console).waiting("importing"):
        config = convert_hf(source, out)
    _show(config, out)


@export_app.command("hf")
def export_hf(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a checkpoint or a training run.")],
    out: Out,
    patch_in_forward: Annotated[
        bool,
        typer.Option(
            help="Let transformers find the patches; without, a model with any rule and scorer can "
            "be exported, and patch lengths must be given to each forward pass.",
        ),
    ] = True,
) -> None:
    """Export a BLT and its tokenizer for transformers: BltForCausalLM.from_pretrained(OUT).

    [dim]bytelm export hf runs/blt --out blt-hf[/]
    """
    from bytelm.display import ConsoleProgress
    from bytelm.interop import export_hf
    from bytelm.language_model import load

    with ConsoleProgress(console).waiting("exporting"):
        lm = load(checkpoint, "cpu", "stored")
        export_hf(lm, out, patch_in_forward=patch_in_forward)
    console.print(f"written to {out}: generate with use_cache=False, one document per row")
    if not patch_in_forward:
        console.print(
            "give every forward pass patch_lengths=bytelm.interop.patch_lengths(lm, text): without "
            "them transformers makes every byte a patch",
            soft_wrap=True,
        )


def _show(config: "CheckpointConfig", out: Path) -> None:
    """Print the size of an imported model, and its patching rule."""
    import torch

    from bytelm.lm import build_lm

    with torch.device("meta"):
        model = build_lm(config)
    count = sum(weight.numel() for weight in model.parameters())
    console.print(f"{count:,} parameters in {out}", soft_wrap=True)
    if config.patching is not None:
        options = config.patching.model_dump(exclude={"kind"}, exclude_none=True)
        rule = ", ".join(f"{name} {value}" for name, value in options.items())
        console.print(f"{config.patching.kind} patching: {rule}")
