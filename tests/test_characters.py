"""Questions about characters: what is asked, and how answers are scored."""

import json
import lzma
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bytelm.errors import ConfigError, DataError
from bytelm.evaluation.characters import (
    OPERATIONS,
    character_questions,
    training_questions,
)
from bytelm.evaluation.cute import (
    WORDINGS,
    cute_questions,
    is_held_out,
    pronunciation_questions,
    read_cmudict,
    training_pronunciations,
)
from bytelm.evaluation.questions import Question, QuestionSet, measure_questions, questions_section
from bytelm.language_model import LanguageModel
from test_robustness import bigram_model, bits


def edited(word, change):
    return "".join(change.get(letter, letter) for letter in word)


def is_right(question, answer):
    """Whether an answer is right, from the words of the question alone."""
    kind, *rest = re.split(r",? ", question)
    if kind == "spell":
        return answer == " ".join(rest[0])
    if kind == "join":
        return answer == "".join(rest)
    if kind == "is":
        return answer == ("yes" if rest[0] in list(rest[2]) else "no")
    if kind == "like":
        same = {one: sum(a == b for a, b in zip(one, rest[0], strict=True)) for one in rest[1::2]}
        return same[answer] == len(rest[0]) - 1 and sorted(same.values())[0] == 0
    word = rest[-1]
    change = {
        "add": lambda: {rest[2]: rest[2] + rest[0]},
        "delete": lambda: {rest[0]: ""},
        "replace": lambda: {rest[0]: rest[2]},
        "swap": lambda: {rest[0]: rest[2], rest[2]: rest[0]},
    }[kind]()
    assert set(change) <= set(word)
    return answer == edited(word, change)


@settings(max_examples=25)
@given(
    st.sampled_from(sorted(OPERATIONS)), st.integers(2, 6), st.integers(8, 26), st.integers(0, 3),
    st.integers(0, 99),
)  # fmt: skip
def test_questions_have_one_right_answer(operation, length, letters, shots, seed):
    alphabet = "abcdefghijklmnopqrstuvwxyz"[:letters]
    options = {"alphabet": alphabet, "shots": shots, "num_questions": 4, "seed": seed}
    # Few letters make too few words for one in ten of them.
    options["split"] = "train" if length < 4 else "test"
    (found,) = character_questions([operation], lengths=[length], **options)
    assert found.name == f"{operation} {length}"
    assert (
        found
        == character_questions(lengths=[7, length], **options)[
            2 * list(OPERATIONS).index(operation) + 1
        ]
    )
    for one in found.questions:
        *examples, last = one.prompt.split("\n")
        assert len({line.split(" =")[0] for line in (*examples, last)}) == shots + 1
        for line in examples:
            question, answer = line.split(" = ")
            assert is_right(question, answer)
        question = last.removesuffix(" =")
        assert is_right(question, one.answer)
        assert not any(is_right(question, wrong) for wrong in one.wrong)
        assert len({one.answer, *one.wrong}) == 1 + len(one.wrong) == round(1 / found.chance)
        assert set("".join(one.wrong).replace(" ", "")) <= set(alphabet) | set("yesno")


def word_asked_about(question):
    """The word that a question shows."""
    kind, *rest = re.split(r",? ", question)
    if kind == "join":
        return "".join(rest)
    return rest[0] if kind in ("spell", "like") else rest[-1]


def test_words_of_training_are_none_of_the_tests():
    records = training_questions(240, lengths=[3, 5], seed=1)
    asked = [record["prompt"].removesuffix(" =") for record in records]
    assert not any(is_held_out(word_asked_about(one)) for one in asked)
    for question, record in zip(asked, records, strict=True):
        assert is_right(question, record["response"].removeprefix(" ").removesuffix("\n"))
    kinds = [question.split(" ")[0] for question in asked]
    assert {kinds.count(one) for one in set(kinds)} == {30}
    assert len(set(kinds[:24])) > 4  # in random order
    tests = character_questions(lengths=[3, 5], num_questions=5)
    for one in (question for found in tests for question in found.questions):
        lines = one.prompt.removesuffix(" =").split("\n")
        assert all(is_held_out(word_asked_about(line.split(" = ")[0])) for line in lines)
    (shown,) = training_questions(1, shots=2)
    assert shown["prompt"].count("\n") == 2


