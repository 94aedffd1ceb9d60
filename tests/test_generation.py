import copy
import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from builders import (
    BLT_VARIANTS,
    NGRAMS,
    byte_strings,
    cut,
    ids_of,
    piece_sizes,
    random_patched,
    random_transformer,
)
from bytelm import codec
from bytelm.errors import ConfigError
from bytelm.generation import (
    PatchedSession,
    Sampler,
    Sampling,
    continue_from,
    generate,
    reference_generate,
    start_session,
)
from bytelm.generation import session as generation_session
from bytelm.generation.sampling import filtered_probabilities
from bytelm.kernels import projections, segments
from bytelm.model import graphs as model_graphs
from bytelm.model import stream as model_stream
from bytelm.patching import EntropyRule, SpaceRule, StaticRule

MODELS = {
    **{name: (lambda name=name: random_patched(name)) for name in BLT_VARIANTS},
    "space": lambda: random_patched(rule=SpaceRule()),
    "static": lambda: random_patched(rule=StaticRule(3)),
    "monotonic": lambda: random_patched(rule=EntropyRule(increase=0.05)),
    "combined": lambda: random_patched(rule=EntropyRule(threshold=4.0, increase=0.01)),
    "one patch after another": lambda: random_patched(rule=EntropyRule(threshold=-1.0)),
    "never a boundary": lambda: random_patched(rule=EntropyRule(threshold=99.0)),
    "capped": lambda: random_patched(max_length=3),
    "reset": lambda: random_patched(reset=True, scorer_ngrams=NGRAMS),
    "transformer": random_transformer,
    "transformer with n-grams": lambda: random_transformer(window=None, ngrams=NGRAMS),
}


@pytest.fixture(params=MODELS, scope="module")
def model(request):
    return MODELS[request.param]()


def traced_once(graph, numbers):
    """In place of the capture on CUDA: the operators of one call, on whatever its buffers hold.

    Like the capture it fails at a number that is read by the host, and fixes every other choice.
    """
    graph._function(numbers)
    operators = make_fx(graph._function)(numbers)
    return lambda: operators(numbers)


@pytest.fixture
def single_bytes(request, monkeypatch):
    """How a session takes a single byte: in steps, or as on CUDA, but for the capture."""
    if request.param == "traced graphs":
        monkeypatch.setattr(model_graphs._Graph, "_capture", traced_once)
        for kernel_module in (projections, segments):
            monkeypatch.setattr(kernel_module, "is_eager_cpu", lambda _: False)
    if request.param != "steps":
        for module in (model_stream, generation_session):
            monkeypatch.setattr(module, "can_step", lambda _: False)
            monkeypatch.setattr(module, "can_capture", lambda _: True)
        monkeypatch.setattr(model_graphs, "PATCH_BYTES", 4)


@pytest.mark.parametrize("single_bytes", ["steps", "graphs"], indirect=True)
def test_a_session_fed_in_any_pieces_equals_one_full_forward(model, single_bytes):
    # Pieces of one byte have a path of their own: also many of them, among others.
    @given(byte_strings, piece_sizes | st.lists(st.sampled_from([0, 1, 1, 1, 4]), max_size=40))
    def check(document, sizes):
        ids = ids_of(document)
        session = start_session(model)
        fed = torch.cat([session.feed(piece) for piece in cut(ids, sizes)])
        with torch.no_grad():
            torch.testing.assert_close(fed, model(ids[None])[0], rtol=1e-4, atol=2e-5)

    check()


@pytest.mark.parametrize("single_bytes", ["steps", "traced graphs"], indirect=True)
def test_feeding_byte_by_byte_equals_one_full_forward(model, single_bytes):
    # More bytes, and with some rules more patches, than the first buffer of a cache holds.
    ids = ids_of(b"one byte at a time,\nfar beyond every window; " * 2)
    session = start_session(model)
    fed = torch.cat([session.feed(piece) for piece in ids.split(1)])
    with torch.no_grad():
        torch.testing.assert_close(fed, model(ids[None])[0], rtol=1e-4, atol=2e-5)


@pytest.mark.gpu
def test_captured_graphs_equal_one_full_forward(model):
    on_device = copy.deepcopy(model).cuda()
    ids = ids_of(b"one byte at a time,\nfar beyond every window; " * 3)
    session = start_session(on_device)
    pieces = [ids[:5], *ids[5:70].split(1), ids[70:80], *ids[80:].split(1)]
    fed = torch.cat([session.feed(piece.cuda()) for piece in pieces]).cpu()
    with torch.no_grad():
        torch.testing.assert_close(fed, model(ids[None])[0], rtol=1e-3, atol=1e-4)


def test_a_session_runs_under_autocast(model):
    ids = ids_of(b"a few bytes")
    with torch.autocast("cpu", torch.bfloat16):
        session = start_session(model)
        fed = torch.cat([session.feed(piece) for piece in ids.split(1)])
    assert fed.isfinite().all()


