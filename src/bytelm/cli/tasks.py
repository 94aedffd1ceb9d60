"""Parts of eval: tasks of the evaluation harness, and reports."""

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bytelm.errors import ConfigError

if TYPE_CHECKING:
    from lm_eval.api.model import LM

    from bytelm.evaluation.harness.running import Answers
    from bytelm.evaluation.noise import Noise
    from bytelm.evaluation.section import Section
    from bytelm.language_model import LanguageModel


class TaskOptions(NamedTuple):
    """Options of tasks."""

    tasks: str | None
    """Names, separated by commas."""
    limit: int | None
    num_fewshot: int | None
    data: Path | None
    include_path: Path | None
    hugging_face: list[str]
    device: str
    noises: "Sequence[Noise]" = ()
    """Noises of prompts, completions and both, besides clean requests."""
    seed: int = 0
    """Seed of the noises."""

    def check(self) -> None:
        """Check that options which belong to tasks come with them.

        Raises:
            ConfigError: one does not.
        """
        if self.tasks is not None:
            return
        for option, is_given in (
            ("--num-fewshot", self.num_fewshot is not None),
            ("--include-path", self.include_path is not None),
            ("--hf", bool(self.hugging_face)),
        ):
            if is_given:
                raise ConfigError(f"{option} belongs to --tasks: add it, or leave {option} out")


def measure_tasks(options: TaskOptions, lms: "Mapping[str, LanguageModel]") -> "list[Section]":
    """Run tasks of the evaluation harness on models, side by side.

    Args:
        options: what to run.
        lms: models of this package, by name.

    Raises:
        ConfigError: the extra ``harness`` is missing, a task is unknown, or a model of Hugging Face
            cannot be loaded.
        DataError: the data of a task is missing.
    """
    from bytelm.evaluation.harness import HarnessLM
    from bytelm.evaluation.harness.noisy import measure_noisy_tasks, noisy_tasks_section
    from bytelm.evaluation.harness.running import run_tasks
    from bytelm.evaluation.score_sections import group_sections, scores_section

    assert options.tasks is not None
    tasks = [name for name in options.tasks.split(",") if name]
    models: dict[str, LM] = {name: HarnessLM(lm) for name, lm in lms.items()}
    models |= _hugging_face_models(options)

    def run(lm: "LM") -> "Answers":
        return run_tasks(
            lm,
            tasks,
            limit=options.limit,
            num_fewshot=options.num_fewshot,
            data=options.data,
            include_path=options.include_path,
        )

    answers = {name: run(lm) for name, lm in models.items()}
    first = next(iter(answers.values()))
    shots = ", ".join(f"{task} {count}" for task, count in first.num_fewshot.items())
    limit = f"The first {options.limit} documents of each task. " if options.limit else ""
    record = {
        "limit": options.limit,
        "num_fewshot": first.num_fewshot,
        "task_versions": first.versions,
        "harness_results": {name: one.results for name, one in answers.items()},
    }
    scores = {name: one.scores for name, one in answers.items()}
    settings = f"{limit}Examples before each question: {shots}."
    sections = [scores_section(scores, settings, record), *group_sections(scores)]
    for name, lm in models.items() if options.noises else ():
        noisy = measure_noisy_tasks(
            lambda one: run(one).scores, lm, scores[name], options.noises, seed=options.seed
        )
        sections.append(noisy_tasks_section(noisy, f"tasks under noise: {name}"))
    return sections


def _hugging_face_models(options: TaskOptions) -> "Iterator[tuple[str, LM]]":
    """Yield the models of Hugging Face, with their names in tables.

    Raises:
        ConfigError: a package is missing, or a model cannot be loaded.
    """
    if not options.hugging_face:
        return
    try:
        from bytelm.evaluation.harness.hugging_face import hugging_face_model, short_names
    except ImportError as error:
        raise ConfigError(
            f"--hf needs the package {error.name}: pip install 'bytelm[harness]'"
        ) from None
    for name, model in zip(short_names(options.hugging_face), options.hugging_face, strict=True):
        yield name, hugging_face_model(model, options.device)


def write_eval_report(
    folder: Path, sections: "Sequence[Section]", lms: "Mapping[str, LanguageModel]"
) -> Path:
    """Write a report of the results of this command, and return its page.

    Raises:
        ConfigError: there is nothing to report, matplotlib is missing, or a file cannot be written.
    """
    from bytelm.evaluation.report import write_report

    names = ", ".join(lms)
    facts = {
        "command": shlex.join(["bytelm", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        **{f"model {name}": repr(lm) for name, lm in lms.items()},
    }
    return write_report(folder, sections, title=f"Evaluation of {names}", facts=facts, settings={})
