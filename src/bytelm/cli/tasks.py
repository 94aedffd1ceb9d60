"""Parts of eval: tasks of the evaluation harness, translation, and reports."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bytelm.cli.app import status
from bytelm.errors import ConfigError

if TYPE_CHECKING:
    from lm_eval.api.model import LM

    from bytelm.evaluation.harness.noisy import Part
    from bytelm.evaluation.harness.running import Answers
    from bytelm.evaluation.noise import Noise
    from bytelm.evaluation.section import Section
    from bytelm.language_model import LanguageModel


class TaskOptions(NamedTuple):
    """Options of tasks and of translation."""

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
    translate: str | None = None
    """Pairs of languages, separated by commas."""
    parallel: str | None = None
    """Folder or glob of the sentences to translate."""
    thresholds: Sequence[float] = ()
    """Other patching thresholds, for the first model."""
    cache: Path | None = None
    """Folder of answers that are kept."""
    parts: "Sequence[Part]" = ()
    """Parts of requests that are noised; none for all."""
    asks_questions: bool = False
    """Whether questions about characters are asked."""
    asks: bool = False
    """Whether noise in text or questions about characters are measured, of ``--hf`` models too."""

    def check(self) -> None:
        """Check that options which belong to others come with them.

        Raises:
            ConfigError: one does not.
        """
        has_tasks, translates = self.tasks is not None, self.translate is not None
        questions = "--tasks, --translate or --characters"
        is_asked_questions = has_tasks or translates or self.asks_questions
        asking = "--tasks, --translate, --characters, or --noise and text"
        is_asking = has_tasks or translates or self.asks
        for option, is_given, other, is_other in (
            ("--num-fewshot", self.num_fewshot is not None, questions, is_asked_questions),
            ("--include-path", self.include_path is not None, "--tasks", has_tasks),
            (
                "--noise-parts",
                bool(self.parts),
                "--tasks and --noise",
                bool(self.noises) and has_tasks,
            ),
            ("--hf", bool(self.hugging_face), asking, is_asking),
            ("--cache", self.cache is not None, asking, is_asking),
            ("--translate", translates, "--parallel", self.parallel is not None),
        ):
            if is_given and not is_other:
                raise ConfigError(f"{option} belongs to {other}: add it, or leave {option} out")


def measure_with_harness(
    options: TaskOptions, lms: "Mapping[str, LanguageModel]", others: "Mapping[str, LM]"
) -> "list[Section]":
    """Run tasks of the evaluation harness, and translate, with models side by side.

    Args:
        options: what to do; maybe nothing.
        lms: models of this package, by name.
        others: models of Hugging Face, by name.

    Raises:
        ConfigError: the extra ``harness`` is missing, or a task or language is unknown.
        DataError: the data of a task is missing, or sentences are not parallel.
    """
    if options.tasks is None and options.translate is None:
        return []
    from bytelm.evaluation.harness import HarnessLM

    models = {name: _cached(HarnessLM(lm), options) for name, lm in lms.items()}
    models |= others
    sections = measure_tasks(options, models) if options.tasks is not None else []
    if options.translate is not None:
        sections += measure_translation(options, models)
    return sections


def measure_tasks(options: TaskOptions, models: "Mapping[str, LM]") -> "list[Section]":
    """Run tasks of the evaluation harness on models, side by side.

    Args:
        options: what to run.
        models: models of the harness, by name.

    Raises:
        ConfigError: a task is unknown.
        DataError: the data of a task is missing.
    """
    from bytelm.evaluation.drift_sections import task_thresholds_section
    from bytelm.evaluation.harness import HarnessLM
    from bytelm.evaluation.harness.caching import unwrapped
    from bytelm.evaluation.harness.noisy import PARTS, measure_noisy_tasks, noisy_tasks_section
    from bytelm.evaluation.harness.running import run_tasks
    from bytelm.evaluation.score_sections import group_sections, scores_section
    from bytelm.evaluation.thresholds import measure_task_thresholds, with_threshold

    assert options.tasks is not None
    tasks = [name for name in options.tasks.split(",") if name]
    first_name, first = next(iter(models.items()))
    first_lm = unwrapped(first)
    assert isinstance(first_lm, HarnessLM)
    if options.thresholds:
        # A model that has no threshold is refused before tasks are run.
        with_threshold(first_lm.lm, options.thresholds[0])

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
            *(lambda one: run(one).scores, lm, scores[name], options.noises),
            parts=options.parts or PARTS,
            seed=options.seed,
        )
        sections.append(noisy_tasks_section(noisy, f"tasks under noise: {name}"))
    if options.thresholds:
        by_threshold = measure_task_thresholds(
            lambda one: run(_cached(HarnessLM(one), options)).scores,
            first_lm.lm,
            scores[first_name],
            options.thresholds,
        )
        sections.append(task_thresholds_section(by_threshold))
    return sections


def hugging_face_models(options: TaskOptions) -> "dict[str, LM]":
    """Return the models of Hugging Face, by their names in tables.

    Raises:
        ConfigError: a package is missing, or a model cannot be loaded.
    """
    if not options.hugging_face:
        return {}
    try:
        from bytelm.evaluation.harness.hugging_face import hugging_face_model, short_names
    except ImportError as error:
        raise ConfigError(
            f"--hf needs the package {error.name}: pip install 'bytelm[harness]'"
        ) from None
    names = short_names(options.hugging_face)
    return {
        name: _cached(hugging_face_model(model, options.device), options, model)
        for name, model in zip(names, options.hugging_face, strict=True)
    }


def parse_parts(text: str | None) -> "tuple[Part, ...]":
    """Return the parts of requests in a text such as ``prompt,both``.

    Raises:
        ConfigError: one is no part.
    """
    if text is None:
        return ()
    from bytelm.evaluation.harness.noisy import PARTS

    wanted = [one.strip() for one in text.split(",")]
    if not set(wanted) <= set(PARTS):
        raise ConfigError(f"--noise-parts {text!r} must be some of {','.join(PARTS)}")
    return tuple(part for part in PARTS if part in wanted)


def _cached(lm: "LM", options: TaskOptions, described: str = "") -> "LM":
    """Return a model whose answers are kept on disk, if they shall be.

    Raises:
        ConfigError: they cannot be kept there.
    """
    from bytelm.evaluation.harness.caching import CachedLM

    return lm if options.cache is None else CachedLM(lm, options.cache, described)


def measure_translation(options: TaskOptions, models: "Mapping[str, LM]") -> "list[Section]":
    """Translate parallel sentences with models, side by side; and with each after noised prompts.

    Args:
        options: languages and files.
        models: models of the harness, by name.

    Raises:
        ConfigError: a language is unknown.
        DataError: sentences are not parallel, or too few.
    """
    from bytelm.evaluation.harness import translation
    from bytelm.evaluation.harness.noisy import NoisyLM
    from bytelm.evaluation.parallel import read_parallel

    assert options.translate is not None
    assert options.parallel is not None
    parallel = read_parallel(options.parallel)
    directions = translation.parse_directions(options.translate, parallel.languages)
    metrics: dict[str, translation.Metric] = {"chrF++": translation.chrf_plus_plus()}
    missing = ""
    try:
        metrics = {"spBLEU": translation.sp_bleu(), **metrics}
    except ConfigError as error:
        missing = f"No spBLEU: {error}."
        status.print(missing, highlight=False, markup=False, soft_wrap=True)
    shots = translation.NUM_SHOTS if options.num_fewshot is None else options.num_fewshot
    settings = (
        f"Sentences after the first {shots}, which are the examples of each prompt. {missing}"
    )

    def section(asked: "Mapping[str, LM]", title: str) -> "Section":
        found = [
            translation.translate(asked, parallel, one, num_shots=shots, limit=options.limit)
            for one in directions
        ]
        shown = translation.translations_section(found, metrics, settings.strip())
        return shown._replace(title=title)

    sections = [section(models, "translation")]
    for name, lm in models.items() if options.noises else ():
        noisy = {str(one): NoisyLM(lm, one, "prompt", options.seed) for one in options.noises}
        sections.append(section({"clean": lm, **noisy}, f"translation under noise: {name}"))
    return sections


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
