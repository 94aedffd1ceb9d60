"""Noise and questions about characters: several models side by side, and missing data."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")
from builders import random_patched
from bytelm.evaluation.harness import HarnessLM
from bytelm.evaluation.harness.hugging_face import hugging_face_model
from bytelm.evaluation.harness.text import HarnessText
from bytelm.evaluation.noise import parse_noises
from bytelm.evaluation.questions import (
    Question,
    QuestionSet,
    measure_questions,
    questions_sections,
)
from bytelm.evaluation.robustness import cut_pieces, measure_robustness, robustness_sections
from bytelm.language_model import LanguageModel
from test_byteify import save_donor
from test_characters import Toy
from test_report import checkpoints
from test_robustness import DOCUMENTS, bigram_model

__all__ = ["checkpoints"]

Run = Callable[..., tuple[int, str, str]]


def test_changes_of_models_under_noise_are_compared_in_pairs(tmp_path: Path):
    (lm, _), pieces = bigram_model(), list(cut_pieces(DOCUMENTS, 30, 9))
    noises = parse_noises("drop:0.5,uppercase")
    models = {"one": lm, "model 2": LanguageModel(random_patched(), lm.config)}
    found = {name: measure_robustness(one, pieces, noises) for name, one in models.items()}
    one, two, compared = robustness_sections(found)
    assert (one.title, two.title, compared.title) == (
        *("noise: one", "noise: model 2", "noise: compared"),
    )
    assert [row[:2] for row in compared.rows[2:4]] == [("drop:0.5", name) for name in models]
    assert [row[-1] is None for row in compared.rows] == [True, True, True, False, True, False]
    expected = found["model 2"].difference(found["one"], "uppercase")
    assert compared.record["changes"][-1]["difference"] == expected._asdict()
    assert compared.rows[-1][-1] == f"{expected.value:+.4f} ±{expected.margin:.4f}"
    compared.figures["noise"](tmp_path / "noise.svg")
    drawn = (tmp_path / "noise.svg").read_text()
    assert all(name in drawn for name in ("model 2", "uppercase"))


def test_answers_of_models_are_compared_in_pairs():
    questions = tuple(Question(f"{n} =", "aa", ("b",)) for n in range(4))
    likely = {f"{n} = aa\n": math.log(0.8) for n in range(4)}
    nats = likely | {f"{n} = b\n": math.log(0.2) for n in range(4)}
    written = [b" aa", b" aa", b" aa", b" b"]
    one = Toy(nats, {f"{n} =": b" b" for n in range(4)})
    two = Toy(
        nats | {"3 = aa\n": math.log(0.1)}, {f"{n} =": text for n, text in enumerate(written)}
    )
    asked = [QuestionSet("toy", questions)]
    found = {name: measure_questions(lm, asked) for name, lm in (("one", one), ("two", two))}
    *alone, compared = questions_sections(found, "toys", "of toys.")
    assert [section.title for section in alone] == ["toys: one", "toys: two"]
    assert compared.title == "toys: compared"
    scores = {(x["metric"], x["model"]): x for x in compared.record["scores"]}
    assert scores["exact", "two"]["difference"]["value"] == 0.75
    assert scores["exact", "two"]["difference"]["p"] == pytest.approx(0.25)
    assert scores["accuracy", "two"]["difference"]["value"] == -0.25
    assert scores["share", "two"]["difference"]["value"] == pytest.approx((0.1 / 0.3 - 0.8) / 4)
    assert scores["share", "one"]["value"] == alone[0].record["toy"]["share"]["value"]


def test_the_command_measures_noise_of_all_models(checkpoints: Path, tmp_path: Path, run: Run):
    text = tmp_path / "text.txt"
    text.write_text("the patch of bytes " * 12)
    asked = [text, "--noise", "uppercase", "--against", checkpoints / "other", "--json"]
    status, output, errors = run("eval", checkpoints / "one", *asked)
    assert status == 0, errors
    found = json.loads(output)
    assert found.keys() == {"all", "sources", "noise: one", "noise: other", "noise: compared"}
    clean, noised = (found["noise: other"]["noises"][name] for name in ("clean", "uppercase"))
    change = noised["bits_per_byte"]["value"] - clean["bits_per_byte"]["value"]
    assert found["noise: compared"]["changes"][-1]["change"]["value"] == pytest.approx(change)


def test_a_folder_without_questions_is_refused_before_a_model_is_loaded(tmp_path: Path, run: Run):
    asked = ["--characters", "--data", tmp_path]
    status, _, errors = run("eval", tmp_path / "no-model", *asked)
    assert (status, "has neither a folder cute nor a file cmudict.dict" in errors) == (1, True)
    (tmp_path / "cmudict.dict.xz").write_bytes(b"")
    status, _, errors = run("eval", tmp_path / "no-model", *asked)
    assert (status, "no-model" in errors) == (1, True)


def test_models_of_hugging_face_are_asked_too(checkpoints: Path, tmp_path: Path, run: Run):
    donor = save_donor(tmp_path / "donor", "llama 3.1", {})
    text = tmp_path / "text.txt"
    text.write_text("the patch of bytes " * 9)
    asked = [text, "--noise", "uppercase", "--characters", "--hf", donor, "--limit", 1, "--json"]
    status, output, errors = run("eval", checkpoints / "one", *asked, "--cache", tmp_path / "kept")
    assert status == 0, errors
    found = json.loads(output)
    assert {"noise: donor", "characters: generated words: donor"} <= found.keys()
    noises, [piece] = found["noise: donor"]["noises"], cut_pieces([text.read_bytes()])
    lm = HarnessText(hugging_face_model(str(donor)))
    [nats] = lm.log_likelihood([piece.context], [piece.continuation])
    bits = -nats / math.log(2) / len(piece.continuation)
    assert noises["clean"]["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-5)
    assert len(list((tmp_path / "kept").iterdir())) == 1


def test_models_of_the_harness_answer_as_language_models_do():
    (lm, _), prompts = bigram_model(), ["the cat", "a b", ""]
    one = HarnessText(HarnessLM(lm))
    rests = [b" sat.", b" on the mat", b" x"]
    assert one.log_likelihood(prompts, rests) == pytest.approx(lm.log_likelihood(prompts, rests))
    asked = {"max_bytes": 12, "stop": ["e"]}
    written = lm.generate(prompts, **asked)
    # The harness has text, which invalid bytes are not.
    texts = [data.decode("utf-8", "replace").encode()[:12] for data in written]
    assert one.generate(prompts, **asked) == texts
