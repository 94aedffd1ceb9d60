"""The text of a study: prepared once, scored by each entropy model, tokenized for baselines.

::

    STUDY/text.json           what the rest was made of
    STUDY/text/               documents
    STUDY/scorers/NAME/       entropy models
    STUDY/scored/NAME/        the same documents with entropies
    STUDY/tokenizers/N.json   byte-pair merges

Every part is made whole or not at all; the same plan finds it there. No document that is held out
is also in the training text: preparation holds out every copy.
"""

import shutil
import sysconfig
import time
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from bytelm.checkpoint import locked, read_json, replacing, write_json
from bytelm.config import Recipe, TableRecipe, differences, load_recipe
from bytelm.data import Dataset, PrepareOptions, prepare, train_dataset_tokenizer
from bytelm.data.dataset import MANIFEST, read_manifest
from bytelm.errors import ConfigError, DataError
from bytelm.study.plan import STDLIB, Plan, Run, TextConfig
from bytelm.tracking import preparation_bar
from bytelm.training import fit_table, train

TEXT = "text.json"
SMALL_TEXT = 4_000_000
"""Bytes that are scored before other processes would have started."""
TOKENIZER_BYTES = 16_000_000
"""Training text whose pairs are counted for a tokenizer."""


def prepare_text(
    plan: Plan, runs: Iterable[Run], out: Path, console: Console, deadline: float | None = None
) -> bool:
    """Make everything that some runs of a plan read.

    Args:
        plan: of the study.
        runs: which.
        out: its folder.
        console: where progress is shown.
        deadline: by ``time.time()``; the training of an entropy model ends with a checkpoint then.

    Returns:
        Whether all is there; false where the training of an entropy model ran out of time.

    Raises:
        BytelmError: as ``bytelm data prepare``, ``bytelm train`` and ``bytelm data tokenizer``.
    """
    families = [plan.family(name) for name in sorted({run.family for run in runs})]
    with locked(out):
        _claim(plan, out)
        if not (out / "text" / MANIFEST).exists():
            _prepare(plan.text, out, console)
        held_out = int(Dataset(out / "text", "validation").lengths.sum())
        if held_out <= plan.text.skipped_bytes:
            raise ConfigError(
                f"text.skipped_bytes leaves out {plan.text.skipped_bytes:,} of {held_out:,} "
                "held-out bytes, so the study could measure nothing: lower it, or hold out more"
            )
        for name in sorted({f.scorer for f in families if f.scorer}):
            scorer = plan.scorers[name]
            # What is there was made of this text by this recipe, wherever the inputs are now.
            if (out / "scored" / name / MANIFEST).exists():
                continue
            recipe = load_recipe(
                scorer.recipe, [f"data.path={out / 'text'}", "data.verify=false", *scorer.overrides]
            )
            if isinstance(recipe, TableRecipe):
                with console.status(f"counting for scorer {name}"):
                    fit_table(recipe, scorer_folder(out, name))
            elif not _train_scorer(name, recipe, out, console, deadline):
                return False
            _score(name, out, console)
        for vocab_size in sorted({f.vocab_size for f in families if f.vocab_size}):
            _tokenizer(vocab_size, out, console)
    return True


def text_folder(plan: Plan, family: str, out: Path) -> Path:
    """Where the prepared text of a family lies."""
    scorer = plan.family(family).scorer
    return out / "text" if scorer is None else out / "scored" / scorer


def scorer_folder(out: Path, name: str) -> Path:
    """Where an entropy model lies."""
    return out / "scorers" / name


def tokenizer_path(out: Path, vocab_size: int) -> Path:
    """Where a tokenizer lies."""
    return out / "tokenizers" / f"{vocab_size}.json"


def _claim(plan: Plan, out: Path) -> None:
    """Take a new folder, or check that the text and entropy models there are those of the plan.

    Several plans may share a folder: the entropy models of each are added.
    """
    path = out / TEXT
    text = plan.text.model_dump(mode="json", include={"train", "validation", "validation_share"})
    scorers = {name: scorer.model_dump(mode="json") for name, scorer in plan.scorers.items()}
    found = read_json(path) if path.exists() else {"text": text, "scorers": {}}
    both = found["scorers"].keys() & scorers.keys()
    changed = differences(
        {"text": found["text"], **{name: found["scorers"][name] for name in both}},
        {"text": text, **{name: scorers[name] for name in both}},
    )
    if changed:
        raise ConfigError(
            f"{out} holds another study's text ({'; '.join(changed)}): choose another --out, or "
            "restore the plan"
        )
    everything = {"text": text, "scorers": {**found["scorers"], **scorers}}
    if everything != found or not path.exists():
        with replacing(path) as temporary:
            write_json(temporary, everything)


def _prepare(text: TextConfig, out: Path, console: Console) -> None:
    options = PrepareOptions(
        validation=tuple(_expand(text.validation)),
        validation_share=text.validation_share,
        leave_out=(out,),
    )
    with preparation_bar(console) as report:
        manifest = prepare(_expand(text.train), out / "text", options, report)
    if not manifest.sources("validation"):
        # The folder is to be had for another attempt.
        shutil.rmtree(out / "text")
        (out / TEXT).unlink()
        count = sum(source.documents for source in manifest.sources("train").values())
        raise DataError(
            f"of {count} documents none is held out, so the study could measure nothing: name "
            "files in text.validation, or raise text.validation_share"
        )


def _expand(arguments: Iterable[str]) -> list[str]:
    """Arguments with the sources of the standard library in place of their mark."""
    expanded: list[str] = []
    for one in arguments:
        paths = _stdlib_sources() if STDLIB in one else []
        expanded += [one.replace(STDLIB, str(path)) for path in paths] or [one]
    return expanded


def _stdlib_sources() -> list[Path]:
    library = Path(sysconfig.get_paths()["stdlib"])
    # Installed packages may lie inside the library's folder, and differ between machines.
    return [
        path
        for path in sorted(library.rglob("*.py"))
        if not any(part.endswith("-packages") for part in path.relative_to(library).parts)
    ]


def _train_scorer(
    name: str, recipe: Recipe, out: Path, console: Console, deadline: float | None
) -> bool:
    result = train(
        recipe,
        scorer_folder(out, name),
        console=console,
        title=f"scorer {name}",
        time_limit=None if deadline is None else max(deadline - time.time(), 0.0),
    )
    return result.finished


def _score(name: str, out: Path, console: Console) -> None:
    text = read_manifest(out / "text").sources()
    is_small = sum(source.text_bytes for source in text.values()) < SMALL_TEXT
    options = PrepareOptions(scorer=scorer_folder(out, name), workers=1 if is_small else None)
    with preparation_bar(console) as report:
        prepare([str(out / "text")], out / "scored" / name, options, report)


def _tokenizer(vocab_size: int, out: Path, console: Console) -> None:
    path = tokenizer_path(out, vocab_size)
    if path.exists():
        return
    path.parent.mkdir(exist_ok=True)
    with console.status(f"training a tokenizer of {vocab_size} tokens"):
        dataset = Dataset(out / "text", "train")
        tokenizer = train_dataset_tokenizer(dataset, vocab_size, TOKENIZER_BYTES)
    with replacing(path) as temporary:
        tokenizer.save(temporary)
