import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import bytelm
from builders import LearnedRule, random_byte_lm, random_ids, random_patched
from bytelm.checkpoint import CheckpointConfig, save_model
from bytelm.config import (
    EntropyPatching,
    FittedNgramConfig,
    ModelDescription,
    NgramConfig,
    SpacePatching,
    StaticPatching,
    TransformerConfig,
)
from bytelm.errors import ConfigError, DataError
from bytelm.language_model import LanguageModel
from bytelm.lm import ScorerLM
from bytelm.patching import Patcher, build_patcher
from bytelm.scoring import fit_ngram_scorer
from study_plan import TINY
from test_checkpoint import patched_description


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm") / "m"
    model = random_patched(reset=True)
    save_model(folder, model, patched_description(model))
    return bytelm.load(folder, device="cpu")


def test_the_api_is_listed_and_documented_without_being_used():
    code = """if True:
        import sys, bytelm
        assert set(bytelm.__all__) == set(dir(bytelm))
        assert "torch" not in sys.modules
        import pydoc
        print(pydoc.plain(pydoc.render_doc(bytelm)))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    for name in set(bytelm.__all__) - {"__version__", "interop"}:
        assert re.search(rf"\b{name}\b", done.stdout), name
    assert "bits_per_byte(self" in done.stdout


def test_exported_names_are_all_there():
    assert set(bytelm._LAZY) <= set(bytelm.__all__)
    for name in bytelm.__all__:
        assert getattr(bytelm, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = bytelm.nothing


@pytest.mark.parametrize("text", ["some text, é", b"\xff\x00 any bytes", ""])
def test_patches_cover_the_text(lm, text):
    patched = lm.patch(text)
    assert b"".join(patched.patches) == patched.data == bytelm.codec.to_bytes(text)
    assert len(patched.entropies) == len(patched.data) + 1
    threshold = lm.config.patching.threshold
    cut = [i for i in range(len(patched.data)) if i == 0 or patched.entropies[i] > threshold]
    assert patched.boundaries == tuple(cut)


def test_other_rules_can_be_applied(lm):
    assert lm.patch("a bc", SpacePatching()).patches == [b"a ", b"bc"]
    # BOS is the first of the positions that static patches count.
    assert lm.patch("abcdef", StaticPatching(length=3)).patches == [b"ab", b"cde", b"f"]
    assert lm.patch("abc", EntropyPatching(threshold=-1.0)).patches == [b"a", b"b", b"c"]


class AfterE:
    needs_entropies = False

    def __call__(self, seen):
        return seen.ids == bytelm.codec.OFFSET + ord("e")


class AboveMean:
    """A patch begins where the entropy exceeds the mean of those before it."""

    needs_entropies = True

    def start(self):
        return (0.0, 0)

    def advance(self, seen, memory):
        ends = []
        for entropy in seen.entropies.tolist():
            total, count = memory
            ends.append(entropy * count > total)
            memory = (total + entropy, count + 1)
        return torch.tensor(ends), memory


class FixedScorer:
    """A scorer that is not a module: the entropy is the byte before, over 64."""

    def entropies(self, ids, documents=None):
        return ids / 64

    def new_state(self, num_slots=1, strategy="auto", memory=None):
        raise NotImplementedError


def test_rules_and_scorers_may_be_objects(lm):
    patched = lm.patch("the tree", AfterE())
    assert patched.patches == [b"the", b" tre", b"e"]
    assert patched.rule.kind == "AfterE"
    assert lm.patch("the tree", Patcher(AfterE(), 2)).patches == [b"th", b"e", b" t", b"re", b"e"]
    above = lm.patch("the tree", AboveMean())
    assert above.boundaries != patched.boundaries
    assert b"".join(above.patches) == b"the tree"
    scored = lm.patch("a a", "entropy", threshold=1.0, scorer=FixedScorer())
    assert scored.entropies.tolist() == [1 / 64, 101 / 64, 36 / 64, 101 / 64]
    assert scored.patches == [b"a", b" a"]


def test_rules_by_name_with_options(lm, tmp_path):
    text = "some text, and more of it"
    own = lm.config.patching
    assert lm.patch(text, threshold=-1.0).patches == [bytes([b]) for b in text.encode()]
    assert lm.patch(text, max_length=2).rule == own.model_copy(update={"max_length": 2})
    assert lm.patch(text, "space").patches == lm.patch(text, SpacePatching()).patches
    assert lm.patch(text, "static").rule == StaticPatching(length=4)
    lm.save(tmp_path / "m")
    same = lm.patch(text)
    for scorer in (tmp_path / "m", str(tmp_path / "m"), lm, lm.module.get_scorer()):
        assert lm.patch(text, scorer=scorer).boundaries == same.boundaries


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("sapce",), {}, "unknown patching rule 'sapce'.*'space'"),
        (("space",), {"threshold": 1.0}, "the space rule has no threshold"),
        ((), {"treshold": 1.0}, "unknown option 'treshold'.*'threshold'"),
        ((SpacePatching(),), {"max_length": 3}, "max_length belongs to a rule that is named"),
        (("combined",), {"threshold": 1.0}, "'increase' is missing"),
    ],
)
def test_mistakes_in_rules_are_explained(lm, arguments, options, message):
    with pytest.raises(ConfigError, match=message):
        lm.patch("text", *arguments, **options)


def test_rules_that_read_states_need_an_encoder(lm):
    rule = LearnedRule(32)
    assert b"".join(lm.patch("some text", rule).patches) == b"some text"
    plain = LanguageModel(random_byte_lm(), lm.config)
    with pytest.raises(ConfigError, match="LearnedRule reads the encoder's states"):
        plain.patch("some text", rule)


def test_bits_per_byte_of_one_text_or_several(lm):
    one, two = lm.bits_per_byte("first text"), lm.bits_per_byte(b"2nd")
    both = lm.bits_per_byte(["first text", b"2nd"])
    assert both == pytest.approx((one * 10 + two * 3) / 13, rel=1e-5)


@pytest.mark.parametrize("text", ["", b"", [], ["", b""]])
def test_nothing_has_no_bits_per_byte(lm, text):
    with pytest.raises(DataError, match="an empty text has no bits per byte: give at least one"):
        lm.bits_per_byte(text)


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_any_bytes_are_a_text(lm, kind):
    data = b"some \xff text"
    assert lm.patch(kind(data)).patches == lm.patch(data).patches
    assert lm.bits_per_byte(kind(data)) == lm.bits_per_byte(data)
    assert lm.bits_per_byte([kind(data), data]) == pytest.approx(lm.bits_per_byte(data))
    assert (lm.entropies(kind(data)) == lm.entropies(data)).all()
    expected = lm.generate(data, max_bytes=9)
    assert lm.generate(kind(data), max_bytes=9, stop=kind(b"nowhere")) == expected
    assert "".join(lm.stream_text(kind(data), max_bytes=9)) == expected.decode("utf-8", "replace")


def test_several_texts_where_one_is_expected_are_refused_with_the_remedy(tmp_path):
    model = random_patched()
    save_model(tmp_path / "m", model, patched_description(model))
    code = f"""if True:
        import bytelm
        lm = bytelm.load({str(tmp_path / "m")!r}, "cpu")
        for call in (lm.patch, lm.entropies, bytelm.codec.encode, lambda x: next(lm.stream(x))):
            for wrong in (["a", "b"], ("a",), 3, None):
                try:
                    call(wrong)
                except bytelm.ConfigError as error:
                    print(error)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    several, tuples, number, nothing = done.stdout.splitlines()[:4]
    assert len(done.stdout.splitlines()) == 16
    assert several.startswith(
        "a text must be str or bytes, not list: give one text at a time, [f(t"
    )
    assert "not tuple: give one" in tuples
    assert number == "a text must be str or bytes, not int"
    assert nothing == "a text must be str or bytes, not NoneType"


