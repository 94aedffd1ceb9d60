"""Drafts that are verified: the bytes are those of decoding without, and the state is too."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import byte_strings, ids_of, lm_models, random_patched, some_by_default
from bytelm.inference import Engine, PagedMemory, PatchedState, Request, Sampling, generate, stream
from bytelm.inference.speculation import Draft, DraftLength, longest_draft
from bytelm.patching import EntropyRule, StaticRule

MODELS = {name: make for name, make in lm_models().items() if "transformer" not in name}
del MODELS["llama-like"]


@pytest.fixture(params=some_by_default(MODELS), scope="module")
def model(request):
    return MODELS[request.param]()


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    monkeypatch.setattr("bytelm.inference.pages.PAGE", 4)
    monkeypatch.setattr("bytelm.inference.engine.PAGE", 4)


def draft_always(monkeypatch, length):
    """Let drafts have a length, if the rings of a model allow it."""
    monkeypatch.setattr(DraftLength, "begin", lambda self: min(length, self.longest))


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=3e-5)


def test_a_draft_leaves_the_state_of_the_bytes_that_are_kept(model):
    """Whatever is drafted, and whatever part of it is kept, any number of times."""

    @given(
        st.booleans(),
        byte_strings,
        st.lists(st.tuples(st.binary(min_size=1, max_size=5), st.integers(1, 5)), max_size=5),
        st.binary(min_size=1, max_size=12),
    )
    def check(paged, document, drafts, rest):
        memory = PagedMemory(300) if paged else None
        state = model.new_state(2, memory=memory)
        document = ids_of(document)
        fed = [state.prefill(1, document)]
        for data, kept in drafts:
            data, kept = data[: longest_draft(state)], min(kept, len(data), longest_draft(state))
            draft = Draft(state, 1, len(data))
            for byte in data:
                draft.feed(byte + 4)
            predictions = draft.verify()
            fed.append(torch.stack([one.logits for one in predictions[:kept]]))
            draft.keep(kept)
            document = torch.cat((document, torch.tensor(list(data[:kept])) + 4))
        rest = torch.tensor(list(rest)) + 4
        fed += [state.decode(one, [1]) for one in rest[:6].split(1)]
        if len(rest) > 6:
            fed.append(state.prefill(1, rest[6:]))
        with torch.no_grad():
            assert_close(torch.cat(fed), model(torch.cat((document, rest))[None])[0])
        if paged:
            state.reset(1)
            assert memory.num_free == memory.num_pages

    check()


@pytest.mark.parametrize(("temperature", "length"), [(0.7, 3), (0.0, 5), (1.5, None)])
def test_requests_get_the_bytes_of_decoding_without_drafts(model, temperature, length, monkeypatch):
    if length is not None:
        draft_always(monkeypatch, length)
    engine = Engine(model, 2, max_document_bytes=100, speculate=True)
    for seed, prompt in enumerate([b"", b"\xff\x00\n" * 6]):
        sampling = Sampling(temperature=temperature, seed=seed)
        request = Request(prompt, 24, sampling, stop=[b"qz"], num_top=0)
        engine.submit(request)
        parts = []
        while not engine.is_idle:
            events = engine.step()
            assert all(event.error is None for event in events)
            parts += [event.part for event in events]
        expected = generate(model, prompt, max_bytes=24, sampling=sampling, stop=[b"qz"])
        assert b"".join(part.data for part in parts) == expected
        chosen = b"".join(choice.data for part in parts for choice in part.choices)
        assert chosen.startswith(expected)
    stats = engine.stats()
    assert 0 <= stats.num_accepted <= stats.num_drafted
    assert length is None or stats.num_drafted > 0
    engine.forget()
    assert engine.stats().pages_used == 0


def test_drafts_within_a_patch_are_always_accepted(monkeypatch):
    """Before a boundary, the decoder reads what it would read without a draft."""
    draft_always(monkeypatch, 4)
    model = random_patched(rule=EntropyRule(threshold=99.0))
    engine = Engine(model, 1, speculate=True)
    engine.submit(Request(b"one patch", 60, Sampling(seed=3)))
    while not engine.is_idle:
        engine.step()
    stats = engine.stats()
    assert stats.num_accepted == stats.num_drafted > 30
    assert stats.num_steps < 25
    # Each drafted byte, and one verification in each step.
    fed = stats.num_drafted + stats.num_steps
    assert stats.passes.encoder <= fed
    assert stats.passes.decoder == stats.passes.encoder + stats.passes.scorer
    assert stats.passes.global_model == 0


def test_passes_and_the_bytes_of_weights_that_they_read_are_counted():
    model = random_patched(rule=StaticRule(4))
    engine = Engine(model, 1)
    engine.submit(Request(b"abc", 41, Sampling(seed=3)))
    while not engine.is_idle:
        engine.step()
    stats = engine.stats()
    # The last byte is not fed; every fourth ends a patch.
    assert (stats.passes.encoder, stats.passes.decoder, stats.passes.scorer) == (40, 40, 0)
    assert stats.passes.global_model == 10
    sizes = [
        sum(p.numel() * 4 for name, p in part.named_parameters() if "embedding" not in name)
        for part in (model.blt.encoder, model.blt.global_model, model.blt.decoder)
    ]
    assert stats.bytes_moved == 40 * sizes[0] + 10 * sizes[1] + 40 * sizes[2]


def test_a_stream_may_be_speculated():
    model = random_patched()
    options = {"max_bytes": 30, "sampling": Sampling(seed=5), "stop": [b"zq"]}
    parts = list(stream(model, b"a text", speculate=True, **options))
    assert parts == list(stream(model, b"a text", **options))


def test_requests_beside_others_are_not_speculated(monkeypatch):
    draft_always(monkeypatch, 4)
    model = random_patched()
    engine = Engine(model, 2, speculate=True)
    first, second = (Request(bytes([65 + n]), 20, Sampling(seed=n)) for n in range(2))
    tickets = {engine.submit(first): first, engine.submit(second): second}
    found = dict.fromkeys(tickets, b"")
    while len([ticket for ticket in tickets if found[ticket] is not None]) == 2:
        for event in engine.step():
            found[event.ticket] += event.part.data
        if engine.is_idle:
            break
    for ticket, request in tickets.items():
        options = {"max_bytes": 20, "sampling": request.sampling}
        assert found[ticket] == generate(model, request.prompt, **options)


def test_only_rounds_that_began_are_timed(monkeypatch):
    """Not steps in which a prompt is read as well: they would make single bytes look slow."""
    begun = []
    monkeypatch.setattr(DraftLength, "begin", lambda self: begun.append(1) or 1)
    monkeypatch.setattr(DraftLength, "end", lambda *_: begun.pop())
    engine = Engine(random_patched(), 2, prefill_ids=8, speculate=True)
    engine.submit(Request(b"a", 40, Sampling(seed=5)))
    events = engine.step() + engine.step()
    engine.submit(Request(b"a prompt that is read in several steps", 3))
    while not engine.is_idle:
        events += engine.step()
    assert begun == []
    assert [event.error for event in events if event.error] == []


def test_a_memory_too_small_for_a_draft_is_enough_for_single_bytes(monkeypatch):
    draft_always(monkeypatch, 5)
    model = MODELS["every byte a patch"]()
    engine = Engine(model, 1, max_document_bytes=20, num_kept=1, speculate=True)
    engine.submit(Request(b"abcd", 16, Sampling(seed=1)))
    data = b""
    while not engine.is_idle:
        data += b"".join(event.part.data for event in engine.step())
    assert data == generate(model, b"abcd", max_bytes=16, sampling=Sampling(seed=1))


def test_an_exception_in_a_verification_ends_the_request(monkeypatch):
    draft_always(monkeypatch, 3)
    engine = Engine(random_patched(), 1, speculate=True)
    engine.submit(Request(b"abcd", 9))

    def read(*_):
        raise RuntimeError("a fault in the model")

    engine.step()
    monkeypatch.setattr(PatchedState, "read", read)
    events = engine.step()
    assert str(events[-1].error) == "a fault in the model"
    assert engine.is_idle


def rounds(lengths, acceptance, seconds, monkeypatch, count=400):
    """Lengths that are chosen if drafts are accepted with a probability and take some seconds."""
    now, found = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        length = lengths.begin()
        now[0] += seconds(length)
        accepted = 0
        while accepted < length - 1 and torch.rand((), generator=generator) < acceptance:
            accepted += 1
        lengths.end(length, length - 1, accepted)
        found.append(length)
    return found


@pytest.mark.parametrize(
    ("acceptance", "seconds", "low", "high"),
    [
        # Nothing is accepted, or a draft saves no time: decode without.
        (0.05, lambda k: 1.0 if k == 1 else 1.0 + 0.3 * k, 1, 1),
        (0.95, lambda k: 1.0 if k == 1 else 1.2 * k, 1, 1),
        # Verifying is most of the time, and almost all is accepted: draft far.
        (0.95, lambda k: 1.0 if k == 1 else 1.0 + 0.1 * k, 8, 16),
        (0.6, lambda k: 1.0 if k == 1 else 1.0 + 0.1 * k, 3, 6),
    ],
)
def test_the_length_follows_acceptance_and_times(acceptance, seconds, low, high, monkeypatch):
    found = rounds(DraftLength(16), acceptance, seconds, monkeypatch)[200:]
    assert sum(low <= length <= high for length in found) > 0.9 * len(found)


def test_drafts_are_no_longer_than_the_rings_allow():
    assert max(rounds_of(longest=3)) == 3
    assert set(rounds_of(longest=1)) == {1}


def rounds_of(longest):
    lengths = DraftLength(longest)
    found = []
    for _ in range(300):
        found.append(lengths.begin())
        lengths.end(found[-1], found[-1] - 1, found[-1] - 1)
    return found
