"""Weights as integers of 8 bits: what they compute, and the models that have them."""

import copy
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import bytelm
from builders import byte_strings, cut, ids_of, piece_sizes, random_byte_lm, random_patched
from bytelm import cpu
from bytelm.checkpoint import save_model
from bytelm.config import ModelDescription, TransformerConfig
from bytelm.cpu import int8
from bytelm.cpu.compiling import has_numba
from bytelm.errors import CheckpointError, ConfigError
from bytelm.inference import Engine, Request, Session, generate
from bytelm.patching import StaticRule

SMALL = {"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 48, "window": 8}
MAKERS = {
    "base": random_patched,
    "n-gram scorer": lambda: random_patched(ngram_scorer=True),
    "transformer": random_byte_lm,
    "biases": lambda: random_byte_lm(qkv_bias=True, ffn_bias=True, out_bias=True),
}


@pytest.fixture(autouse=True)
def small_matrices(monkeypatch):
    """Quantise the matrices of tiny models as well."""
    monkeypatch.setattr(int8, "MIN_SIZE", 1)


def quantised(model):
    model = copy.deepcopy(model).requires_grad_(False)
    cpu.quantize(model.trained)
    return model


@given(st.integers(1, 140), st.integers(1, 40), st.integers(1, 70), st.integers(0, 99))
def test_products_are_those_of_the_widened_matrix(outputs, inputs, rows, seed):
    torch.manual_seed(seed)
    linear = nn.Linear(inputs, outputs)
    layer, x = cpu.Int8Linear(linear), torch.randn(2, rows, inputs)
    matrix = layer.matrix.widen()
    expected = x @ matrix + linear.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    limit = linear.weight.abs().amax(1) / 127 / 2
    assert ((linear.weight.T - matrix).abs() <= limit * 1.001).all()


def test_a_row_does_not_depend_on_the_others():
    layer, x = cpu.Int8Linear(nn.Linear(96, 130)), torch.randn(11, 96)
    together = layer(x)
    for begin, end in ((0, 1), (3, 4), (2, 9), (5, 11)):
        assert torch.equal(layer(x[begin:end])[0], together[begin]) or end - begin > 1
    assert torch.equal(torch.cat([layer(x[n : n + 4]) for n in (0, 4)]), together[:8])


def test_outputs_of_zeros_stay_zeros():
    linear = nn.Linear(8, 3)
    nn.init.zeros_(linear.weight)
    assert torch.equal(cpu.Int8Linear(linear)(torch.randn(2, 8)), linear.bias.expand(2, 3))


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("fused", [False, True])
def test_sessions_equal_one_full_forward(name, fused):
    model = quantised(MAKERS[name]())
    session_model = cpu.fuse(copy.deepcopy(model)) if fused else model

    @given(byte_strings, piece_sizes)
    def check(document, sizes):
        ids = ids_of(document)
        session = Session(session_model)
        fed = torch.cat([session.feed(piece) for piece in cut(ids, sizes)])
        with torch.no_grad():
            expected = model(ids[None])[0]
        torch.testing.assert_close(fed, expected, rtol=1e-3, atol=1e-4)

    check()


def test_steps_of_single_bytes_run_fused(monkeypatch):
    model = cpu.fuse(quantised(random_patched(rule=StaticRule(100))))
    session = Session(model)
    session.feed(ids_of(b"a prompt"))

    def forward(*_):
        raise AssertionError("a layer was called")

    monkeypatch.setattr(cpu.Int8Linear, "forward", forward)
    assert session.feed(torch.tensor([70])).isfinite().all()


def test_an_engine_answers_as_a_session():
    model = cpu.fuse(quantised(random_patched()))
    engine, found = Engine(model, 3), {}
    requests = {engine.submit(Request(bytes([n]) * 3, 20)): bytes([n]) * 3 for n in range(65, 70)}
    while not engine.is_idle:
        for event in engine.step():
            found[event.ticket] = found.get(event.ticket, b"") + event.part.data
    assert found == {
        ticket: generate(model, prompt, max_bytes=20) for ticket, prompt in requests.items()
    }


def test_logits_change_little_and_entropies_do_not():
    model = random_patched()
    ids = ids_of(b"some text that is patched as before")
    with torch.no_grad():
        before, segmentation = model(ids[None]), model.segment(ids[None])
        other = quantised(model)
        after = other(ids[None])
    assert torch.equal(other.segment(ids[None]).entropies, segmentation.entropies)
    assert 0 < float((after - before).abs().max()) < 0.1 * float(before.std())


def test_embeddings_and_the_logits_layer_stay_as_they_are():
    model = quantised(random_patched())
    kinds = {name: type(module) for name, module in model.blt.named_modules()}
    assert kinds["decoder.output"] is nn.Linear
    assert kinds["encoder.embedding.ids"] is nn.Embedding
    assert kinds["global_model.blocks.0.attention.qkv"] is cpu.Int8Linear
    assert not any(kind is nn.Linear for kind in map(type, model.blt.global_model.modules()))


def test_a_checkpoint_is_loaded_quantised_and_not_saved_so(tmp_path):
    model = random_byte_lm()
    config = ModelDescription(model=TransformerConfig(**SMALL))
    save_model(tmp_path / "m", model, config)
    loaded = bytelm.load(tmp_path / "m", precision="int8")
    linears = [one for one in loaded.module.modules() if type(one) is cpu.Int8Linear]
    assert linears
    text = "what it predicts is nearly the same"
    expected = bytelm.load(tmp_path / "m").bits_per_byte(text)
    assert loaded.bits_per_byte(text) == pytest.approx(expected, abs=0.02)
    with pytest.raises(CheckpointError, match="load the model in another precision"):
        loaded.save(tmp_path / "n")
    assert not (tmp_path / "n").exists()


def test_a_model_with_arranged_weights_is_saved_as_it_was(tmp_path):
    config = ModelDescription(model=TransformerConfig(**SMALL))
    save_model(tmp_path / "m", random_byte_lm(), config)
    bytelm.load(tmp_path / "m").save(tmp_path / "n")
    one, other = (tmp_path / name / "model.safetensors" for name in "mn")
    assert one.read_bytes() == other.read_bytes()


def test_quantising_is_for_the_cpu():
    with pytest.raises(ConfigError, match="precision 'int8' is for the CPU"):
        cpu.quantize(random_byte_lm().to("meta"))


def test_numba_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    has_numba.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"pip install 'bytelm\[int8\]'"):
            cpu.quantize(random_byte_lm())
    finally:
        has_numba.cache_clear()


def test_arranging_weights_changes_no_value():
    linear = nn.Linear(8, 40)
    before = linear.weight.detach().clone()
    cpu.arrange(linear)
    assert linear.weight.stride() == (1, 40)
    assert torch.equal(linear.weight, before)
