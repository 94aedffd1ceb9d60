"""Documents of which only some bytes are trained on, from preparation to gradients."""

import io
import json
import math
from collections import Counter

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from builders import random_byte_lm, random_patched
from bytelm import codec
from bytelm.config import Recipe, parse
from bytelm.data import (
    IGNORED,
    OPEN_SPANS,
    Dataset,
    Loader,
    PrepareOptions,
    ReadOptions,
    prepare,
    read_manifest,
)
from bytelm.data.records import Document
from bytelm.display import show_data
from bytelm.likelihood import evaluate
from bytelm.patching import Patcher, SpaceRule
from bytelm.tokens import train_tokenizer
from bytelm.training import Trainer
from bytelm.units import ByteUnits, PatchUnits, Span, TokenUnits, trained_targets

PAIRS = [("Say one. ", "one"), ("Two? ", "two two"), ("", "only a response"), ("nothing", "")]
PAIRS += [(f"the number {n} please: ", "#" * (n % 7)) for n in range(30)]
UNITS = {
    "bytes": ByteUnits(),
    "patches": PatchUnits(Patcher(SpaceRule())),
    "tokens": TokenUnits(train_tokenizer([b"the number please say one two response " * 9], 285)),
}


@st.composite
def masked_documents(draw, max_size=60):
    data = draw(st.binary(min_size=1, max_size=max_size))
    ends = st.lists(st.integers(0, len(data)), max_size=6, unique=True)
    ends = sorted(draw(ends))
    ranges = tuple(zip(ends[0::2], ends[1::2], strict=False))
    if draw(st.booleans()):
        ranges = tuple((a, a) for a, _ in ranges)
    return Document(data, "x", None, ranges)


def wanted_targets(document):
    """Return the targets of all positions of a document, one at a time."""
    targets = []
    for at in range(len(document.data) + 1):
        if any(begin <= at < end for begin, end in document.ranges):
            targets.append(codec.OFFSET + document.data[at])
        elif any(at == end for _, end in document.ranges):
            targets.append(codec.EOS)
        else:
            targets.append(IGNORED)
    return targets


@given(masked_documents(), st.integers(0, 60), st.integers(1, 60))
def test_targets_of_a_span_are_those_of_the_document(document, begin, length):
    ids = codec.encode(document.data, eos=True)
    begin = min(begin, len(document.data))
    found = trained_targets(ids[begin : begin + length + 1], begin, document.ranges)
    assert found.tolist() == wanted_targets(document)[begin : begin + length]


@given(st.binary(max_size=40))
def test_a_range_over_the_whole_document_is_no_mask(data):
    ids = codec.encode(data, eos=True)
    assert trained_targets(ids, 0, ((0, len(data)),)).tolist() == ids[1:].tolist()


