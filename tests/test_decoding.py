"""Sampling, and what is yielded of what is sampled."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import (
    byte_strings,
    ids_of,
    lm_models,
    random_byte_lm,
    random_patched,
    some_by_default,
)
from bytelm import codec
from bytelm.errors import ConfigError
from bytelm.inference import (
    PatchedState,
    Sampler,
    Sampling,
    continue_from,
    generate,
    reference_generate,
    stream,
    stream_many,
)
from bytelm.inference.sampling import Noise, filtered_probabilities
from bytelm.patching import StaticRule

MODELS = lm_models()
STATIC = random_patched(rule=StaticRule(3))


@pytest.fixture(params=some_by_default(MODELS), scope="module")
def model(request):
    return MODELS[request.param]()


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling(top_p=0.9, seed=7)])
def test_generation_equals_a_full_forward_per_byte(model, sampling):
    prompt = "Daenerys Targaryén".encode()
    expected = reference_generate(model, prompt, max_bytes=40, sampling=sampling)
    assert generate(model, prompt, max_bytes=40, sampling=sampling) == expected
    assert expected


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_seeds_that_are_not_of_64_bits_are_refused(seed):
    with pytest.raises(ConfigError, match=f"an integer of 64 bits, not {seed}"):
        Sampling(seed=seed)
    for good in (2**64 - 1, -(2**63)):
        Sampler(Sampling(seed=good)).choose(torch.zeros(260), 0)


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
    assert Sampler(Sampling(temperature=0.0)).choose(logits, 0) == codec.EOS
    assert Sampler(Sampling()).choose(logits, 0) == codec.EOS


def test_ids_are_sampled_as_often_as_they_are_probable():
    logits = torch.full((codec.VOCAB_SIZE,), -torch.inf)
    expected = {50: 0.5, 100: 0.3, 259: 0.2}
    for index, probability in expected.items():
        logits[index] = np.log(probability)
    sampler, count = Sampler(Sampling(seed=3)), 4000
    chosen = [sampler.choose(logits, position) for position in range(count)]
    for index, probability in expected.items():
        deviation = (probability * (1 - probability) / count) ** 0.5
        assert chosen.count(index) / count == pytest.approx(probability, abs=5 * deviation)


@given(st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**40))
def test_noise_depends_on_the_seed_and_the_position_only(seed, position):
    noise = Noise(seed)
    first, later = noise.at(position, 260), noise.at(position + 1, 260)
    for other in (noise, Noise(seed)):
        assert np.array_equal(other.at(position, 260), first)
    for other in (Noise(seed ^ 1).at(position, 260), later):
        assert not np.isin(other, first).any()


def test_filters_keep_what_they_say():
    logits = np.log([0.4, 0.3, 0.2, 0.1])

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
        generate(random_byte_lm(), b"", max_bytes=-1)
    with pytest.raises(ConfigError, match="stop string must not be empty"):
        generate(random_byte_lm(), b"", max_bytes=1, stop=[b""])


@given(byte_strings)
def test_any_bytes_are_a_legal_prompt(prompt):
    model = random_byte_lm()
    assert len(generate(model, prompt, max_bytes=1, sampling=Sampling())) <= 1


PROMPTS = [b"", "é".encode(), b"the cat sat", b"\xff\x00" * 9, b"x" * 40, b"and so on"]


def test_prompts_together_continue_as_each_alone(model):
    # Some end early, at a stop string; the others end together.
    temperatures = [0.0, 1.2, 0.7, 2.0, 1.0, 0.0]
    samplings = [Sampling(temperature=one, seed=n) for n, one in enumerate(temperatures)]
    options = {"max_bytes": 16, "stop": [b"t", b"\x90"]}
    alone = [
        list(stream(model, prompt, sampling=one, **options))
        for prompt, one in zip(PROMPTS, samplings, strict=True)
    ]
    together = [[] for _ in PROMPTS]
    for index, part in stream_many(model, PROMPTS, sampling=samplings, num_slots=4, **options):
        together[index].append(part)
    assert together == alone


@given(
    st.lists(st.binary(max_size=12), max_size=7),
    st.integers(1, 5),
    st.integers(0, 12),
    st.integers(0, 99),
)
def test_any_number_of_prompts_in_any_number_of_slots(prompts, num_slots, max_bytes, seed):
    model = STATIC
    temperature = (0.0, 3.0)[seed % 2]
    options = {"max_bytes": max_bytes, "sampling": Sampling(temperature=temperature, seed=seed)}
    found = [b""] * len(prompts)
    finishes = [None] * len(prompts)
    for index, part in stream_many(model, prompts, num_slots=num_slots, **options):
        assert finishes[index] is None
        found[index], finishes[index] = found[index] + part.data, part.finish
    assert found == [generate(model, prompt, **options) for prompt in prompts]
    assert None not in finishes


def test_prompts_share_each_step_and_ended_ones_leave(monkeypatch):
    model, sizes = random_patched(rule=StaticRule(4)), []
    inner = PatchedState.decode

    def counted(state, ids, slots=None):
        sizes.append(len(ids))
        return inner(state, ids, slots)

    monkeypatch.setattr(PatchedState, "decode", counted)
    ends = iter([2, 4, 4, 9])
    monkeypatch.setattr(Sampler, "choose", lambda sampler, *_: choose_until(sampler, ends))
    parts = list(stream_many(model, [b"a", b"b", b"c", b"d"], max_bytes=50, num_slots=4))
    assert [(i, p.finish) for i, p in parts if p.finish] == [(n, "end") for n in range(4)]
    # Four prompts, of which one and then two more end; the last one goes on alone.
    assert sizes == [4, 4, 3, 3, 1, 1, 1, 1, 1]


def choose_until(sampler, ends):
    """Choose a byte, or the end of the document after as many as the sampler's turn says."""
    if not hasattr(sampler, "left"):
        sampler.left = next(ends)
    sampler.left -= 1
    return codec.EOS if sampler.left < 0 else codec.OFFSET + 65


def test_options_of_many_prompts_are_checked_at_once():
    model = random_byte_lm()
    with pytest.raises(ConfigError, match="1 samplings were given for 2 prompts"):
        stream_many(model, [b"a", b"b"], max_bytes=3, sampling=[Sampling()])
    with pytest.raises(ConfigError, match="num_slots must be at least 1, not 0"):
        stream_many(model, [b"a"], max_bytes=3, num_slots=0)
    with pytest.raises(ConfigError, match="max_bytes"):
        stream_many(model, [b"a"], max_bytes=-1)
    with pytest.raises(ConfigError, match="stop string"):
        stream_many(model, [b"a"], max_bytes=1, stop=[b""])
