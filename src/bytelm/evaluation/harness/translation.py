"""Translation of parallel sentences by few-shot prompts, scored by sacreBLEU.

A prompt shows translated sentences, and asks for one more::

    English: The cat sat.
    German: Die Katze saß.

    English: It rained.
    German:

What a model writes to the end of the line is its translation. spBLEU is BLEU on the pieces of a
SentencePiece model of FLORES-200, the metric of the BLT paper (section 6.1) with the newer model;
chrF++ compares n-grams of characters and words, and needs no model.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from sacrebleu.metrics.base import Metric
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.significance import PairedTest
from sacrebleu.tokenizers.tokenizer_spm import SPM_MODELS
from sacrebleu.utils import SACREBLEU_DIR

from bytelm.errors import ConfigError, DataError
from bytelm.evaluation.harness.adapter import HarnessLM
from bytelm.evaluation.harness.caching import unwrapped
from bytelm.evaluation.parallel import Parallel
from bytelm.evaluation.section import Cell, Section

__all__ = [
    "NUM_SHOTS",
    "Direction",
    "Translations",
    "chrf_plus_plus",
    "parse_directions",
    "sp_bleu",
    "translate",
    "translations_section",
]

NUM_SHOTS = 5
"""Translated sentences before the one to translate."""
LANGUAGES = (
    "ar arb Arabic, ben bn Bengali, de deu German, en eng English, es spa Spanish, fi fin Finnish, "
    "fr fra French, hi hin Hindi, it ita Italian, ja jpn Japanese, ko kor Korean, por pt Portuguese"
    ", ru rus Russian, ta tam Tamil, th tha Thai, tr tur Turkish, zh zho Chinese"
)
"""Codes of languages, each with the name in prompts. Others are named as their files are."""
UNKNOWN_RATIO = 4.0
"""Bytes of a translation by those of the sentence, where no example shows it."""


class Direction(NamedTuple):
    """Languages that are translated from and into, by the names of their files."""

    source: str
    target: str

    def __str__(self) -> str:
        return f"{self.source}-{self.target}"


class Translations(NamedTuple):
    """The same sentences as several models translate them."""

    direction: Direction
    references: list[str]
    """Translations by people."""
    by_model: dict[str, list[str]]


def parse_directions(text: str, languages: Sequence[str]) -> list[Direction]:
    """Return the directions of a text such as ``eng_Latn-deu_Latn,deu_Latn-eng_Latn``.

    Args:
        text: pairs of languages, with commas between.
        languages: languages that there are sentences of.

    Raises:
        ConfigError: one is no pair of two languages that there are.
    """
    known = {
        f"{source}-{target}": Direction(source, target)
        for source in languages
        for target in languages
        if source != target
    }
    wanted = [one.strip() for one in text.split(",")]
    for one in wanted:
        if one not in known:
            raise ConfigError(
                f"{one!r} is no pair of languages such as {next(iter(known), 'en-de')}: there are "
                f"{', '.join(languages)}"
            )
    return [known[one] for one in dict.fromkeys(wanted)]


def translate(
    models: Mapping[str, LM],
    parallel: Parallel,
    direction: Direction,
    *,
    num_shots: int = NUM_SHOTS,
    limit: int | None = None,
) -> Translations:
    """Translate sentences with models, greedily.

    The first sentences are the examples of all prompts; those after them are translated.

    Args:
        models: models of the harness, by name.
        parallel: the sentences.
        direction: the languages.
        num_shots: number of examples.
        limit: sentences to translate; ``None`` for all.

    Raises:
        DataError: there are no more sentences than examples.
    """
    sources, targets = (
        [data.decode(errors="replace") for data in parallel.sentences[name]] for name in direction
    )
    if len(sources) <= num_shots:
        raise DataError(
            f"there are {len(sources)} sentences, and {num_shots} of them would be examples: name "
            "more, or lower --num-fewshot"
        )
    end = len(sources) if limit is None else num_shots + limit
    source, target = map(_name, direction)
    shown = "".join(
        f"{source}: {one}\n{target}: {other}\n\n"
        for one, other in zip(sources[:num_shots], targets[:num_shots], strict=True)
    )
    asked = sources[num_shots:end]
    prompts = [f"{shown}{source}: {sentence}\n{target}:" for sentence in asked]
    ratio = max(
        map(_ratio, sources[:num_shots], targets[:num_shots]),
        default=UNKNOWN_RATIO,
    )
    limits = [math.ceil(1.5 * ratio * len(sentence.encode())) + 16 for sentence in asked]
    return Translations(
        direction,
        targets[num_shots:end],
        {name: _continue(lm, prompts, limits) for name, lm in models.items()},
    )


def _name(language: str) -> str:
    """Return what prompts call a language: ``English`` for ``eng_Latn``."""
    code = language.partition("_")[0]
    known = (one.split() for one in LANGUAGES.split(", "))
    return next((name for *codes, name in known if code in codes), language)


def _ratio(source: str, target: str) -> float:
    return len(target.encode()) / len(source.encode())


def _continue(lm: LM, prompts: Sequence[str], limits: Sequence[int]) -> list[str]:
    """Return the lines that a model writes after prompts, of at most some bytes or tokens each."""
    # A limit of tokens is taken as several bytes each by models of this package. Tokens of other
    # models are of a byte at least.
    own = unwrapped(lm)
    size = own.bytes_per_token if isinstance(own, HarnessLM) else 1
    requests = []
    for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        options = {"until": ["\n"], "max_gen_toks": math.ceil(limit / size), "do_sample": False}
        requests.append(Instance("generate_until", {}, (prompt, options), index))
    return [text.strip() for text in lm.generate_until(requests)]


def sp_bleu() -> BLEU:
    """Return BLEU on pieces of sacreBLEU's SentencePiece model of FLORES-200.

    sacreBLEU downloads the model when it is first needed.

    Raises:
        ConfigError: the package ``sentencepiece`` is missing, or the model cannot be loaded.
    """
    logging.getLogger("sacrebleu").setLevel(logging.ERROR)
    try:
        import sentencepiece  # noqa: F401 # pyright: ignore
    except ImportError:
        raise ConfigError(
            "spBLEU needs the package sentencepiece: pip install 'bytelm[harness]'"
        ) from None
    url = SPM_MODELS["flores200"]["url"]
    path = Path(SACREBLEU_DIR) / "models" / Path(url).name
    try:
        return BLEU(tokenize="flores200")
    # Errors of the network and of damaged files have many types; sacreBLEU exits on those of TLS.
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"spBLEU needs a SentencePiece model that cannot be loaded ({error}): download {url} "
            f"as {path}, or set SACREBLEU to another folder with models/{path.name}"
        ) from None


def chrf_plus_plus() -> CHRF:
    """Return chrF++: chrF with n-grams of one and two words."""
    return CHRF(word_order=2)


def translations_section(
    found: Sequence[Translations], metrics: Mapping[str, Metric], settings: str
) -> Section:
    """Return the scores of translations as a table, the first model being the baseline.

    Intervals and p are those of sacreBLEU's paired bootstrap over sentences.

    Args:
        found: translations by the same models.
        metrics: metrics of sacreBLEU, by name.
        settings: how the models were asked.
    """
    several = len(found[0].by_model) > 1
    rows: list[tuple[Cell, ...]] = []
    records: list[dict[str, Any]] = []
    signatures: dict[str, str] = {}
    for one in found:
        for name, metric in metrics.items():
            test = PairedTest(
                list(one.by_model.items()), {name: metric}, [one.references], test_type="bs"
            )
            described, results = test()
            for signature in described.values():
                signatures[name] = signature.format()
            # sacreBLEU has its own name for the metric, beside one for the names of systems.
            [scores] = (value for key, value in results.items() if key != "System")
            for model, result in zip(one.by_model, scores, strict=True):
                assert not isinstance(result, str)
                assert result.ci is not None
                value, margin = float(result.score), float(result.ci)
                p = None if result.p_value is None else float(result.p_value)
                cells: list[Cell] = [str(one.direction), name, *([model] if several else [])]
                cells += [f"{value:.2f} ±{margin:.2f}", *([p] if several else [])]
                rows.append((*cells, len(one.references)))
                where = {"direction": str(one.direction), "metric": name, "model": model}
                records.append({**where, "value": value, "margin": margin, "p": p})
    columns = ("direction", "metric", *(["model"] if several else []), "score")
    columns += (*(["p"] if several else []), "sentences")
    note = f"{settings} ± is half of the 95% interval of a bootstrap over sentences."
    if several:
        note += f" p: of the difference from {next(iter(found[0].by_model))}, by paired bootstrap."
    record = {
        "scores": records,
        "signatures": signatures,
        "translations": {
            str(one.direction): {"references": one.references, **one.by_model} for one in found
        },
    }
    return Section("translation", note, columns, tuple(rows), record, figures={})
