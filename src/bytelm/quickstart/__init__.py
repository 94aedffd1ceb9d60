"""The quickstart: train, evaluate and sample a small BLT on this computer, in minutes.

Nothing is downloaded: by default the text is the Python standard library, which is present wherever
this runs. The steps are the commands a user would type, so the folder is an example of everything
that the package writes. Each step can be interrupted; the same command resumes it.
"""

import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bytelm.data import Dataset
from bytelm.errors import ConfigError
from bytelm.figures import check_matplotlib
from bytelm.inference import Sampling
from bytelm.language_model import LanguageModel, load
from bytelm.likelihood import Likelihood, total
from bytelm.progress import Progress
from bytelm.quickstart.coach import DRAWING_SHARE, FLOPS, Coach
from bytelm.quickstart.report import (
    HEADINGS,
    REPORT,
    Quickstart,
    Row,
    draw,
    row,
    table_rows,
    write_report,
    xz,
)
from bytelm.quickstart.text import CUT_BYTES, affordable_bytes, prepare_text, score_text
from bytelm.storage import is_vacant, read_json, write_json

__all__ = [
    "FLOPS",
    "HEADINGS",
    "REPORT",
    "STAGES",
    "Quickstart",
    "Row",
    "run_quickstart",
    "table_rows",
]

HELD_OUT_BYTES = 400_000
"""Most text to evaluate on; on the eight files of 150 kB, results differ by 0.1 bits per byte."""
QUOTED_BYTES = 2000
PLAN = "plan.json"
STAGES = 6


def run_quickstart(
    data: Path | None,
    out: Path,
    *,
    minutes: float = 6.0,
    began: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Quickstart:
    """Run the quickstart, or resume the one in the folder.

    Args:
        data: file or folder of text; ``None`` for the standard library of the running Python.
        out: folder of the run.
        minutes: maximum duration; a shorter one means less training.
        began: when the time began, on the clock of ``time.monotonic``; ``None`` for now.
        seed: seed of weights and data order.
        progress: receives the progress, in :data:`STAGES` stages.

    Raises:
        ConfigError: ``out`` holds a quickstart with other settings, or matplotlib is missing.
        DataError: the text cannot be read, or there is too little of it.
        Stopped: training was stopped; running it again resumes it.
    """
    began = time.monotonic() if began is None else began
    check_matplotlib()
    if not 0 <= seed < 2**63:
        raise ConfigError(f"the seed must be between 0 and 2^63 - 1, not {seed}")
    progress = progress or Progress()
    with _claimed(out, data, seed, minutes):
        progress.stage("reading text")
        text = prepare_text(data, out, read_json(out / PLAN)["text_bytes"], progress)
        threshold = score_text(text, out, seed, progress)
    progress.note(f"threshold {threshold:.3f} nats")

    write_json(out / PLAN, {**read_json(out / PLAN), "is_training": True})
    progress.stage("training a BLT and a plain byte transformer in turns, with the same FLOPs")
    coach = Coach(progress, out, began, minutes)
    results = coach.train(seed)

    progress.stage("evaluating on held-out files")
    lm, baseline = load(out / "blt", "cpu"), load(out / "byte", "cpu")
    documents = _held_out(out / "text")
    end = began + 60 * minutes * (1 - DRAWING_SHARE)
    with progress.measuring("evaluating") as report:
        documents, likelihoods = _evaluate([lm, baseline], documents, end, report)
    rows = [
        row("BLT, entropy patches", lm, likelihoods[0], results[0]),
        row("byte transformer", baseline, likelihoods[1], results[1]),
        xz(documents),
    ]
    progress.stage("sampling and drawing")
    prompt = documents[0][:60]
    sample = _sample(lm, prompt, seed, end + 60 * minutes * DRAWING_SHARE / 2)
    snippet = documents[0][:192]
    draw(out, lm, snippet)
    found = Quickstart(
        rows,
        sum(map(len, documents)),
        coach.caution(results[0].flops),
        prompt,
        sample,
        time.monotonic() - began,
        out,
    )
    write_report(found, text, threshold)
    return found


@contextmanager
def _claimed(out: Path, data: Path | None, seed: int, minutes: float) -> Iterator[None]:
    """Claim the folder, and give it back if the block fails before anything was trained.

    So another text can be tried after one that cannot be used. An interruption keeps the claim:
    the same command resumes.
    """
    is_new = not out.exists()
    _claim(out, data, seed, minutes)
    try:
        yield
    except Exception:
        if not read_json(out / PLAN)["is_training"]:
            for name in ("text", "entropy", "scored"):
                shutil.rmtree(out / name, ignore_errors=True)
            (out / PLAN).unlink()
            if is_new:
                with suppress(OSError):
                    out.rmdir()
        raise


def _claim(out: Path, data: Path | None, seed: int, minutes: float) -> None:
    """Create the folder of a new quickstart, or check that an existing one has these settings."""
    settings = {"data": None if data is None else str(data.resolve()), "seed": seed}
    if not (out / PLAN).exists():
        if not is_vacant(out):
            raise ConfigError(f"{out} is not empty and holds no quickstart: choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        text_bytes = affordable_bytes(60 * minutes)
        plan = {"settings": settings, "text_bytes": text_bytes, "is_training": False}
        write_json(out / PLAN, plan)
        return
    found = read_json(out / PLAN)["settings"]
    if found != settings:
        raise ConfigError(
            f"{out} holds a quickstart with other settings ({found}): choose another --out, or "
            "remove it"
        )


def _held_out(folder: Path) -> list[bytes]:
    """Return a random sample of held-out documents, of about :data:`HELD_OUT_BYTES`.

    Long ones are cut, so that no few of them decide the result and the evaluation can end on time.
    """
    dataset = Dataset(folder, "validation")
    order = list(range(len(dataset)))
    random.Random(0).shuffle(order)
    # The first document is quoted, so it must be long enough.
    first = next((index for index in order if dataset.lengths[index] >= QUOTED_BYTES), order[0])
    order.remove(first)
    documents, size = [], 0
    for index in [first, *order]:
        documents.append(dataset.document(index)[:CUT_BYTES])
        size += len(documents[-1])
        if size > HELD_OUT_BYTES:
            break
    return documents


def _evaluate(
    lms: list[LanguageModel],
    documents: list[bytes],
    end: float,
    report: Callable[[int, int | None], None],
) -> tuple[list[bytes], list[Likelihood]]:
    """Return the documents that were evaluated until ``end``, and their likelihood by each model.

    All models are evaluated on the same documents, at least on one.
    """
    found: list[list[Likelihood]] = [[] for _ in lms]
    all_bytes, done = sum(map(len, documents)), 0
    for number, document in enumerate(documents):
        if number and time.monotonic() > end:
            documents = documents[:number]
            break
        for lm, likelihoods in zip(lms, found, strict=True):
            by_label = lm.likelihood([("", document)], stride=lm.context_bytes // 2)
            likelihoods += by_label.values()
        done += len(document)
        report(done, all_bytes)
    return documents, [total(likelihoods) for likelihoods in found]


def _sample(lm: LanguageModel, prompt: bytes, seed: int, end: float) -> bytes:
    """Return a continuation of the prompt, a shorter one if the time is up."""
    sampling = Sampling(temperature=0.7, top_p=0.95, seed=seed)
    sample = b""
    for part in lm.stream(prompt, max_bytes=400, sampling=sampling):
        sample += part.data
        if time.monotonic() > end:
            break
    return sample
