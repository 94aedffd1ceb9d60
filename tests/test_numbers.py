"""NaN and infinity are noticed where they appear, and named."""

import math
import re

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import bytelm
from builders import fitted_ngram_scorer, ids_of, random_byte_lm, random_patched
from bytelm import codec, interop
from bytelm.checkpoint import CheckpointConfig, check_finite, load_model, save_model
from bytelm.config import FittedNgramConfig, ModelDescription, NgramConfig, Recipe, parse
from bytelm.data import Dataset, PrepareOptions, prepare
from bytelm.data.calibration import sample_dataset
from bytelm.data.records import Document
from bytelm.data.writing import Writer
from bytelm.errors import CheckpointError, NumericalError, TrainingError
from bytelm.inference import Sampler, Sampling, generate
from bytelm.language_model import LanguageModel
from bytelm.likelihood import evaluate
from bytelm.lm import ScorerLM
from bytelm.scoring import ContextScorer, fit_ngram_scorer, score_documents
from bytelm.training import objective, train
from bytelm.units import PatchUnits, Span
from foreign import hf_model, official_weights, save_consolidated, save_official
from study_plan import TINY
from test_checkpoint import patched_description

BAD = [math.nan, math.inf, -math.inf]


def poison(tensor, value, index=-1):
    with torch.no_grad():
        # Not a view: weights may be stored by columns.
        tensor.put_(torch.tensor(index % tensor.numel()), torch.tensor(value, dtype=tensor.dtype))


@pytest.fixture
def lm():
    module = random_patched()
    config = CheckpointConfig(**dict(patched_description(module)))
    return LanguageModel(module.requires_grad_(False), config)


class PoisonedScorer(ContextScorer):
    """A scorer whose entropy is not finite after one byte."""

    context = 0

    def __init__(self, byte, value):
        super().__init__()
        self.byte, self.value = byte, value

    def score(self, ids, positions):
        return torch.ones(ids.shape).masked_fill(ids == codec.OFFSET + self.byte, self.value)


# Weights


@given(
    st.lists(st.floats(width=32), min_size=1, max_size=9),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
@example([1.0, math.nan], torch.float32)
def test_weights_are_refused_if_and_only_if_one_is_not_finite(values, dtype):
    tensor = torch.tensor(values, dtype=torch.float64).to(dtype)
    for allow_inf in (False, True):
        bad = tensor.isnan() if allow_inf else ~tensor.isfinite()
        if bad.any():
            with pytest.raises(CheckpointError, match=r"here: the weights x\.y hold (NaN|inf)"):
                check_finite("x.y", tensor, "here", allow_inf=allow_inf)
        else:
            check_finite("x.y", tensor, "here", allow_inf=allow_inf)


def test_tensors_without_weights_pass():
    for tensor in (torch.zeros(0), torch.zeros(3, dtype=torch.long), torch.zeros(2, device="meta")):
        check_finite("x", tensor, "here")


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("part", ["blt.decoder", "scorer.transformer"])
def test_a_checkpoint_with_such_weights_is_refused_by_name(tmp_path, value, part):
    model = random_patched()
    name, weight = list(model.get_submodule(part).named_parameters())[-1]
    poison(weight, value)
    save_model(tmp_path / "m", model, patched_description(model))
    kind = "NaN" if math.isnan(value) else "infinity"
    with pytest.raises(CheckpointError) as error:
        bytelm.load(tmp_path / "m", "cpu")
    file = "model" if part.startswith("blt") else "scorer"
    assert re.search(rf"{file}\.safetensors: the weights \S*{name} hold {kind}", str(error.value))


def test_a_scorer_with_nan_is_refused_before_data_is_prepared(tmp_path):
    scorer = fitted_ngram_scorer()
    poison(scorer.values, math.nan)
    model = FittedNgramConfig(max_order=3, num_contexts=len(scorer.keys))
    save_model(tmp_path / "s", ScorerLM(scorer), ModelDescription(model=model))
    (tmp_path / "x.txt").write_text("some text")
    with pytest.raises(CheckpointError, match="the weights values hold NaN"):
        prepare([str(tmp_path / "x.txt")], tmp_path / "d", PrepareOptions(scorer=tmp_path / "s"))


def test_imports_refuse_such_weights_by_their_names(tmp_path):
    model = hf_model()
    blt, entropy = save_official(model, tmp_path)
    weights = load_file(entropy / "model.safetensors")
    name = sorted(weights)[3]
    poison(weights[name], math.nan)
    save_file(weights, entropy / "model.safetensors")
    message = re.escape(f"the weights {name} hold NaN")
    with pytest.raises(CheckpointError, match=message):
        interop.import_official(blt, entropy)
    with pytest.raises(CheckpointError, match=message):
        interop.convert_official(blt, tmp_path / "out", entropy)
    assert not (tmp_path / "out").exists()
    folder = tmp_path / "hf"
    poison(next(iter(model.model.parameters())), math.inf)
    model.save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"the weights \S+ hold infinity"):
        interop.import_hf(folder)