@given(masked_documents(), st.integers(1, 30))
def test_parts_of_a_document_are_trained_on_as_the_whole_is(document, size):
    parts = [document.part(begin, begin + size) for begin in range(0, len(document.data), size)]
    assert b"".join(part.data for part in parts) == document.data
    whole = [t for t in wanted_targets(document) if t >= codec.OFFSET]
    assert [t for part in parts for t in wanted_targets(part) if t >= codec.OFFSET] == whole
    # The end of each range is still to be predicted.
    ends = sum(len(part.ranges) for part in parts)
    assert ends >= len(document.ranges)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prompts with responses in ``d``; the same records with plain text beside them in ``both``."""
    folder = tmp_path_factory.mktemp("masks")
    lines = [json.dumps({"prompt": p, "response": r}) for p, r in PAIRS]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    (folder / "plain.txt").write_text("plain text, all of it")
    options = PrepareOptions(read=ReadOptions(field="prompt,response"), validation_share=0.0)
    prepare([str(folder / "pairs.jsonl")], folder / "d", options)
    prepare([str(folder / "plain.txt")], folder / "plain", PrepareOptions(validation_share=0.0))
    merged = [str(folder / "d"), str(folder / "plain")]
    prepare(merged, folder / "both", PrepareOptions(validation_share=0.0))
    return folder


def contents(path):
    dataset = Dataset(path, "train")
    return [(dataset.document(i), dataset.trained(i)) for i in range(len(dataset))]


def expected_pairs():
    return [((p + r).encode(), ((len(p), len(p + r)),) if p else None) for p, r in PAIRS]


def test_only_the_response_of_a_record_is_trained_on(folder):
    assert contents(folder / "d") == expected_pairs()
    (total,) = Dataset(folder / "d", "train").manifest.sources().values()
    assert total.trained_bytes == sum(len(r) for _, r in PAIRS)
    assert total.text_bytes == sum(len(p + r) for p, r in PAIRS)


def test_masks_are_kept_when_prepared_data_is_merged(folder):
    assert contents(folder / "both") == [*expected_pairs(), (b"plain text, all of it", None)]
    sources = Dataset(folder / "both", "train").manifest.sources()
    assert sources["pairs"].trained_bytes == sum(len(r) for _, r in PAIRS)
    assert sources["plain"].trained_bytes is None


def test_plain_data_is_stored_as_before(folder):
    with pa.memory_map(str(folder / "plain" / "train-00000.arrow")) as file:
        assert pa.ipc.open_file(file).schema.names == ["document", "source"]
    assert "trained" not in (folder / "plain" / "manifest.json").read_text()


def masked_loader(folder, units, **changes):
    dataset = Dataset(folder / "both", "train")
    options = {"row_bytes": 48, "row_units": 40, "rows_per_step": 3, "seed": 5}
    return Loader(dataset, units=UNITS[units], **{**options, **changes})


@pytest.mark.parametrize(
    ("units", "packing"), [*((units, "in-order") for units in UNITS), ("patches", "balanced")]
)
def test_rows_hold_prompts_with_their_whole_responses(folder, units, packing):
    loader = masked_loader(folder, units, rows_per_step=1, packing=packing)
    found, decode = Counter(), UNITS[units].decode
    # These may be cut, since all of each is trained on.
    plain = b"plain text, all of it, only a response"
    while loader.epochs < 4:
        batch = loader.next_batch()
        for number in range(int(batch.documents.max()) + 1):
            targets = batch.targets[batch.documents == number]
            chosen = targets[targets != IGNORED].tolist()
            text = b"".join(map(decode, chosen))
            assert int(batch.target_bytes[batch.documents == number].sum()) == len(text)
            # A part of the plain text may be its end alone.
            is_plain = text in plain if text else len(targets) == 1
            if not is_plain:
                assert chosen[-1] == codec.EOS
                assert batch.ids[batch.documents == number][0] == codec.BOS
                found[text] += 1
    for text, count in Counter(r.encode() for p, r in PAIRS if p).items():
        if text:
            # Some of what a balanced stream has drawn is still in progress.
            slack = OPEN_SPANS if packing == "balanced" else 0
            assert 3 * count - slack <= found[text] <= 4 * count + slack


@pytest.mark.parametrize("units", UNITS)
def test_a_loader_resumes_with_the_same_masks(folder, units):
    loader = masked_loader(folder, units)
    for _ in range(4):
        loader.next_batch()
    other = masked_loader(folder, units)
    other.restore(loader.state())
    for _ in range(4):
        mine, theirs = loader.next_batch(), other.next_batch()
        assert torch.equal(mine.targets, theirs.targets)
        assert torch.equal(mine.ids, theirs.ids)


@given(masked_documents(), st.integers(0, 60))
def test_no_token_extends_across_the_end_of_a_range(document, cut):
    units = UNITS["tokens"]
    ids = codec.encode(document.data, eos=True)
    targets = trained_targets(ids, 0, document.ranges)
    segment = units.segment(Span(0, 0, ids, None, targets), None, min(cut, len(targets)))
    assert segment.size == len(targets)
    starts = {*segment.begins.tolist(), segment.size}
    assert {end for one in document.ranges for end in one} <= starts
    wanted = wanted_targets(document)
    trained = [units.decode(t) for t in segment.targets.tolist() if t >= codec.OFFSET]
    assert b"".join(trained) == codec.decode([t for t in wanted if t >= codec.OFFSET])
    assert sum(segment.targets == codec.EOS) == wanted.count(codec.EOS)
    assert segment.target_bytes.sum() == sum(map(len, trained))
    read = b"".join(units.decode(t) for t in segment.ids[1:].tolist())
    assert document.data.startswith(read)


@given(st.binary(min_size=1, max_size=30), st.binary(min_size=1, max_size=30))
def test_prompts_are_tokenised_as_when_text_is_generated(prompt, response):
    units, data = UNITS["tokens"], prompt + response
    ids = codec.encode(data, eos=True)
    targets = trained_targets(ids, 0, ((len(prompt), len(data)),))
    segment = units.segment(Span(0, 0, ids, None, targets))
    alone = units.encode(codec.encode(prompt))
    assert segment.ids[: len(alone)].tolist() == alone.tolist()


def model_of(kind):
    return random_byte_lm(window=None) if kind == "bytes" else random_patched()


def loss(lm, document):
    """Return the mean negative log-likelihood of what is trained on, from the full logits."""
    ids = torch.from_numpy(codec.encode(document.data))
    log_probs = lm(ids[None])[0].log_softmax(-1)
    terms = [
        -log_probs[at, target]
        for at, target in enumerate(wanted_targets(document))
        if target != IGNORED
    ]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("kind", ["bytes", "patches"])
@settings(max_examples=20)
@given(document=masked_documents())
def test_bits_per_byte_are_those_of_the_trained_bytes(kind, document):
    lm = model_of(kind)
    found = evaluate(lm, [("a", document.data, document.trained)], context_bytes=128)["a"]
    ids = torch.from_numpy(codec.encode(document.data))
    log_probs = lm(ids[None])[0].detach().log_softmax(-1)
    nats = [
        -float(log_probs[at, target])
        for at, target in enumerate(wanted_targets(document))
        if target >= codec.OFFSET
    ]
    assert found.num_bytes == len(nats)
    assert found.nats == pytest.approx(sum(nats), rel=1e-4, abs=1e-4)
    assert found.num_positions == len(document.data) + 1


def trainer(path, kind, **changes):
    model = {"kind": "transformer", "dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 48}
    values = {
        "model": {**model, "window": None},
        "data": {"path": str(path), "row_bytes": 64, "rows_per_step": 4},
        "optimizer": {"learning_rate": 1e-3, "clip_norm": 1e9},
        "train": {"steps": 50, "device": "cpu", **changes},
    }
    return Trainer(parse(Recipe, values, "test"))


@pytest.mark.parametrize("micro_rows", [None, 1])
def test_loss_and_gradients_are_those_of_the_mask_applied_by_hand(folder, micro_rows):
    one = trainer(folder / "both", "bytes", micro_rows=micro_rows)
    twin = trainer(folder / "both", "bytes")
    pairs = dict(contents(folder / "both"))
    batch = twin.loader.next_batch()
    logits = twin.lm(**batch.inputs).log_softmax(-1)
    terms = []
    for row in range(len(batch.ids)):
        for number in range(int(batch.documents[row].max()) + 1):
            places = (batch.documents[row] == number).nonzero().flatten().tolist()
            data = codec.decode(batch.ids[row, places])
            targets = wanted_targets(Document(data, "", None, pairs[data]))
            wanted = [(at, t) for at, t in zip(places, targets, strict=True) if t != IGNORED]
            terms += [-logits[row, at, target] for at, target in wanted]
    by_hand = torch.stack(terms).mean()
    by_hand.backward()
    by_hand = by_hand.item()
    gradients = []
    one.optimizer.register_step_pre_hook(
        lambda *_: gradients.extend(p.grad.clone() for p in one.lm.trained.parameters())
    )
    one.step()
    assert one.report()["loss"] == pytest.approx(by_hand, rel=1e-5)
    for mine, theirs in zip(gradients, twin.lm.trained.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["bytes", "patches"])
@settings(max_examples=10)
@given(prompt=st.binary(max_size=20), response=st.binary(max_size=20), data=st.data())
def test_what_follows_the_last_range_changes_nothing(kind, prompt, response, data):
    lm = model_of(kind)
    text = prompt + response
    results = []
    for rest in data.draw(st.tuples(st.binary(max_size=20), st.binary(max_size=20))):
        lm.zero_grad()
        value = loss(lm, Document(text + rest, "", None, ((len(prompt), len(text)),)))
        value.backward()
        gradients = [p.grad for p in lm.trained.parameters() if p.grad is not None]
        results.append((value.detach(), [g.clone() for g in gradients]))
    (value, mine), (other, theirs) = results
    torch.testing.assert_close(value, other)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_steps_without_a_target_are_harmless(tmp_path):
    record = {"prompt": "a long prompt " * 100, "response": "yes"}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    options = PrepareOptions(read=ReadOptions(field="prompt,response"), validation_share=0.0)
    prepare([str(tmp_path / "a.jsonl")], tmp_path / "d", options)
    one = trainer(tmp_path / "d", "bytes")
    losses = []
    for _ in range(8):
        one.step()
        losses.append(one.report()["loss"])
    assert 0.0 in losses
    assert any(losses)
    assert all(map(math.isfinite, losses))
    assert all(bool(p.isfinite().all()) for p in one.lm.trained.parameters())


def test_validation_and_evaluation_measure_the_trained_bytes(folder):
    held_out = (str(folder / "pairs.jsonl"),)
    read = ReadOptions(field="prompt,response")
    out = folder / "validated"
    prepare([str(folder / "plain")], out, PrepareOptions(read=read, validation=held_out))
    one = trainer(out, "bytes")
    found = one.evaluate()["pairs"]
    documents = [("pairs", (p + r).encode(), ((len(p), len(p + r)),)) for p, r in PAIRS]
    expected = evaluate(one.lm, documents, context_bytes=64)["pairs"]
    assert found.num_bytes == expected.num_bytes == sum(len(r) for _, r in PAIRS)
    assert found.nats == pytest.approx(expected.nats, rel=1e-5)
    assert found.num_positions == sum(len(p + r) + 1 for p, r in PAIRS)


def test_info_shows_how_many_bytes_are_trained_on(folder):
    shown = {}
    for name in ("both", "plain"):
        console = Console(width=200, file=io.StringIO())
        show_data(console, folder / name, read_manifest(folder / name))
        shown[name] = console.file.getvalue()
    (line,) = [line for line in shown["both"].splitlines() if line.startswith("pairs")]
    assert line.split()[-1] == str(sum(len(r) for _, r in PAIRS))
    assert "trained on" in shown["both"]
    assert "trained on" not in shown["plain"]
