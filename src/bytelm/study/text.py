"""Prepare the text of a study, its entropies and its tokenizers.

::

    STUDY/text.json           inputs and settings that the rest was made from
    STUDY/text/               documents
    STUDY/scorers/NAME/       entropy models
    STUDY/scored/NAME/        the same documents, with entropies
    STUDY/tokenizers/N.json   byte-pair merges

Each part is made whole or not at all, and is used again when the command is repeated. No held-out
document is also in the training text, since preparation holds out every copy.
"""

import shutil
import sysconfig
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bytelm.checkpoint import read_config
from bytelm.config import Recipe, differences, load_recipe
from bytelm.data import Dataset, PrepareOptions, prepare, train_dataset_tokenizer
from bytelm.data.dataset import MANIFEST, read_manifest
from bytelm.errors import ConfigError, DataError
from bytelm.progress import Progress
from bytelm.storage import locked, read_json, write_json
from bytelm.study.plan import STDLIB, Plan, Run, TextConfig
from bytelm.training import fit_ngrams, train

TEXT = "text.json"
SMALL_TEXT = 4_000_000
"""Bytes of text up to which scoring in this process is faster than starting others."""
TOKENIZER_BYTES = 16_000_000
"""Bytes of training text whose pairs are counted for a tokenizer."""


def prepare_text(
    plan: Plan,
    runs: Iterable[Run],
    out: Path,
    progress: Progress,
    deadline: float | None = None,
) -> bool:
    """Prepare the text, entropy models and tokenizers that some runs of a plan need.

    Args:
        plan: the plan of the study.
        runs: the runs.
        out: folder of the study.
        progress: receives the progress.
        deadline: time, as ``time.time()`` gives it, at which the training of an entropy model stops
            with a checkpoint.

    Returns:
        Whether everything is ready; false if the training of an entropy model ran out of time.

    Raises:
        BytelmError: as ``bytelm data prepare``, ``bytelm train`` and ``bytelm data tokenizer``.
    """
    families = [plan.families[name] for name in sorted({run.family for run in runs})]
    with locked(out):
        _claim(plan, out)
        if not (out / "text" / MANIFEST).exists():
            _prepare(plan.text, out, progress)
        held_out = int(Dataset(out / "text", "validation").lengths.sum())
        if held_out <= plan.text.skipped_bytes:
            raise ConfigError(
                f"text.skipped_bytes leaves out {plan.text.skipped_bytes:,} of {held_out:,} "
                "held-out bytes, so the study could measure nothing: lower it, or hold out more"
            )
        for name in sorted({f.scorer for f in families if f.scorer}):
            scorer = plan.scorers[name]
            # _claim has compared text and recipe; the inputs may have moved since.
            if (out / "scored" / name / MANIFEST).exists():
                continue
            recipe = load_recipe(
                scorer.recipe, [f"data.path={out / 'text'}", "data.verify=false", *scorer.overrides]
            )
            if isinstance(recipe, Recipe):
                if not _train_scorer(name, recipe, out, progress, deadline):
                    return False
            else:
                with progress.waiting(f"counting for scorer {name}"):
                    fit_ngrams(recipe, scorer_folder(out, name))
            _score(name, out, progress)
        for vocab_size in sorted({f.vocab_size for f in families if f.vocab_size}):
            _tokenizer(vocab_size, out, progress)
    return True


def text_folder(plan: Plan, family: str, out: Path) -> Path:
    """Return the folder of the prepared text of a family."""
    scorer = plan.families[family].scorer
    return out / "text" if scorer is None else out / "scored" / scorer


def scorer_folder(out: Path, name: str) -> Path:
    """Return the folder of an entropy model."""
    return out / "scorers" / name


def scorer_training_flops(out: Path, name: str) -> float:
    """Return the FLOPs that training an entropy model took; 0 for n-grams."""
    folders = sorted((scorer_folder(out, name) / "checkpoints").glob("step-*"))
    if not folders:
        return 0.0
    training = read_config(folders[-1]).training or {}
    return float(training.get("flops", 0.0))


def tokenizer_path(out: Path, vocab_size: int) -> Path:
    """Return the file of a tokenizer."""
    return out / "tokenizers" / f"{vocab_size}.json"


def check_text(plan: Plan, out: Path) -> None:
    """Check that a folder holds no other text and entropy models than the plan's.

    Raises:
        ConfigError: it does.
    """
    _merged(plan, out)


def _claim(plan: Plan, out: Path) -> None:
    """Record the plan's text and entropy models in a folder, or check them if it has some.

    Several plans may share a folder, to which each adds its entropy models.
    """
    everything, path = _merged(plan, out), out / TEXT
    if not path.exists() or everything != read_json(path):
        write_json(path, everything)


def _merged(plan: Plan, out: Path) -> dict[str, Any]:
    """Return what is recorded in a folder, with the plan's text and entropy models."""
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
    return {"text": text, "scorers": {**found["scorers"], **scorers}}


def _prepare(text: TextConfig, out: Path, progress: Progress) -> None:
    options = PrepareOptions(
        validation=tuple(_expand(text.validation)),
        validation_share=text.validation_share,
        leave_out=(out,),
    )
    with progress.preparing() as report:
        manifest = prepare(_expand(text.train), out / "text", options, report)
    if not manifest.sources("validation"):
        # Remove the folder so that the command can be retried.
        shutil.rmtree(out / "text")
        (out / TEXT).unlink()
        count = sum(source.documents for source in manifest.sources("train").values())
        raise DataError(
            f"none of {count} documents is held out, so the study could measure nothing: name "
            "files in text.validation, or raise text.validation_share"
        )


def _expand(arguments: Iterable[str]) -> list[str]:
    """Replace the placeholder of the standard library with the paths of its sources."""
    expanded: list[str] = []
    for one in arguments:
        paths = _stdlib_sources() if STDLIB in one else []
        expanded += [one.replace(STDLIB, str(path)) for path in paths] or [one]
    return expanded


def _stdlib_sources() -> list[Path]:
    library = Path(sysconfig.get_paths()["stdlib"])
    # Installed packages may be inside the library's folder, and they differ between machines.
    return [
        path
        for path in sorted(library.rglob("*.py"))
        if not any(part.endswith("-packages") for part in path.relative_to(library).parts)
    ]


def _train_scorer(
    name: str, recipe: Recipe, out: Path, progress: Progress, deadline: float | None
) -> bool:
    result = train(
        recipe,
        scorer_folder(out, name),
        callbacks=[progress.training(f"scorer {name}")],
        time_limit=None if deadline is None else max(deadline - time.time(), 0.0),
    )
    return result.finished


def _score(name: str, out: Path, progress: Progress) -> None:
    text = read_manifest(out / "text").sources()
    is_small = sum(source.text_bytes for source in text.values()) < SMALL_TEXT
    options = PrepareOptions(scorer=scorer_folder(out, name), workers=1 if is_small else None)
    with progress.preparing() as report:
        prepare([str(out / "text")], out / "scored" / name, options, report)


def _tokenizer(vocab_size: int, out: Path, progress: Progress) -> None:
    path = tokenizer_path(out, vocab_size)
    if path.exists():
        return
    path.parent.mkdir(exist_ok=True)
    with progress.waiting(f"training a tokenizer of {vocab_size} tokens"):
        dataset = Dataset(out / "text", "train")
        tokenizer = train_dataset_tokenizer(dataset, vocab_size, TOKENIZER_BYTES)
    tokenizer.save(path)