def test_exports_refuse_such_weights(tmp_path):
    model = hf_model()
    model.save_pretrained(tmp_path / "hf")
    lm = interop.import_hf(tmp_path / "hf")
    poison(lm.module.blt.decoder.output.weight, math.nan)
    with pytest.raises(CheckpointError, match=r"the weights decoder\.output\.weight hold NaN"):
        interop.export_hf(lm, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parameters_in_a_pth_file_are_imported(tmp_path):
    model = hf_model()
    folder = save_consolidated(model, tmp_path / "pth")
    expected = interop.import_official(folder)
    weights, _ = official_weights(model)
    wrapped = {name: nn.Parameter(tensor.clone()) for name, tensor in weights.items()}
    torch.save({"model": wrapped}, folder / "consolidated.pth")
    found = interop.import_official(folder)
    interop.convert_official(folder, tmp_path / "out")
    converted, _ = load_model(tmp_path / "out")
    for one in (found.module, converted):
        for name, tensor in expected.module.state_dict().items():
            assert torch.equal(tensor, one.state_dict()[name])


# Logits


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (100, math.nan, r"are not numbers \(NaN\)"),
        (100, math.inf, "are infinite"),
        (slice(None), -math.inf, "are all minus infinity"),
        (slice(codec.EOS, None), -math.inf, "are all minus infinity"),
    ],
)
def test_logits_that_are_not_finite_are_named(index, value, message, temperature):
    logits = torch.zeros(260)
    sampler = Sampler(Sampling(temperature=temperature))
    sampler.choose(logits, 0)
    logits[index] = value
    with pytest.raises(NumericalError, match=f"logits after 1 generated ids {message}.* earlier"):
        sampler.choose(logits, 1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_single_ids_may_be_excluded(temperature):
    logits = torch.full((260,), -math.inf)
    logits[77] = 0.0
    assert Sampler(Sampling(temperature=temperature)).choose(logits, 0) == 77


def test_generation_stops_at_such_logits():
    model = random_byte_lm()
    poison(model.transformer.output.weight, math.nan)
    with pytest.raises(NumericalError, match="logits after 0 generated ids"):
        generate(model, b"a prompt", max_bytes=3)


# Entropies


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("before", [0, 3, 9000])
def test_entropies_name_the_byte(value, before):
    scorer = PoisonedScorer(ord("x"), value)
    documents = [ids_of(b"fine"), ids_of(b"a" * before + b"x")]
    # The entropy after a byte belongs to the one that follows.
    with pytest.raises(NumericalError, match=f"entropy of byte {before + 1:,} of document 2 is"):
        score_documents(scorer, documents)
    assert len(score_documents(scorer, documents[:1])[0]) == 5


@pytest.mark.parametrize("before", [0, 3, 9000])
@pytest.mark.parametrize("others", [[], [b"fine"]])
def test_preparation_names_source_document_and_byte(tmp_path, before, others):
    writer = Writer(tmp_path, None, reset_at_newline=False)
    writer._scorer = PoisonedScorer(ord("x"), math.nan)
    data = b"a" * before + b"x" + b"a" * 9000
    documents = [Document(one, "books") for one in (*others, data)]
    start = re.escape(repr(data[:32]))
    name = f"the document of source 'books' that begins with {start}"
    message = f"entropy of byte {before + 1:,} of {name}"
    with pytest.raises(NumericalError, match=message):
        writer.write_block(0, documents, ["train"] * len(documents))
    assert not list(tmp_path.iterdir())


def test_evaluation_and_patching_name_the_text_and_byte(lm):
    lm.module.scorer = PoisonedScorer(ord("x"), math.nan)
    with pytest.raises(NumericalError, match="byte 3 of the text 'a' that begins with b'12x"):
        lm.likelihood([("a", b"12x45")])
    with pytest.raises(NumericalError, match="byte 3 of the text is nan"):
        lm.patch("12x45")
    assert lm.bits_per_byte("12345") > 0


def test_prepared_entropies_that_are_not_finite_are_named(tmp_path):
    (tmp_path / "x.txt").write_text("some text")
    scorer = fitted_ngram_scorer()
    model = FittedNgramConfig(max_order=3, num_contexts=len(scorer.keys))
    save_model(tmp_path / "s", ScorerLM(scorer), ModelDescription(model=model))
    options = PrepareOptions(scorer=tmp_path / "s", workers=1)
    prepare([str(tmp_path / "x.txt")], tmp_path / "d", options)
    dataset = Dataset(tmp_path / "d", "train")
    values = dataset.entropies(0, 0, 10).copy()
    values[4] = math.nan
    dataset.entropies = lambda document, begin, end: values[begin:end]
    with pytest.raises(NumericalError, match=r"byte 4 of document 0 of .*d is nan"):
        sample_dataset(dataset)
    units = PatchUnits(random_patched().patcher)
    span = Span(7, 20, dataset.ids(0, 0, 10), values[:9])
    with pytest.raises(NumericalError, match=r"byte 24 of document 7 is nan.*prepare the data"):
        units.segment(span)


def test_a_scorer_fitted_to_repeated_bytes_has_finite_entropies():
    # Every order divides the other bytes' probabilities by a million, until they round to zero.
    repeated = [codec.encode(b" " * 1_000_000)]
    scorer = fit_ngram_scorer(repeated, NgramConfig(max_order=9, min_count=1))
    assert scorer.values.isfinite().all()


# Likelihoods


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("model", [random_byte_lm, random_patched])
def test_likelihoods_name_label_and_byte(model, value, monkeypatch):
    nats = objective.position_nats

    def poisoned(lm, batch):
        return nats(lm, batch).masked_fill(batch.ids == codec.OFFSET + ord("!"), value)

    monkeypatch.setattr(objective, "position_nats", poisoned)
    # The second span of the second document.
    documents = [("a", b"x" * 5), ("b", b"x" * 30 + b"!" + b"x" * 8)]
    with pytest.raises(NumericalError, match=f"loss of byte 31 of a document of 'b' is {value}"):
        evaluate(model(), documents, context_bytes=20)
    assert math.isfinite(evaluate(model(), documents[:1], context_bytes=20)["a"].nats)


def test_a_held_out_loss_that_is_not_finite_stops_a_run(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_text("\n".join(f'{{"text": "some text {n}"}}' for n in range(99)))
    options = PrepareOptions(validation_share=0.3, workers=1)
    prepare([str(tmp_path / "x.jsonl")], tmp_path / "d", options)
    model = {"kind": "transformer", **TINY}
    recipe = parse(
        Recipe,
        {
            "model": model,
            "data": {"path": str(tmp_path / "d"), "row_bytes": 64, "rows_per_step": 2},
            "train": {"steps": 3, "validate_every": 2},
        },
        "test",
    )
    monkeypatch.setattr(
        objective, "position_nats", lambda lm, batch: torch.full(batch.ids.shape, math.nan)
    )
    message = "the held-out loss is no longer finite at step 2; none was saved yet. Start again"
    with pytest.raises(TrainingError, match=message):
        train(recipe, tmp_path / "r")
