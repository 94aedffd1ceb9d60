"""Requests that share an engine: each is answered as if it were alone, and nothing is lost."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import lm_models, random_byte_lm, random_patched, some_by_default
from bytelm.errors import ConfigError, NumericalError
from bytelm.inference import (
    Engine,
    Request,
    RequestTooLongError,
    Sampling,
    generate,
    stream,
)
from bytelm.inference.prefixes import MIN_SHARED, shared_length
from bytelm.inference.speculation import Draft, DraftLength
from bytelm.inference.states import PatchedState
from bytelm.patching import StaticRule

MODELS = lm_models()
STATIC = random_patched(rule=StaticRule(3))
EVERY_BYTE = MODELS["every byte a patch"]()
SHARED = b"You are a helpful assistant that answers in one sentence. "


@pytest.fixture(params=some_by_default(MODELS), scope="module")
def model(request):
    return MODELS[request.param]()


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    """Pages that even short documents have several of."""
    monkeypatch.setattr("bytelm.inference.pages.PAGE", 4)
    monkeypatch.setattr("bytelm.inference.engine.PAGE", 4)


def run(engine, requests=(), steps=10_000):
    """Submit requests, run the engine until it is idle, and return the parts of each."""
    parts = {engine.submit(request): [] for request in requests}
    while not engine.is_idle and steps:
        steps -= 1
        for ticket, part, error in engine.step():
            if error is not None:
                raise error
            parts.setdefault(ticket, []).append(part)
    assert steps, "the engine does not come to an end"
    return list(parts.values())


def alone(model, request):
    options = {"max_bytes": request.max_bytes, "sampling": request.sampling, "stop": request.stop}
    return generate(model, request.prompt, **options)


def data(parts):
    assert [part.finish is None for part in parts] == [True] * (len(parts) - 1) + [False]
    return b"".join(part.data for part in parts)


def assert_empty(engine):
    """Nothing is in use that is not kept for later."""
    assert engine.is_idle
    engine.forget()
    stats = engine.stats()
    assert (stats.num_waiting, stats.num_reading, stats.num_decoding) == (0, 0, 0)
    assert stats.pages_used == 0
    assert len(engine._prefixes._free) == engine._prefixes.state.num_slots


def some_requests():
    prompts = [b"", "é".encode(), SHARED + b"Who?", b"\xff\x00" * 9, SHARED + b"When?", SHARED]
    temperatures = [0.0, 1.2, 0.7, 2.0, 1.0, 0.0]
    return [
        Request(prompt, 12 + n, Sampling(temperature=one, seed=n), stop=[b"t", b"\x90"])
        for n, (prompt, one) in enumerate(zip(prompts * 2, temperatures * 2, strict=True))
    ]


def test_requests_get_the_bytes_they_would_get_alone(model):
    """With memory for one document, so that requests are preempted, and few slots to read in."""
    engine = Engine(model, 4, max_document_bytes=100, num_positions=104, num_kept=3, prefill_ids=9)
    requests = some_requests()
    found = [data(parts) for parts in run(engine, requests)]
    assert found == [alone(model, request) for request in requests]
    assert_empty(engine)


# What happens between two steps: (what, number).
happenings = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(0, 10_000)),
        st.tuples(st.just("cancel"), st.integers(0, 10_000)),
        st.tuples(st.just("step"), st.integers(1, 6)),
    ),
    max_size=30,
)


def request_of(number):
    rng = random.Random(number)
    shared = SHARED[: rng.choice([0, 0, 40, len(SHARED)])]
    prompt = shared + rng.randbytes(rng.randrange(20))
    sampling = Sampling(temperature=rng.choice([0.0, 1.0]), seed=number)
    return Request(prompt, rng.randrange(20), sampling, client=str(number % 3))


@given(happenings, st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 7, 256]))
def test_requests_may_join_and_leave_at_any_byte(history, num_slots, num_kept, prefill_ids):
    engine = Engine(
        EVERY_BYTE,
        num_slots,
        max_document_bytes=100,
        num_positions=150,
        num_kept=num_kept,
        prefill_ids=prefill_ids,
    )
    requests, found = {}, {}

    def step():
        for ticket, part, error in engine.step():
            assert error is None
            assert ticket in requests
            found.setdefault(ticket, []).append(part)

    for what, number in history:
        if what == "submit":
            request = request_of(number)
            requests[engine.submit(request)] = request
        elif what == "step":
            for _ in range(number):
                step()
        elif requests:
            ticket = sorted(requests)[number % len(requests)]
            engine.cancel(ticket)
            if not found.get(ticket) or found[ticket][-1].finish is None:
                del requests[ticket]
                found.pop(ticket, None)
    while not engine.is_idle:
        step()
    assert set(found) == set(requests)
    for ticket, request in requests.items():
        assert data(found[ticket]) == alone(EVERY_BYTE, request)
    assert_empty(engine)


def test_a_full_memory_preempts_the_newest_and_all_come_to_an_end():
    engine = Engine(EVERY_BYTE, 4, max_document_bytes=60, num_positions=100)
    requests = [Request(bytes([65 + n] * 10), 45, Sampling(seed=n)) for n in range(6)]
    assert [data(parts) for parts in run(engine, requests)] == [
        alone(EVERY_BYTE, request) for request in requests
    ]
    assert engine.stats().num_preempted > 0
    assert_empty(engine)


def test_nothing_leaks_over_many_requests():
    engine, rng = Engine(STATIC, 4, max_document_bytes=100, num_positions=300), random.Random(1)
    for number in range(120):
        ticket = engine.submit(request_of(number))
        for _ in range(rng.randrange(4)):
            engine.step()
        if rng.random() < 0.3:
            engine.cancel(ticket)
    run(engine)
    assert_empty(engine)
    assert not engine._queue._jobs


@pytest.mark.slow
def test_nothing_leaks_over_ten_thousand_requests():
    """With memory for a few less than come at times, and a model smaller than what is tested."""
    model = random_byte_lm(dim=16, num_layers=1, window=None)
    engine, rng = Engine(model, 16, max_document_bytes=100, num_positions=400), random.Random(1)
    for number in range(10_000):
        ticket = engine.submit(request_of(number))
        if rng.random() < 0.7:
            engine.step()
        if rng.random() < 0.3:
            engine.cancel(ticket)
    assert engine.stats().num_preempted > 100
    run(engine)
    assert_empty(engine)


def test_a_prompt_that_begins_like_another_does_not_pay_for_it_again():
    engine = Engine(STATIC, 2)

    def ids_read(prompt):
        before = engine.stats().ids_read
        (parts,) = run(engine, [Request(prompt, 5)])
        assert data(parts) == generate(STATIC, prompt, max_bytes=5)
        return engine.stats().ids_read - before

    first = SHARED + b"Who are you?"
    assert ids_read(first) == len(first) + 1
    assert ids_read(first) == 0
    assert ids_read(first + b" And you?") == len(b" And you?")
    # Where prompts part is known from the second, so the third is the first to gain.
    other = SHARED + b"What is it?"
    assert ids_read(other) == len(other) + 1
    assert ids_read(SHARED + b"Where?") == len(b"ere?")
    # The next message of a conversation: the last byte of the reply was not fed.
    reply = generate(STATIC, first, max_bytes=5)
    assert ids_read(first + reply + b" Oh.") == len(b"x Oh.")


def test_prompts_that_come_together_are_read_once():
    engine = Engine(STATIC, 8, prefill_ids=16)
    prompts = [SHARED + bytes([n]) for n in range(97, 102)] + [SHARED + b"zz"] * 3
    requests = [Request(prompt, 4, Sampling(seed=n)) for n, prompt in enumerate(prompts)]
    assert [data(parts) for parts in run(engine, requests)] == [
        alone(STATIC, request) for request in requests
    ]
    assert engine.stats().ids_read == len(SHARED) + 1 + 5 + len(b"zz")


def test_a_long_prompt_does_not_stall_the_others(monkeypatch):
    engine, longest = Engine(STATIC, 4, prefill_ids=32), []
    inner = PatchedState.prefill

    def watched(state, slot, ids):
        longest.append(len(ids))
        return inner(state, slot, ids)

    monkeypatch.setattr(PatchedState, "prefill", watched)
    first = engine.submit(Request(b"first", 200))
    engine.step()
    engine.submit(Request(bytes(range(256)) * 8, 5))
    short = engine.submit(Request(b"short", 5))
    assert [event.ticket for event in engine.step()].count(first) == 1
    engine.step()
    longest.clear()
    events = engine.step()
    assert longest == [32] or sum(longest) <= 32
    assert {event.ticket for event in events} >= {first, short}


def test_the_first_byte_of_a_short_prompt_comes_in_the_step_that_admits_it():
    engine = Engine(STATIC, 4)
    for n in range(3):
        engine.submit(Request(bytes([65 + n]), 50))
    engine.step()
    ticket = engine.submit(Request(b"short", 50))
    assert [event.ticket for event in engine.step()].count(ticket) == 2


def test_requests_that_can_never_fit_are_refused_at_once():
    engine = Engine(STATIC, 2, max_document_bytes=50)
    with pytest.raises(RequestTooLongError, match="40 bytes and 11 more are over the limit of 50"):
        engine.submit(Request(b"x" * 40, 11))
    with pytest.raises(ConfigError, match="max_bytes must be at least 0, not -1"):
        engine.submit(Request(b"x", -1))
    with pytest.raises(ConfigError, match="stop string must not be empty"):
        engine.submit(Request(b"x", 1, stop=[b""]))
    assert engine.is_idle
    (parts,) = run(engine, [Request(b"x" * 40, 10)])
    assert data(parts) == generate(STATIC, b"x" * 40, max_bytes=10)


@pytest.mark.parametrize("name", ["num_slots", "num_kept", "prefill_ids", "max_document_bytes"])
def test_numbers_that_are_too_small_are_named(name):
    with pytest.raises(ConfigError, match=f"{name} must be at least 1, not 0"):
        Engine(STATIC, **{name: 0})


def test_memory_that_no_document_fits_into_is_refused():
    with pytest.raises(ConfigError, match="no room for a document of 100 bytes: use at least 104"):
        Engine(STATIC, max_document_bytes=100, num_positions=103)


@pytest.mark.parametrize("method", ["prefill", "decode"])
def test_an_exception_in_a_step_ends_only_its_requests(method, monkeypatch):
    engine, inner = Engine(STATIC, 4), getattr(PatchedState, method)
    requests = [Request(bytes([65 + n]), 6) for n in range(3)]
    tickets = [engine.submit(request) for request in requests]
    found = {ticket: [] for ticket in tickets}
    fail = [True]

    def failing(state, *arguments):
        if fail.pop() if fail else False:
            raise RuntimeError("a fault in the model")
        return inner(state, *arguments)

    monkeypatch.setattr(PatchedState, method, failing)
    while not engine.is_idle:
        for event in engine.step():
            found[event.ticket].append(event)
    failed = [events for events in found.values() if events[-1].error]
    assert len(failed) == (1 if method == "prefill" else 3)
    assert all(str(events[-1].error) == "a fault in the model" for events in failed)
    for request in requests:
        (parts,) = run(engine, [request])
        assert data(parts) == alone(STATIC, request)
    assert_empty(engine)


def test_logits_that_are_not_finite_end_one_request(monkeypatch):
    engine, inner = Engine(STATIC, 4), PatchedState.decode

    def damaged(state, ids, slots=None):
        logits = inner(state, ids, slots).clone()
        logits[1] = torch.nan
        return logits

    tickets = [engine.submit(Request(bytes([65 + n]), 6)) for n in range(3)]
    monkeypatch.setattr(PatchedState, "decode", damaged)
    events = engine.step()
    monkeypatch.setattr(PatchedState, "decode", inner)
    while not engine.is_idle:
        events += engine.step()
    (error,) = [event for event in events if event.error]
    assert isinstance(error.error, NumericalError)
    assert error.ticket == tickets[1]
    for ticket in (tickets[0], tickets[2]):
        parts = [event.part for event in events if event.ticket == ticket]
        assert data(parts) == generate(STATIC, bytes([65 + ticket]), max_bytes=6)


@pytest.mark.parametrize("what", ["logits", "verification"])
def test_what_a_failed_request_leaves_is_not_continued(what, monkeypatch):
    """An exception may come when more, or other, bytes were fed than were chosen."""
    model = random_patched(rule=StaticRule(3))
    engine = Engine(model, 2, speculate=what == "verification")
    monkeypatch.setattr(DraftLength, "begin", lambda self: 4)
    request = Request(SHARED, 30, Sampling(seed=1))
    engine.submit(request)
    events = engine.step() + engine.step()
    text = b"".join(event.part.data for event in events)
    inner = PatchedState.decode if what == "logits" else Draft.keep

    def damaged(state, ids, slots=None):
        return inner(state, ids, slots) * torch.nan

    def failing(draft, count):
        raise RuntimeError("a fault in the model")

    if what == "logits":
        monkeypatch.setattr(PatchedState, "decode", damaged)
    else:
        monkeypatch.setattr(Draft, "keep", failing)
    events = engine.step()
    assert events[-1].error is not None
    text += b"".join(event.part.data for event in events if event.part)
    owner, name = (PatchedState, "decode") if what == "logits" else (Draft, "keep")
    monkeypatch.setattr(owner, name, inner)
    # All beginnings: the longest one that is kept is taken, whatever its length.
    for length in range(len(SHARED + text), len(SHARED), -1):
        again = Request((SHARED + text)[:length] + b"?", 12, Sampling(seed=2))
        (parts,) = run(engine, [again])
        assert data(parts) == alone(model, again)
    assert_empty(engine)


@pytest.mark.parametrize("name", ["base", "stateful rule", "n-gram scorer", "static"])
def test_choices_describe_what_was_sampled(name):
    model = MODELS[name]()
    request = Request(b"some text", 12, Sampling(seed=4), num_top=3)
    (parts,) = run(Engine(model, 2), [request])
    choices = [choice for part in parts for choice in part.choices]
    text = data(parts)
    ids = torch.tensor([1, *(byte + 4 for byte in b"some text" + text)])
    with torch.no_grad():
        log_probs = model(ids[None])[0].double()
        log_probs[:, [0, 1, 3]] = -torch.inf
        log_probs = log_probs.log_softmax(-1)
        segmentation = model.segment(ids[None])
    assert b"".join(choice.data for choice in choices) == text
    starts = segmentation.patches.decoder_ids[0].diff().bool().tolist()
    for at, choice in enumerate(choices, 9):
        if choice.data:
            expected = float(log_probs[at, choice.data[0] + 4])
            assert choice.log_prob == pytest.approx(expected, abs=1e-4)
        top = log_probs[at].topk(3)
        assert [p for _, p in choice.top] == pytest.approx(top.values.tolist(), abs=1e-4)
        if segmentation.entropies is None:
            assert choice.entropy is None
        else:
            assert choice.entropy == pytest.approx(float(segmentation.entropies[0, at]), abs=1e-4)
        if at < len(starts):
            assert choice.begins_patch == starts[at - 1]


def test_choices_are_not_reported_unless_asked_for():
    (parts,) = run(Engine(random_byte_lm(), 2), [Request(b"a", 5)])
    assert all(part.choices == () for part in parts)
    (parts,) = run(Engine(random_byte_lm(), 2), [Request(b"a", 5, num_top=0)])
    assert [choice.top for part in parts for choice in part.choices] == [()] * 5
    assert all(c.entropy is None and c.begins_patch is None for p in parts for c in p.choices)


def test_clients_take_turns():
    engine = Engine(STATIC, 1)
    many = [engine.submit(Request(bytes([65 + n]), 3, client="many")) for n in range(5)]
    few = engine.submit(Request(b"z", 3, client="few"))
    order = []
    while not engine.is_idle:
        order += [event.ticket for event in engine.step() if event.part.finish]
    assert order == [many[0], few, *many[1:]]


def test_parts_come_as_in_a_stream():
    request = Request(b"the end", 30, Sampling(seed=2), stop=[b"ab", b"\x01"])
    (parts,) = run(Engine(STATIC, 3), [request])
    assert parts == list(
        stream(STATIC, b"the end", max_bytes=30, sampling=request.sampling, stop=request.stop)
    )


def test_unknown_and_ended_tickets_are_ignored():
    engine = Engine(STATIC, 1)
    run(engine, [Request(b"a", 3)])
    engine.cancel(0)
    engine.cancel(77)
    assert engine.is_idle


@given(st.binary(max_size=8), st.binary(max_size=8))
def test_shared_lengths(a, b):
    one, other = (np.frombuffer(x, np.uint8).astype(np.int64) for x in (a, b))
    length = shared_length(one, other)
    assert a[:length] == b[:length]
    assert length == min(len(a), len(b)) or a[length] != b[length]


def test_common_beginnings_in_these_tests_are_long_enough():
    assert len(SHARED) > MIN_SHARED