def wrap(model):
    config = CheckpointConfig(**dict(patched_description(model)))
    return bytelm.LanguageModel(model.requires_grad_(False), config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ngram_scorer", [True, False])
def test_converted_models_can_do_everything(dtype, ngram_scorer):
    text = "the cat sat on the mat"
    lm = wrap(random_patched(ngram_scorer=ngram_scorer))
    exact, patches = lm.bits_per_byte(text), lm.patch(text).patches
    lm.module.to(dtype)
    assert lm.bits_per_byte(text) == pytest.approx(exact, rel=0.05)
    assert lm.entropies(text).dtype == np.float32
    assert len(lm.generate(text, max_bytes=5)) <= 5
    if ngram_scorer:
        # Counts do not depend on the precision of the model.
        assert lm.patch(text).patches == patches


def test_a_model_says_what_it_is(lm, tmp_path):
    count = sum(p.numel() for p in lm.module.trained.parameters())
    threshold = lm.config.patching.threshold
    assert repr(lm) == (
        f"LanguageModel(blt of patches; {count:,} parameters; entropy patching, threshold "
        f"{threshold}; transformer scorer; cpu; float32)"
    )
    module = random_byte_lm()
    model = TransformerConfig.model_validate(TINY)
    plain = bytelm.LanguageModel(module.bfloat16(), CheckpointConfig(model=model))
    assert re.fullmatch(
        r"LanguageModel\(transformer of bytes; [\d,]+ parameters; cpu; bfloat16\)", repr(plain)
    )


def test_a_home_folder_is_expanded_in_paths(lm, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    lm.save("~/saved")
    assert (tmp_path / "saved" / "config.json").exists()
    assert bytelm.load("~/saved", "cpu").patch("a text").boundaries == lm.patch("a text").boundaries


def test_generation_is_bytes_and_streams_text(lm):
    sampling = bytelm.Sampling(seed=5)
    data = lm.generate("x", max_bytes=40, sampling=sampling)
    assert b"".join(p.data for p in lm.stream("x", max_bytes=40, sampling=sampling)) == data
    text = "".join(lm.stream_text("x", max_bytes=40, sampling=sampling))
    assert text == data.decode("utf-8", "replace")
    assert (
        lm.generate("x", max_bytes=40, sampling=sampling, stop=[data[5:7]])
        == data[: data.find(data[5:7])]
    )


def test_many_prompts_are_continued_as_each_alone(lm):
    prompts = ["x", b"\xff", "a longer prompt"]
    samplings = [bytelm.Sampling(seed=n) for n in range(3)]
    options = {"max_bytes": 30, "stop": "q"}
    alone = [lm.generate(p, sampling=s, **options) for p, s in zip(prompts, samplings, strict=True)]
    assert lm.generate(iter(prompts), sampling=samplings, num_slots=2, **options) == alone
    streamed = [b""] * 3
    for index, part in lm.stream_many(prompts, sampling=samplings, **options):
        streamed[index] += part.data
    assert streamed == alone
    same = lm.generate(["x", "x"], sampling=bytelm.Sampling(seed=0), **options)
    assert same == [alone[0]] * 2
    assert lm.generate([]) == []


def test_an_ngram_scorer_patches_and_does_not_predict(tmp_path):
    ngrams = fit_ngram_scorer([random_ids(300, num_values=9).numpy()], NgramConfig(max_order=2))
    config = FittedNgramConfig(max_order=2, num_contexts=len(ngrams.keys))
    save_model(tmp_path / "t", ScorerLM(ngrams), ModelDescription(model=config))
    lm = bytelm.load(tmp_path / "t")
    assert lm.patch("abc", EntropyPatching(threshold=99.0)).patches == [b"abc"]
    with pytest.raises(ConfigError, match="it can patch text, not predict it"):
        lm.bits_per_byte("abc")


def test_a_model_without_scorer_says_so(tmp_path):
    model = random_patched(rule=build_patcher(SpacePatching()).rule)
    model.scorer = None
    description = patched_description(model).model_copy(update={"scorer": None})
    save_model(tmp_path / "m", model, description)
    lm = bytelm.load(tmp_path / "m")
    patched = lm.patch("a b")
    assert patched.entropies is None
    with pytest.raises(ConfigError, match="this model has no scorer"):
        lm.entropies("a b")
    assert torch.isfinite(torch.tensor(lm.bits_per_byte("a b")))