def test_the_global_transformer_runs_once_per_patch():
    model, ids = random_patched(), ids_of(b"the global model runs once per patch, never per byte")
    calls = []
    read_latents = model.blt.decoder.read_latents
    model.blt.decoder.read_latents = lambda x: calls.append(x.shape[1]) or read_latents(x)
    session = PatchedSession(model)
    latents = model.segment(ids[None]).patches.decoder_ids[0]
    for piece, latent in zip(ids.split(1), latents, strict=True):
        session.feed(piece)
        assert (
            sum(calls) == session._caches.global_model.position == latent + 1
        )  # the global model has seen what is complete, no more
    assert calls == [1] * len(calls)
    assert 1 < len(calls) < len(ids)


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling(top_p=0.9, seed=7)])
def test_generation_equals_a_full_forward_per_byte(model, sampling):
    prompt = "Daenerys Targaryén".encode()
    expected = reference_generate(model, prompt, max_bytes=40, sampling=sampling)
    assert generate(model, prompt, max_bytes=40, sampling=sampling) == expected
    assert expected


def test_seeds_reproduce_and_differ():
    model = random_patched()

    def sample(seed):
        return generate(model, b"x", max_bytes=30, sampling=Sampling(temperature=2.0, seed=seed))

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


class ScriptedSession:
    """A session whose greedy continuation is a given text."""

    def __init__(self, script: bytes) -> None:
        self.ids = iter(codec.encode(script, bos=False, eos=True).tolist())

    def feed(self, ids):
        logits = torch.zeros(len(ids), codec.VOCAB_SIZE)
        logits[-1, next(self.ids)] = 1.0
        return logits


def run(script, **options):
    return list(continue_from(ScriptedSession(script), ids_of(b""), **options))


def test_stop_strings_end_generation_and_are_never_shown():
    pieces = run(b"say stand, stop.", max_bytes=50, stop=[b"stop", b"zz"])
    assert b"".join(p.data for p in pieces) == b"say stand, "
    assert pieces[-1].finish == "stop"


@given(st.text("ab", min_size=1, max_size=25), st.lists(st.text("ab", min_size=1, max_size=4)))
def test_streaming_with_stop_strings_equals_searching_the_whole(script, stops):
    data, stop = script.encode(), [s.encode() for s in stops]
    pieces = run(data, max_bytes=100, stop=stop)
    # Generation ends at the first byte that completes a stop string.
    ends = [i for i in range(len(data) + 1) if any(data[:i].endswith(s) for s in stop)]
    seen = data[: ends[0]] if ends else data
    begins = [seen.find(s) for s in stop if s in seen]
    assert b"".join(p.data for p in pieces) == seen[: min(begins, default=len(seen))]
    assert pieces[-1].finish == ("stop" if ends else "end")


def test_a_piece_is_held_back_only_while_it_may_begin_a_stop_string():
    pieces = run(b"ab<en<end>", max_bytes=50, stop=[b"<end>"])
    assert [p.data for p in pieces] == [b"a", b"b", b"<en", b""]


def test_generation_ends_with_the_document_or_the_length():
    pieces = run(b"done", max_bytes=50)
    assert (b"".join(p.data for p in pieces), pieces[-1].finish) == (b"done", "end")
    pieces = run(b"done", max_bytes=2)
    assert (b"".join(p.data for p in pieces), pieces[-1].finish) == (b"do", "length")


def test_special_ids_other_than_the_end_are_never_chosen():
    logits = torch.full((codec.VOCAB_SIZE,), -10.0)
    logits[[codec.BOE, codec.BOS, codec.BPE]] = 10.0
    logits[codec.EOS] = 5.0
    assert Sampler(Sampling(temperature=0.0)).choose(logits) == codec.EOS
    assert Sampler(Sampling()).choose(logits) == codec.EOS


def test_filters_keep_what_they_say():
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1]))

    def kept(**options):
        return filtered_probabilities(logits, Sampling(**options)).tolist()

    def approx(values):
        return pytest.approx(values, abs=1e-6)

    assert kept() == approx([0.4, 0.3, 0.2, 0.1])
    assert kept(top_k=2) == approx([4 / 7, 3 / 7, 0, 0])
    assert kept(top_p=0.6) == approx([4 / 7, 3 / 7, 0, 0])
    assert kept(top_p=0.05) == approx([1, 0, 0, 0])
    assert kept(min_p=0.45) == approx([4 / 9, 3 / 9, 2 / 9, 0])
    assert kept(temperature=0.5) == approx([16 / 30, 9 / 30, 4 / 30, 1 / 30])
    assert kept(top_k=3, top_p=0.5) == approx([4 / 7, 3 / 7, 0, 0])


@pytest.mark.parametrize(
    ("option", "value"),
    [("temperature", -1.0), ("top_k", 0), ("top_p", 0.0), ("top_p", 1.5), ("min_p", -0.1)],
)
def test_bad_options_are_named(option, value):
    with pytest.raises(ConfigError, match=f"{option}.*{value}"):
        dataclasses.replace(Sampling(), **{option: value})


def test_bad_requests_are_named():
    with pytest.raises(ConfigError, match="max_bytes must be at least 0, not -1"):
        generate(random_transformer(), b"", max_bytes=-1)
    with pytest.raises(ConfigError, match="stop string must not be empty"):
        generate(random_transformer(), b"", max_bytes=1, stop=[b""])


@given(byte_strings)
def test_any_bytes_are_a_legal_prompt(prompt):
    model = random_transformer()
    assert len(generate(model, prompt, max_bytes=1, sampling=Sampling())) <= 1
