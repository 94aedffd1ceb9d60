import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import random_byte_lm
from bytelm import codec
from bytelm.checkpoint import fingerprint, load_scorer, save_model
from bytelm.config import EntropyPatching, ModelDescription, TransformerConfig
from bytelm.data import Dataset, PrepareOptions, ReadOptions, engines, prepare, writing
from bytelm.data.calibration import calibrate_folder, repatch_folder
from bytelm.data.dataset import MANIFEST, read_manifest
from bytelm.errors import CheckpointError, ConfigError, DataError
from bytelm.patching import build_patcher
from bytelm.scoring import score_document
from bytelm.storage import locked

TEXTS = [f"document {i}: {'word ' * (i % 50)}\n" for i in range(200)]
SMALL = {"dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 48, "window": 6}


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": t, "lang": t[9]}) + "\n" for t in TEXTS))
    return str(path)


@pytest.fixture
def scorer(tmp_path):
    folder = tmp_path / "scorer-run"
    description = ModelDescription(model=TransformerConfig(**SMALL))
    save_model(folder, random_byte_lm(**SMALL), description)
    return folder


def documents(folder, split):
    dataset = Dataset(folder, split)
    return [dataset.document(i) for i in range(len(dataset))]


def test_documents_come_out_exactly_as_they_went_in(corpus, tmp_path):
    prepare([corpus], tmp_path / "d", PrepareOptions(shard_bytes=2000, validation_share=0.2))
    train, held_out = (documents(tmp_path / "d", s) for s in ("train", "validation"))
    assert sorted(train + held_out) == sorted(t.encode() for t in TEXTS)
    assert 10 < len(held_out) < 80
    order = [t.encode() for t in TEXTS]
    assert train == [t for t in order if t in set(train)]
    assert len(read_manifest(tmp_path / "d").shards) > 5


def test_copies_of_a_document_never_stand_on_both_sides(tmp_path):
    lines = [f"text {i % 40}" for i in range(400)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    options = PrepareOptions(read=ReadOptions(format="lines"), validation_share=0.3)
    prepare([str(tmp_path / "a.txt")], tmp_path / "d", options)
    train, held_out = (set(documents(tmp_path / "d", s)) for s in ("train", "validation"))
    assert train
    assert held_out
    assert not train & held_out


def test_held_out_inputs_are_held_out_with_all_copies_of_their_documents(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(f"text {i}" for i in range(100)))
    (tmp_path / "b.txt").write_text("\n".join(f"text {i}" for i in range(90, 120)))
    options = PrepareOptions(
        read=ReadOptions(format="lines"), validation=(str(tmp_path / "b.txt"),)
    )
    prepare([str(tmp_path / "a.txt")], tmp_path / "d", options)
    assert documents(tmp_path / "d", "train") == [f"text {i}".encode() for i in range(90)]
    held_out = documents(tmp_path / "d", "validation")
    assert sorted(set(held_out)) == sorted(f"text {i}".encode() for i in range(90, 120))


def test_what_is_held_out_whole_is_not_also_trained_on(tmp_path):
    (tmp_path / "c.txt").write_text("text")
    text = str(tmp_path / "c.txt")
    with pytest.raises(DataError, match=r"c\.txt: held out whole, and nothing else is left"):
        prepare([text], tmp_path / "d", PrepareOptions(validation=(text,)))


LINES = [f"line {i}" for i in range(12)]


@st.composite
def merges(draw):
    """Inputs of overlapping lines: plain ones, and ones that are prepared with their own splits."""
    texts = st.lists(st.sampled_from(LINES), min_size=1, max_size=20)
    shares = st.sampled_from([0.0, 0.1, 0.3, 0.6])
    made = st.tuples(texts, shares, st.none() | texts)
    prepared = draw(st.lists(made, min_size=1, max_size=3))
    plain = draw(st.lists(texts, max_size=2))
    whole = draw(st.none() | texts)
    order = draw(st.permutations(range(len(prepared) + len(plain))))
    return prepared, plain, whole, draw(shares), order


@given(merge=merges())
@settings(max_examples=25, deadline=None)
def test_what_any_input_holds_out_stays_held_out_in_any_order(merge):
    prepared, plain, whole, share, order = merge
    with tempfile.TemporaryDirectory() as name:
        folder, arguments, given, before = Path(name), [], [], set()

        def text(lines):
            path = folder / f"{len(list(folder.iterdir()))}.txt"
            path.write_text("\n".join(lines))
            return str(path)

        def options(share, lines):
            held_out = () if lines is None else (text(lines),)
            return PrepareOptions(
                read=ReadOptions(format="lines"), validation=held_out, validation_share=share
            )

        for lines, own_share, own_held_out in prepared:
            out = folder / f"prepared-{len(arguments)}"
            prepare([text(lines)], out, options(own_share, own_held_out))
            arguments.append(str(out))
            given += lines + (own_held_out or [])
            before |= set(documents(out, "validation"))
        for lines in plain:
            arguments.append(text(lines))
            given += lines
        # Prepared data alone takes no share.
        made = options(share if plain else None, whole)
        prepare(arguments, folder / "m", made)
        prepare([arguments[i] for i in order], folder / "n", made)
        train, held_out = (documents(folder / "m", s) for s in ("train", "validation"))
        assert not set(train) & set(held_out)
        assert before | {line.encode() for line in whole or ()} <= set(held_out)
        assert sorted(train + held_out) == sorted(t.encode() for t in given + (whole or []))
        for split, found in (("train", train), ("validation", held_out)):
            assert sorted(documents(folder / "n", split)) == sorted(found)


def test_prepared_folders_of_other_shares_are_merged_without_a_leak(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(f"document {i}" for i in range(400)))
    lines = ReadOptions(format="lines")
    for name, share in (("c1", 0.02), ("c2", 0.2)):
        options = PrepareOptions(read=lines, validation_share=share)
        prepare([str(tmp_path / "a.txt")], tmp_path / name, options)
    kept = set(documents(tmp_path / "c2", "validation"))
    for number, order in enumerate((["c1", "c2"], ["c2", "c1"])):
        out = tmp_path / f"m{number}"
        prepare([str(tmp_path / name) for name in order], out, PrepareOptions())
        assert set(documents(out, "validation")) == kept
        assert not set(documents(out, "train")) & kept


def test_held_out_documents_stay_held_out_when_both_are_cut(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n" * 9)
    (tmp_path / "b.txt").write_text("other")
    text, plain = str(tmp_path / "a.txt"), str(tmp_path / "b.txt")
    prepare([plain], tmp_path / "d", PrepareOptions(validation=(text,)))
    for order in ([str(tmp_path / "d"), text], [text, str(tmp_path / "d")]):
        out = tmp_path / f"m{order.index(text)}"
        prepare(order, out, PrepareOptions(read=ReadOptions(cut_bytes=8), validation_share=0.0))
        assert documents(out, "train") == [b"other"]
        assert set(documents(out, "validation")) == {b"one\ntwo\n"}


def test_prepared_data_keeps_its_split(corpus, scorer, tmp_path):
    prepare([corpus], tmp_path / "d", PrepareOptions(validation_share=0.3))
    prepare([str(tmp_path / "d")], tmp_path / "e", PrepareOptions(scorer=scorer, workers=1))
    for split in ("train", "validation"):
        assert documents(tmp_path / "e", split) == documents(tmp_path / "d", split)


def test_prepared_data_takes_no_validation_share(corpus, tmp_path):
    prepare([corpus], tmp_path / "d", PrepareOptions())
    options = PrepareOptions(validation_share=0.2)
    with pytest.raises(DataError, match="prepared data, which keeps its split: leave out"):
        prepare([str(tmp_path / "d")], tmp_path / "e", options)
    # It is for the documents of other inputs.
    (tmp_path / "x.txt").write_text("other")
    prepare([str(tmp_path / "d"), str(tmp_path / "x.txt")], tmp_path / "e", options)


@pytest.mark.parametrize("reset", [False, True])
def test_entropies_are_those_of_the_scorer_on_each_document_alone(corpus, scorer, tmp_path, reset):
    options = PrepareOptions(scorer=scorer, reset_at_newline=reset, workers=1, shard_bytes=4000)
    prepare([corpus], tmp_path / "d", options)
    dataset = Dataset(tmp_path / "d", "train")
    model, _ = load_scorer(tmp_path / "d" / "scorer", reset_at_newline=reset)
    for i in (0, 7, len(dataset) - 1):
        ids = codec.encode(dataset.document(i))
        with torch.no_grad():
            expected = model.entropies(torch.from_numpy(ids)[None])[0].numpy()
        stored = dataset.entropies(i, 0, len(ids))
        np.testing.assert_allclose(stored, expected, rtol=1e-4, atol=1e-5)


def test_any_tool_can_read_the_shards(corpus, scorer, tmp_path):
    prepare([corpus], tmp_path / "d", PrepareOptions(scorer=scorer, workers=1))
    table = pa.ipc.open_file(tmp_path / "d" / "train-00000.arrow").read_all()
    row = table.slice(0, 1).to_pylist()[0]
    assert set(row) == {"document", "source", "entropies"}
    assert len(row["entropies"]) == len(row["document"]) + 1


def test_ids_and_entropies_of_any_slice(corpus, scorer, tmp_path):
    prepare([corpus], tmp_path / "d", PrepareOptions(scorer=scorer, workers=1, shard_bytes=3000))
    dataset = Dataset(tmp_path / "d", "train")
    index = len(dataset) // 2
    whole = codec.encode(dataset.document(index), eos=True)
    scores = dataset.entropies(index, 0, len(whole) - 1)
    for begin, end in [
        (0, 1),
        (0, len(whole)),
        (1, 5),
        (3, len(whole)),
        (len(whole) - 1, len(whole)),
    ]:
        assert dataset.ids(index, begin, end).tolist() == whole[begin:end].tolist()
        end = min(end, len(whole) - 1)
        assert np.array_equal(dataset.entropies(index, begin, end), scores[begin:end])


@pytest.fixture
def others_first(monkeypatch):
    """Another worker takes part from the first documents on, though these are soon scored."""

    def wait_for_others(engine):
        return all(start.result() is None for start in engine._starts) and bool(engine._starts)

    monkeypatch.setattr(engines, "START_AFTER", -1.0)
    monkeypatch.setattr(engines._SharedEngine, "_has_others", wait_for_others)
    monkeypatch.setattr(writing, "SCORED_TOGETHER", 300)


def test_the_number_of_workers_does_not_change_the_result(
    corpus, scorer, tmp_path, others_first, monkeypatch
):
    score, scored = writing.Writer.score, []

    def score_here(writer, group):
        scored.append(group)
        time.sleep(0.002)
        return score(writer, group)

    monkeypatch.setattr(writing.Writer, "score", score_here)
    manifests, counts = [], []
    for workers in (1, 2):
        options = PrepareOptions(scorer=scorer, workers=workers, shard_bytes=4000)
        manifests.append(prepare([corpus], tmp_path / str(workers), options))
        counts.append(len(scored) - sum(counts))
    assert manifests[0] == manifests[1]
    # Both took part.
    assert 0 < counts[1] < counts[0]


def test_a_worker_that_dies_ends_the_preparation_which_resumes(
    corpus, scorer, tmp_path, others_first, monkeypatch
):
    def die(engine, function, *arguments):
        future = Future()
        if function is engines._score_in_worker and len(list((tmp_path / "d").glob("*.arrow"))) > 2:
            future.set_exception(BrokenProcessPool())
        else:
            future.set_result(None if not arguments else scored_by_another(engine, *arguments))
        return future

    def scored_by_another(engine, group):
        return np.concatenate(list(engine._writer.score(group)))

    options = PrepareOptions(scorer=scorer, workers=2, shard_bytes=4000)
    whole = prepare([corpus], tmp_path / "whole", dataclasses.replace(options, workers=1))
    with monkeypatch.context() as patch:
        patch.setattr(engines._SharedEngine, "_submit", die)
        with pytest.raises(DataError, match=r"a worker process died, .* fewer --workers"):
            prepare([corpus], tmp_path / "d", options)
    assert not (tmp_path / "d" / MANIFEST).exists()
    assert prepare([corpus], tmp_path / "d", dataclasses.replace(options, workers=1)) == whole


def test_finished_data_is_not_made_again(corpus, tmp_path):
    first = prepare([corpus], tmp_path / "d", PrepareOptions())
    before = (tmp_path / "d" / "train-00000.arrow").stat().st_mtime_ns
    assert prepare([corpus], tmp_path / "d", PrepareOptions()) == first
    assert (tmp_path / "d" / "train-00000.arrow").stat().st_mtime_ns == before


def test_an_interrupted_preparation_goes_on_where_it_stopped(corpus, scorer, tmp_path, monkeypatch):
    options = PrepareOptions(scorer=scorer, workers=1, shard_bytes=1000)
    whole = prepare([corpus], tmp_path / "whole", options)
    written = []
    write = writing.Writer.write

    def fail_at_fifth(self, shard, entropies):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(shard.name)
        return write(self, shard, entropies)

    monkeypatch.setattr(writing.Writer, "write", fail_at_fifth)
    with pytest.raises(KeyboardInterrupt):
        prepare([corpus], tmp_path / "d", options)
    (tmp_path / "d" / written[2]).write_bytes(b"cut short")
    # A kill in the middle of a line of the journal.
    with (tmp_path / "d" / "preparing.jsonl").open("a") as journal:
        journal.write('{"file": "train-')
    again = []

    def record(self, shard, entropies):
        again.append(shard.name)
        return write(self, shard, entropies)

    monkeypatch.setattr(writing.Writer, "write", record)
    assert prepare([corpus], tmp_path / "d", options).shards == whole.shards
    assert set(written) & set(again) == {written[2]}
    assert not (tmp_path / "d" / "preparing.jsonl").exists()


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_nothing(scorer, tmp_path):
    path = tmp_path / "big.jsonl"
    path.write_text("".join(json.dumps({"text": t * 40}) + "\n" for t in TEXTS))
    command = [
        *(sys.executable, "-m", "bytelm", "data", "prepare", str(path), "--scorer", str(scorer)),
        *("--out", str(tmp_path / "d"), "--shard-mb", "0.02", "--workers", "2"),
    ]
    kills = 0
    for wait in (3.0, 4.5, 6.0):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(wait)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert kills
    for split in ("train", "validation"):
        Dataset(tmp_path / "d", split, verify=True)
    found = documents(tmp_path / "d", "train") + documents(tmp_path / "d", "validation")
    assert sorted(found) == sorted(t.encode() * 40 for t in TEXTS)
    time.sleep(1.5)
    running = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True).stdout
    assert running == b"", "workers outlived the process that started them"


def test_other_settings_are_refused(corpus, tmp_path):
    other = str(tmp_path / "other.txt")
    Path(other).write_text("other")
    prepare([corpus], tmp_path / "d", PrepareOptions())
    with pytest.raises(DataError, match=r"other settings \(validation_share differ\)"):
        prepare([corpus], tmp_path / "d", PrepareOptions(validation_share=0.5))
    with pytest.raises(DataError, match="inputs differ"):
        prepare([corpus, f"more={corpus}", other], tmp_path / "d", PrepareOptions())


def test_every_input_is_in_the_manifest(corpus, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("one\ntwo\nthree\n")
    (folder / "b.jsonl").write_text('{"text": "x"}\n{"text": ""}\n[]\n')
    (folder / "c.bin").write_bytes(b"\0")
    (folder / "d.txt").touch()
    (folder / "e.txt").symlink_to("nowhere")
    options = PrepareOptions(
        read=ReadOptions(skip_invalid=True, cut_bytes=6),
        validation=(str(folder / "a.txt"),),
    )
    made = prepare([str(folder), corpus], tmp_path / "d", options)
    assert read_manifest(tmp_path / "d") == made
    found = {os.path.basename(one.name): one for one in made.inputs}
    kinds = {name: (one.kind, one.documents, one.note) for name, one in found.items()}
    assert kinds == {
        "a.txt": ("skipped", 0, f"the same as {folder}/a.txt, which is read"),
        "b.jsonl": ("jsonl", 1, ""),
        "c.bin": ("binary", 0, "looks binary: --binary reads it"),
        "d.txt": ("text", 0, "empty"),
        "e.txt": ("skipped", 0, "a broken link"),
        "corpus.jsonl": ("jsonl", found["corpus.jsonl"].documents, ""),
    }
    assert (found["b.jsonl"].invalid_records, found["b.jsonl"].empty_documents) == (1, 1)
    assert made.inputs[0].split == "validation"
    assert sum(one.documents for one in made.inputs) == sum(s.documents for s in made.shards)
    assert sum(one.text_bytes for one in made.inputs) == sum(s.text_bytes for s in made.shards)
    assert made.left_out.model_dump() == {
        "duplicate_documents": 0,
        "empty_documents": 2, "invalid_records": 1, "binary_files": 1, "skipped_files": 2
    }  # fmt: skip
    # What was not read may go without making the data another's.
    (folder / "e.txt").unlink()
    assert prepare([str(folder), corpus], tmp_path / "d", options) == made


def test_data_of_an_earlier_version_is_read_and_recognised(corpus, tmp_path):
    made = prepare([corpus], tmp_path / "d", PrepareOptions())
    path = tmp_path / "d" / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["inputs"], manifest["left_out"]["skipped_files"]
    read = manifest["settings"]["read"]
    manifest["settings"]["read"] = {k: read[k] for k in list(read)[:3]}
    path.write_text(json.dumps(manifest))
    old = prepare([corpus], tmp_path / "d", PrepareOptions())
    assert old.fingerprint == made.fingerprint
    assert old.inputs == []


def test_pipes_are_prepared_again_from_the_start(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    fifo = str(tmp_path / "pipe.txt")
    lines = PrepareOptions(read=ReadOptions(format="lines"), shard_bytes=3, validation_share=0.0)
    for text in (b"one\n", b"two\n"):
        thread = threading.Thread(target=Path(fifo).write_bytes, args=(text * 3,))
        thread.start()
        prepare([fifo], tmp_path / text.decode().strip(), lines)
        thread.join()
    assert documents(tmp_path / "two", "train") == [b"two"] * 3
    with pytest.raises(DataError, match=r"made from other .*pipe.txt: remove it"):
        prepare([fifo], tmp_path / "two", lines)


def test_a_remedy_can_be_followed_in_the_same_folder(tmp_path):
    """What a failed preparation left does not keep the folder from one with other settings."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n{"text": 3}\n{"text": ""}\n')
    with pytest.raises(DataError, match="--skip-invalid passes over"):
        prepare([str(path)], tmp_path / "d", PrepareOptions())
    skipping = PrepareOptions(read=ReadOptions(skip_invalid=True))
    manifest = prepare([str(path)], tmp_path / "d", skipping)
    assert manifest.left_out.invalid_records == 1
    assert manifest.left_out.empty_documents == 1


def test_a_stopped_preparation_with_another_scorer_leaves_nothing_behind(
    corpus, scorer, tmp_path, monkeypatch
):
    def stop(self, shard, entropies):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writing.Writer, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare([corpus], tmp_path / "d", PrepareOptions(scorer=scorer, workers=1))
    other = tmp_path / "other"
    save_model(other, random_byte_lm(seed=9, **SMALL), ModelDescription(
        model=TransformerConfig(**SMALL)))  # fmt: skip
    manifest = prepare([corpus], tmp_path / "d", PrepareOptions(scorer=other, workers=1))
    assert manifest.scorer is not None
    assert manifest.scorer.fingerprint == fingerprint(other)
    assert fingerprint(tmp_path / "d" / "scorer") == fingerprint(other)


def test_damaged_prepared_data_is_not_passed_on(corpus, tmp_path):
    prepare([corpus], tmp_path / "d", PrepareOptions())
    path = tmp_path / "d" / "train-00000.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="its contents have changed"):
        prepare([str(tmp_path / "d")], tmp_path / "e", PrepareOptions())


def test_calibrated_data_and_other_spellings_are_the_same_input(corpus, scorer, tmp_path):
    prepare([corpus], tmp_path / "d", PrepareOptions(scorer=scorer, workers=1))
    first = prepare([str(tmp_path / "d")], tmp_path / "e", PrepareOptions())
    calibrate_folder(tmp_path / "d", EntropyPatching(), 2.08)
    other = f"{tmp_path}/x/../d"
    (tmp_path / "x").mkdir()
    assert prepare([other], tmp_path / "e", PrepareOptions()) == first


def test_the_folder_to_make_and_what_bytelm_made_are_not_read(corpus, tmp_path):
    options = PrepareOptions(leave_out=(tmp_path / "run",))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report.md").write_text("made by a run")
    first = prepare([str(tmp_path)], tmp_path / "d", options)
    assert prepare([str(tmp_path)], tmp_path / "d", options) == first
    assert prepare([str(tmp_path)], tmp_path / "e", options).sources() == first.sources()


def test_one_process_at_a_time(corpus, tmp_path):
    with locked(tmp_path / "d"), pytest.raises(ConfigError, match="another process is writing to"):
        prepare([corpus], tmp_path / "d", PrepareOptions())
    assert prepare([corpus], tmp_path / "d", PrepareOptions()).shards


@pytest.mark.parametrize("length", [65_535, 65_536, 100_000])
def test_long_documents_are_scored_in_pieces_as_if_whole(scorer, tmp_path, length):
    data = np.random.default_rng(0).bytes(length)
    (tmp_path / "long.txt").write_bytes(data)
    (tmp_path / "short.txt").write_bytes(b"short")
    (tmp_path / "more.txt").write_bytes(b"short")
    texts = [str(tmp_path / f"{name}.txt") for name in ("short", "long", "more")]
    options = PrepareOptions(scorer=scorer, workers=1, validation_share=0.0)
    prepare(texts, tmp_path / "d", options)
    dataset = Dataset(tmp_path / "d", "train")
    model, _ = load_scorer(scorer, reset_at_newline=False)
    for index in range(3):
        ids = torch.from_numpy(codec.encode(dataset.document(index)))
        whole = torch.cat(list(score_document(model, ids))).numpy()
        found = dataset.entropies(index, 0, len(ids))
        np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-5)


def test_a_folder_of_something_else_is_left_alone(corpus, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="was not made by"):
        prepare([corpus], tmp_path / "mine", PrepareOptions())
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]


def test_no_text_at_all_is_an_error(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match=r"hold no text: .*\(1 empty documents; .*empty.txt: empty"):
        prepare([str(tmp_path / "empty.txt")], tmp_path / "d", PrepareOptions())


def test_a_full_disk_is_reported_and_the_work_done_is_kept(corpus, tmp_path, monkeypatch):
    options = PrepareOptions(shard_bytes=1000)
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 6:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device; free some space"):
        prepare([corpus], tmp_path / "d", options)
    monkeypatch.setattr(os, "fsync", fsync)
    done = [p for p in os.listdir(tmp_path / "d") if p.endswith(".arrow") and p[0] != "."]
    assert done
    prepare([corpus], tmp_path / "d", options)
    found = documents(tmp_path / "d", "train") + documents(tmp_path / "d", "validation")
    assert sorted(found) == sorted(t.encode() for t in TEXTS)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damaged_shards_are_named(corpus, tmp_path, damage):
    prepare([corpus], tmp_path / "d", PrepareOptions())
    path = tmp_path / "d" / "train-00000.arrow"
    data = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
    with pytest.raises(DataError, match=r"train-00000.arrow is (damaged|missing)"):
        Dataset(tmp_path / "d", "train", verify=True)


@pytest.mark.parametrize("content", ["{", '{"format": 99}', '{"format": 1, "shards": 3}', "[]"])
def test_a_damaged_manifest_is_named(corpus, tmp_path, content):
    prepare([corpus], tmp_path / "d", PrepareOptions())
    (tmp_path / "d" / MANIFEST).write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json"):
        Dataset(tmp_path / "d", "train")


def test_a_folder_that_is_not_prepared_data_is_named(tmp_path):
    with pytest.raises(DataError, match=r"is not prepared data: it has no manifest\.json; make it"):
        Dataset(tmp_path, "train")
    with pytest.raises(DataError, match=r"no such folder; make it with .* --out \S+/none`"):
        Dataset(tmp_path / "none", "train")
    (tmp_path / "a.txt").write_text("text")
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(DataError, match=f"`bytelm data prepare {path} --out DATA`"):
            Dataset(path, "train")
    (tmp_path / "preparing.jsonl").touch()
    with pytest.raises(DataError, match="its preparation has not ended"):
        Dataset(tmp_path, "train")


def test_a_model_without_a_window_is_refused_as_scorer(corpus, tmp_path):
    unbounded = {**SMALL, "window": None}
    description = ModelDescription(model=TransformerConfig(**unbounded))
    save_model(tmp_path / "full", random_byte_lm(**unbounded), description)
    with pytest.raises(CheckpointError, match="has no window"):
        prepare([corpus], tmp_path / "d", PrepareOptions(scorer=tmp_path / "full"))


def test_calibration_is_recorded_with_a_report_per_source(scorer, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_bytes(rng.bytes(4000))
    texts = [str(tmp_path / f"{name}.txt") for name in ("one", "two")]
    prepare(texts, tmp_path / "d", PrepareOptions(scorer=scorer, workers=1, validation_share=0.0))
    calibration = calibrate_folder(tmp_path / "d", EntropyPatching(), 3.0)
    assert calibration.patch_size == pytest.approx(3.0, rel=0.02)
    assert read_manifest(tmp_path / "d").calibration == calibration
    assert list(calibration.sources) == ["one", "two"]


def test_data_is_patched_with_any_threshold_without_its_scorer(scorer, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_bytes(rng.bytes(3000))
    texts = [str(tmp_path / f"{name}.txt") for name in ("one", "two")]
    options = PrepareOptions(scorer=scorer, workers=1, validation_share=0.0)
    made = prepare(texts, tmp_path / "d", options)
    shutil.rmtree(tmp_path / "d" / "scorer")
    dataset = Dataset(tmp_path / "d", "train")
    patches = {}
    for threshold in (4.9, 5.1, 5.3):
        rule = EntropyPatching(threshold=threshold)
        calibration = repatch_folder(tmp_path / "d", rule)
        assert read_manifest(tmp_path / "d").calibration == calibration
        for index, name in enumerate(("one", "two")):
            ids = torch.from_numpy(dataset.ids(index, 0, 3001))
            entropies = torch.from_numpy(dataset.entropies(index, 0, 3001))
            boundary = build_patcher(rule).next_boundary(ids[None], entropies[None])
            patches[name] = 1 + int(boundary[:, :-1].sum())
            assert calibration.sources[name].patches == patches[name]
        assert calibration.patch_size == pytest.approx(6002 / sum(patches.values()))
    assert read_manifest(tmp_path / "d").fingerprint == made.fingerprint


def test_shards_of_several_scorers_are_refused(corpus, scorer, tmp_path):
    other = tmp_path / "other"
    save_model(other, random_byte_lm(seed=9, **SMALL), ModelDescription(
        model=TransformerConfig(**SMALL)))  # fmt: skip
    options = PrepareOptions(validation_share=0.0, workers=1)
    made = {}
    for name, by in (("a", scorer), ("b", other), ("c", None)):
        made[name] = prepare([corpus], tmp_path / name, dataclasses.replace(options, scorer=by))
    for name, message in (("b", "was scored by .* prepare all text with one"), ("c", "has no ent")):
        (tmp_path / name / "train-00000.arrow").rename(tmp_path / "a" / f"{name}.arrow")
        (shard,) = made[name].shards
        shards = [*made["a"].shards, shard.model_copy(update={"file": f"{name}.arrow"})]
        mixed = made["a"].model_copy(update={"shards": shards})
        (tmp_path / "a" / MANIFEST).write_text(mixed.model_dump_json())
        with pytest.raises(DataError, match=rf"{name}.arrow {message}"):
            Dataset(tmp_path / "a", "train")


def test_calibration_needs_entropies(corpus, tmp_path):
    prepare([corpus], tmp_path / "plain", PrepareOptions())
    with pytest.raises(DataError, match="has no entropies to calibrate on"):
        calibrate_folder(tmp_path / "plain", EntropyPatching(), 3.0)
