"""Results of runs on disk, and their comparison with a plan.

::

    STUDY/runs/NAME/                a training run, as `bytelm train` makes it
    STUDY/runs/NAME/result.json     written last, when the run is trained and measured

Recognising a result resolves nothing. What the plan sets must be in the recorded recipe; what it
leaves to the data and the budget (threshold, how rows are filled, number of steps) is taken from
there.
"""

from pathlib import Path
from typing import Any

from bytelm.config import CalibratedPatching, Recipe, differences, parse
from bytelm.data import Dataset
from bytelm.errors import ConfigError
from bytelm.storage import read_json, write_json
from bytelm.study.loading import run_recipe, with_steps
from bytelm.study.plan import Plan, Run, alternative_names
from bytelm.study.text import text_folder, tokenizer_path
from bytelm.tokens import load_tokenizer
from bytelm.training.starting import RESUME_FREELY

RESULT = "result.json"


def run_folder(out: Path, run: Run) -> Path:
    """Return the folder of a run: one that exists under another name of its settings, if any."""
    folders = [out / "runs" / name for name in (run.name, *alternative_names(run))]
    return next((folder for folder in folders if folder.exists()), folders[0])


def write_result(out: Path, run: Run, result: dict[str, Any]) -> None:
    """Write the result of a run atomically."""
    write_json(run_folder(out, run) / RESULT, result)


def finished_result(plan: Plan, run: Run, out: Path) -> dict[str, Any] | None:
    """Return the result of a run, or ``None`` if it is not trained and measured yet.

    Raises:
        ConfigError: the result was made with other settings than the plan's, or from other data.
    """
    folder = run_folder(out, run)
    if not (folder / RESULT).exists():
        return None
    result = read_json(folder / RESULT)
    recorded = parse(Recipe, result["recipe"], f"{folder / RESULT}: recipe")
    wanted = {"run": {"flops": run.flops, "bytes": run.bytes}, **identity(plan, run, out)}
    found = {key: result.get(key) for key in wanted}
    found["run"] = {key: result["run"][key] for key in wanted["run"]}
    changed = recipe_changes(plan, run, recorded) + differences(found, wanted)
    if changed:
        raise ConfigError(
            f"run {run.name!r} in {out} was made by another plan or from other data "
            f"({'; '.join(changed)}): choose another --out, or remove {folder} to repeat the run"
        )
    return result


def identity(plan: Plan, run: Run, out: Path) -> dict[str, Any]:
    """Return the values that a result and a run must share, besides recipe and budget."""
    vocab_size = plan.families[run.family].vocab_size
    tokenizer = None
    if vocab_size is not None:
        tokenizer = load_tokenizer(tokenizer_path(out, vocab_size)).fingerprint
    return {
        "evaluated": plan.text.model_dump(include={"evaluated_bytes", "skipped_bytes"}),
        "counts_scorer": plan.include_scorer,
        "data": Dataset(text_folder(plan, run.family, out), "train").manifest.fingerprint,
        "tokenizer": tokenizer,
    }


def recipe_changes(plan: Plan, run: Run, recorded: Recipe) -> list[str]:
    """Return the differences of a plan's recipe of a run from the one that was recorded.

    Settings that may change while a run is resumed do not count.
    """
    recipe = run_recipe(plan, run)
    data, patching = recipe.data, recipe.patching
    for name in ("row_patches", "packing"):
        if getattr(data, name) is None:
            data = data.model_copy(update={name: getattr(recorded.data, name)})
    if isinstance(patching, CalibratedPatching) and patching.needs_calibration:
        found = getattr(recorded.patching, patching.threshold_name, None)
        patching = patching.model_copy(update={patching.threshold_name: found})
    recipe = recipe.model_copy(update={"data": data, "patching": patching})
    planned = with_steps(plan, recipe, recorded.train.steps)
    changed = differences(recorded.model_dump(mode="json"), planned.model_dump(mode="json"))
    return [line for line in changed if line.split(":")[0] not in RESUME_FREELY]
