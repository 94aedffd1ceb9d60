"""Few-shot translation: prompts, limits, scores of sacreBLEU, and what is missing for them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sacrebleu
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from sacrebleu.tokenizers import tokenizer_spm

from bytelm.errors import ConfigError, DataError
from bytelm.evaluation.harness import translation
from bytelm.evaluation.harness.translation import Direction, parse_directions, translate
from bytelm.evaluation.parallel import Parallel
from test_harness import adapter
from test_report import checkpoints

__all__ = ["checkpoints"]

ENGLISH = [b"The cat sat.", b"It rained.", b"Who is there?", b"Open the door."]
GERMAN = ["Die Katze saß.".encode(), b"Es regnete.", b"Wer ist da?", "Öffne die Tür.".encode()]
SENTENCES = Parallel({"eng_Latn": ENGLISH, "de": GERMAN, "xy": ENGLISH})
TO_GERMAN = Direction("eng_Latn", "de")
Run = Callable[..., tuple[int, str, str]]


class Scripted(LM):
    """Answers in order, and keeps what it was asked."""

    def __init__(self, *answers: str) -> None:
        super().__init__()
        self.answers, self.asked = answers, list[tuple[Any, ...]]()

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: list[Instance]) -> list[str]:
        self.asked += [one.args for one in requests]
        return list(self.answers[: len(requests)])


def test_prompts_show_examples_and_ask_for_the_rest_of_a_line():
    lm = Scripted(" Wer ist da? ")
    found = translate({"a": lm}, SENTENCES, TO_GERMAN, num_shots=2, limit=1)
    assert (found.references, found.by_model) == (["Wer ist da?"], {"a": ["Wer ist da?"]})
    [(prompt, options)] = lm.asked
    assert prompt == (
        "English: The cat sat.\nGerman: Die Katze saß.\n\n"
        "English: It rained.\nGerman: Es regnete.\n\n"
        "English: Who is there?\nGerman:"
    )
    # Half as long again as the longest example would be: 15 bytes for 12, of 13.
    assert options == {"until": ["\n"], "max_gen_toks": 41, "do_sample": False}
    translate({"a": lm}, SENTENCES, Direction("xy", "de"), num_shots=0, limit=1)
    assert lm.asked[-1][0] == "xy: The cat sat.\nGerman:"


@pytest.mark.parametrize("kind", ["byte", "token"])
def test_models_of_bytes_and_tokens_write_a_line(kind: str):
    found = translate({kind: adapter(kind)}, SENTENCES, TO_GERMAN, num_shots=1)
    assert len(found.by_model[kind]) == 3
    assert not any("\n" in one for one in found.by_model[kind])


def test_scores_are_those_of_sacrebleu_and_paired():
    right = [data.decode() for data in GERMAN]
    wrong = ["Der Hund saß.", "Es regnet", "Wer da?", ""]
    found = translate(
        {"wrong": Scripted(*wrong), "right": Scripted(*right)}, SENTENCES, TO_GERMAN, num_shots=0
    )
    metric = translation.chrf_plus_plus()
    section = translation.translations_section([found], {"chrF++": metric}, "")
    one, other = section.record["scores"]
    expected = sacrebleu.corpus_chrf(wrong, [right], word_order=2).score
    assert one["value"] == pytest.approx(expected)
    assert (one["p"], other["value"], other["margin"]) == (None, pytest.approx(100), 0)
    assert other["p"] < 0.05
    assert "nw:2" in section.record["signatures"]["chrF++"]
    assert section.record["translations"]["eng_Latn-de"]["wrong"] == wrong
    alone = translation.translations_section(
        [found._replace(by_model={"wrong": wrong})], {"chrF++": metric}, ""
    )
    assert alone.record["scores"][0] == one
    assert len(alone.columns) == len(alone.rows[0]) == len(section.columns) - 2


def test_directions_are_pairs_of_languages_that_there_are():
    languages = ["zh", "zh-TW", "en"]
    found = parse_directions("zh-TW-en, en-zh-TW,zh-TW-en", languages)
    assert found == [("zh-TW", "en"), ("en", "zh-TW")]
    for wrong in ("en-de", "en", "en-en", ""):
        with pytest.raises(ConfigError, match="no pair of languages such as zh-zh-TW: there are"):
            parse_directions(wrong, languages)
    with pytest.raises(DataError, match="4 sentences, and 4 of them"):
        translate({}, SENTENCES, TO_GERMAN, num_shots=4)


class Pieces:
    """A SentencePiece model of single characters."""

    def Load(self, path: str) -> None:
        if Path(path).read_text() != "model":
            raise OSError("not a model")

    def EncodeAsPieces(self, text: str) -> list[str]:
        return list(text)


def test_what_the_bleu_of_pieces_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unreachable(url: str) -> None:
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    for module in (translation, tokenizer_spm):
        monkeypatch.setattr(module, "SACREBLEU_DIR", str(tmp_path))
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ConfigError, match="the package sentencepiece: pip install"):
        translation.sp_bleu()
    fake: Any = ModuleType("sentencepiece")
    fake.SentencePieceProcessor = Pieces
    monkeypatch.setitem(sys.modules, "sentencepiece", fake)
    path = tmp_path / "models" / "flores200sacrebleuspm"
    with pytest.raises(ConfigError, match=rf"\(no network\): download https:.* as {path}, or set"):
        translation.sp_bleu()
    path.write_text("damaged")
    with pytest.raises(ConfigError, match="not a model"):
        translation.sp_bleu()
    path.write_text("model")
    metric = translation.sp_bleu()
    assert metric.corpus_score(["abcde"], [["abcdf"]]).precisions == [80.0, 75.0, 200 / 3, 50.0]


def test_the_command_translates_with_all_models(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
):
    def missing() -> None:
        raise ConfigError("no network")

    monkeypatch.setattr(translation, "sp_bleu", missing)
    for name, sentences in (("en", ENGLISH), ("de", GERMAN)):
        (tmp_path / f"{name}.txt").write_bytes(b"\n".join(sentences))
    arguments = ["eval", checkpoints / "one"]
    asked = ["--translate", "en-de,de-en", "--num-fewshot", 1, "--limit", 2]
    status, output, errors = run(
        *arguments, *asked, "--parallel", tmp_path, "--against", checkpoints / "other", "--json"
    )
    assert (status, "No spBLEU: no network" in errors) == (0, True), errors
    scores = json.loads(output)["translation"]["scores"]
    found = [(one["direction"], one["metric"], one["model"]) for one in scores]
    assert found == [(d, "chrF++", m) for d in ("en-de", "de-en") for m in ("one", "other")]
    noised = [*asked, "--noise", "uppercase", "--parallel", tmp_path, "--json"]
    status, output, errors = run(*arguments, *noised)
    assert status == 0, errors
    record = json.loads(output)["translation under noise: one"]
    found = [(one["direction"], one["model"]) for one in record["scores"]]
    assert found == [(d, m) for d in ("en-de", "de-en") for m in ("clean", "uppercase")]
    clean, upper = (record["translations"]["en-de"][name] for name in ("clean", "uppercase"))
    assert clean == json.loads(output)["translation"]["translations"]["en-de"]["one"] != upper
    status, _, errors = run(*arguments, *asked)
    assert (status, "--translate belongs to --parallel" in errors) == (1, True)