def test_the_command_writes_questions_to_train_on(tmp_path, run):
    status, output, errors = run("data", "characters", "--out", tmp_path / "q.jsonl", "--number", 9)
    assert (status, "9 questions" in output) == (0, True), errors
    lines = (tmp_path / "q.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == training_questions(9)


def test_right_answers_cannot_be_told_from_their_form():
    contains, similar = character_questions(["contains", "similar"], lengths=[4], num_questions=300)
    assert 110 < sum(one.answer == "yes" for one in contains.questions) < 190
    first = [re.search(r", (\w+) or \w+ =$", one.prompt)[1] for one in similar.questions]
    assert 110 < sum(a == one.answer for a, one in zip(first, similar.questions, strict=True)) < 190


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"operations": ["spel"]}, "unknown operation 'spel'"),
        ({"lengths": [1]}, "at least two letters"),
        ({"lengths": [5], "alphabet": "abcab"}, "out of 3"),
        ({"lengths": [2], "alphabet": "abc", "shots": 9}, "too few words of 2 letters out of 3"),
    ],
)
def test_mistakes(options, says):
    with pytest.raises(ConfigError, match=says):
        character_questions(**options)


class Toy(LanguageModel):
    """Log-likelihoods and continuations from tables."""

    def __init__(self, nats, written):
        self.nats, self.written = nats, written

    def log_likelihood(self, context, continuation, *, stride=None):
        return [self.nats[context[n] + text] for n, text in enumerate(continuation)]

    def generate(self, prompt, *, max_bytes=256, stop=(), **options):
        assert (max_bytes, stop) == (3 + 8, ["\n"])
        return [self.written[one] for one in prompt]


def test_scores_by_hand():
    questions = (Question("1 =", "a", ("b", "cc")), Question("2 =", "ab", ("b",), ("AB",)))
    nats = {"1 = a\n": math.log(0.2), "1 = b\n": math.log(0.3), "1 = cc\n": math.log(0.1)}
    nats |= {"2 = ab\n": math.log(0.4), "2 = b\n": math.log(0.4)}
    toy = Toy(nats, {"1 =": b" a", "2 =": b" b "})
    (found,) = measure_questions(toy, [QuestionSet("toy", questions)])
    assert (found.name, found.num_questions) == ("toy", 2)
    assert found.chance == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert found.share.value == pytest.approx((0.2 / 0.6 + 0.5) / 2)
    assert found.accuracy.value == pytest.approx((0 + 0.5) / 2)
    assert found.exact.value == 0.5
    assert found.bits_per_byte.value == pytest.approx(-math.log2(0.2 * 0.4) / (3 + 4))
    assert found.share.low == pytest.approx(1 / 3)
    assert found.share.high == pytest.approx(1 / 2)
    toy.written["2 ="] = b"AB"
    assert measure_questions(toy, [QuestionSet("toy", questions)])[0].exact.value == 1
    toy.written["2 ="] = b"Ab"
    assert measure_questions(toy, [QuestionSet("toy", questions)])[0].exact.value == 0.5
    folded = QuestionSet("toy", questions, ignores_case=True)
    assert measure_questions(toy, [folded])[0].exact.value == 1
    section = questions_section([found], "toys", "of toys.")
    assert section.rows[0][:3] == ("toy", 2, "0.42")
    assert len(section.rows[0]) == len(section.columns)
    assert section.record["toy"]["share"]["high"] == found.share.high
    both = questions_section([found, found._replace(name="again")], "toys", "of toys.")
    assert [row[:2] for row in both.rows] == [("toy", 2), ("again", 2), ("all", 4)]
    assert both.record["all"]["accuracy"]["value"] == pytest.approx(found.accuracy.value)
    assert both.record["all"]["bits_per_byte"]["value"] == pytest.approx(found.bits_per_byte.value)
    assert both.record["all"]["chance"] == pytest.approx(found.chance)
    with pytest.raises(ConfigError, match="no questions"):
        measure_questions(toy, [QuestionSet("none", ())])


def test_a_bigram_model_answers_generated_questions(monkeypatch):
    lm, table = bigram_model()
    monkeypatch.setattr(lm, "generate", lambda prompts, **options: [b"?"] * len(prompts))
    sets = character_questions(["delete", "contains"], lengths=[3], num_questions=6)
    done = []
    found = measure_questions(lm, sets, report=done.append)
    assert done == [6, 12]
    for one, score in zip(sets, found, strict=True):
        accuracy, total, size = [], 0.0, 0
        for q in one.questions:
            texts = [f" {answer}\n".encode() for answer in (q.answer, *q.wrong)]
            each = [bits(table, q.prompt.encode(), text) for text in texts]
            accuracy.append(float(np.argmin(each) == 0))
            total, size = total + each[0], size + len(texts[0])
        assert score.accuracy.value == pytest.approx(np.mean(accuracy))
        assert score.bits_per_byte.value == pytest.approx(total / size, rel=1e-4)
        assert score.exact.value == 0


@pytest.fixture
def cute(tmp_path):
    tables = {
        "spell_rand": ["input1\tlabel", "abc\ta b c", "dea\td e a", "xyz\tx y z"],
        "del_char": ["input1\tinput2\tlabel", "t\tthe\the", "a\tat\tt", 'b\ta"b\ta"'],
        "contains_word": ["input1\tinput2\tlabel", "a\ta b.\tYes", "c\ta b.\tNo", "d\td.\tYes"],
        "sem": ["input1\tinput2\tinput3\tlabel", *["is\tgis\tare\tare"] * 3],
    }
    for name, lines in tables.items():
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_questions_of_cute(cute):
    sets = {one.name: one for one in cute_questions(cute, shots=2)}
    assert set(sets) == {"cute spell_rand", "cute contains_word", "cute sem", "cute del_char"}
    assert [name for name, one in sets.items() if one.ignores_case] == ["cute contains_word"]
    by_answer = {one.answer: one for one in sets["cute del_char"].questions}
    assert set(by_answer) == {"he", "t", 'a"'}
    for answer, text in (("he", "the"), ("t", "at")):
        one = by_answer[answer]
        *examples, last = one.prompt.split("\n")
        letter = (set(text) - set(answer)).pop()
        assert last == f'{WORDINGS["del_char"].format(letter, text)} Answer: "'
        assert len(examples) == 2
        assert all(line.endswith('"') and f'"{text}"' not in line for line in examples)
        assert len({answer, *one.wrong}) == 4
        assert one.wrong[0] == text
    assert [one.wrong for one in sets["cute sem"].questions] == [("gis",)] * 3
    yes_no = {(one.answer, *one.wrong) for one in sets["cute contains_word"].questions}
    assert yes_no == {("Yes", "No"), ("No", "Yes")}
    assert [len(one.questions) for one in cute_questions(cute, shots=2, limit=1)] == [1] * 4
    assert cute_questions(cute, shots=2) == list(sets.values())


def test_damaged_folders_of_cute(cute, tmp_path):
    with pytest.raises(DataError, match="too few for 4 examples"):
        cute_questions(cute)
    (cute / "spell.tsv").write_text("input1\tlabel\none\n")
    with pytest.raises(DataError, match="no table of CUTE"):
        cute_questions(cute, shots=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="none of the tables"):
        cute_questions(tmp_path / "empty")


SYLLABLES = [a + b + c for a in "bcd" for b in "aeiou" for c in "mnt"]


def test_words_to_learn_sounds_from_are_none_of_the_tests(tmp_path, run):
    path = tmp_path / "cmudict.dict"
    path.write_text("".join(f"{word} {' '.join(word.upper())}1\n" for word in SYLLABLES))
    known = [word for word in SYLLABLES if not is_held_out(word)]
    command = ("data", "characters", "--pronunciations", path, "--out", tmp_path / "sounds.jsonl")
    status, output, errors = run(*command)
    assert (status, f"{len(known)} questions" in output) == (0, True), errors
    lines = (tmp_path / "sounds.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert records == training_pronunciations(path, 20_000)
    assert sorted(one["prompt"] for one in records) == [f"{word} =" for word in known]
    for one in records:
        word = one["prompt"].removesuffix(" =")
        assert one["response"] == f" {' '.join(word.upper())}1\n"
    for one in training_pronunciations(path, 9, shots=2, seed=1):
        words = [line.split(" =")[0] for line in one["prompt"].split("\n")]
        assert len(set(words)) == 3
        assert set(words) <= set(known)


def test_pronunciations(tmp_path):
    words = SYLLABLES
    lines = [f"{word} {' '.join(word.upper())}1" for word in words]
    lines += ["bam(2) B AE0 M # name", "'tis T IH1 Z", ";;; a comment"]
    path = tmp_path / "cmudict.dict.xz"
    path.write_bytes(lzma.compress("\n".join(lines).encode()))
    found = read_cmudict(path)
    assert list(found) == words
    assert found["bam"] == ("B A M1", "B AE0 M")
    asked = [word for word in words if is_held_out(word)]
    assert 0 < len(asked) < 12
    one = pronunciation_questions(path, shots=3, limit=None)
    assert sorted(q.prompt.split("\n")[-1] for q in one.questions) == [f"{w} =" for w in asked]
    for question in one.questions:
        *examples, last = question.prompt.split("\n")
        assert len(examples) == 3
        assert not any(is_held_out(line.split(" = ")[0]) for line in examples)
        assert (question.answer, *question.also_right) == found[last.removesuffix(" =")]
        assert len({question.answer, *question.wrong}) == 4
    assert len(pronunciation_questions(path, shots=3, limit=1).questions) == 1
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"cannot be read: .*; fetch it again"):
        read_cmudict(path)
    path.write_bytes(lzma.compress(b"no words\n"))
    with pytest.raises(DataError, match="no pronouncing dictionary"):
        read_cmudict(path)
    path.write_bytes(lzma.compress(b"cat K AE1 T\n"))
    with pytest.raises(DataError, match="too few words"):
        pronunciation_questions(path)
