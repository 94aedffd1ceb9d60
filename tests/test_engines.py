"""Engines of preparation: the same bytes however the work is divided, killed and begun again."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import random_byte_lm
from bytelm.checkpoint import save_model
from bytelm.config import ModelDescription, TransformerConfig
from bytelm.data import PrepareOptions, Reader, ReadOptions, preparation, prepare, writing
from bytelm.data.dataset import read_manifest, shard_documents
from bytelm.data.inputs import Input
from bytelm.data.sections import Section, divide, read_section
from bytelm.errors import ConfigError

START_SECONDS = 240
SMALL = {"dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 48, "window": 6}


@pytest.fixture
def files(tmp_path):
    """Several inputs, and one to hold out that has copies of documents of others."""
    paths = []
    for name in range(6):
        path = tmp_path / f"text{name}.jsonl"
        texts = [f"{name} {i}: {'word ' * (i % 30)}\n" for i in range(40 + 20 * name)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        paths.append(str(path))
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text("".join(Path(paths[4]).read_text().splitlines(True)[:7]))
    return paths, str(held_out)


def shard_hashes(folder):
    manifest = read_manifest(folder)
    for shard in manifest.shards:
        assert (folder / shard.file).stat().st_size == shard.file_bytes
    return {shard.file: shard.sha256 for shard in manifest.shards}


def all_texts(folder):
    paths = [folder / shard.file for shard in read_manifest(folder).shards]
    return sorted(text for path in paths for text in shard_documents(path))


SIZES = st.lists(st.integers(0, 50), min_size=1, max_size=20)


@given(
    sizes=SIZES, held_out=st.integers(0, 20), limit=st.integers(1, 80), stream=st.integers(0, 30)
)
def test_sections_are_runs_of_inputs_that_are_large_enough(sizes, held_out, limit, stream):
    class Sized(Input):
        num_bytes = property(lambda one: sizes[int(one.source)])

    inputs = [
        Sized(
            Path(str(n)),
            str(n),
            "text",
            split="validation" if n < held_out else None,
            is_stream=n == stream,
        )
        for n in range(len(sizes))
    ]
    sections = divide(inputs, limit)
    assert [one for section in sections for one in section.inputs] == inputs
    for section, following in zip(sections, [*sections[1:], None], strict=True):
        assert len({one.split for one in section.inputs}) == 1
        assert sum(section.sizes[:-1]) < limit
        assert len(section.inputs) == 1 or not any(one.is_stream for one in section.inputs)
        if section.num_bytes < limit and following is not None:
            first, following = section.inputs[0], following.inputs[0]
            assert first.is_stream or following.is_stream or first.split != following.split


@settings(max_examples=30)
@given(
    lengths=st.lists(st.lists(st.integers(0, 30), max_size=8), min_size=1, max_size=4),
    limit=st.integers(1, 60),
)
def test_blocks_hold_the_documents_in_order(tmp_path_factory, lengths, limit):
    folder = tmp_path_factory.mktemp("blocks")
    inputs = []
    for number, group in enumerate(lengths):
        path = folder / f"{number}.txt"
        path.write_text("".join("x" * length + "\n" for length in group))
        inputs.append(Input(path, str(number), "lines"))
    options, reader = ReadOptions(format="lines"), Reader(ReadOptions(format="lines"))
    expected = [document for one in inputs for document in reader.read(one)]
    section = Section(tuple(inputs), tuple(one.num_bytes for one in inputs))
    blocks = list(read_section(section, options, limit))
    assert [document for _, block in blocks for document in block] == expected
    assert [record for outline, _ in blocks for record in outline.records] == reader.records
    assert sum(outline.input_bytes for outline, _ in blocks) == section.num_bytes
    for outline, block in blocks:
        assert len(outline.digests) == len(outline.splits) == len(block)
        assert sum(len(document.data) for document in block[:-1]) < limit
    for _, block in blocks[:-1]:
        assert sum(len(document.data) for document in block) >= limit


@contextmanager
def eager_engine(work, num_workers=8):
    """Engine that reads all sections before the first is taken, and writes in any order."""
    writer = work.writer()

    class Eager:
        def __init__(self):
            self.num_workers = num_workers

        def read(self, sections):
            blocks = [list(read_section(s, work.read, work.block_bytes)) for s in sections[::-1]]
            return iter([iter(one) for one in blocks[::-1]])

        def write(self, number, documents, splits):
            return pool.submit(late_write, number, documents, splits)

    def late_write(number, documents, splits):
        time.sleep(0.002 * (-number % 5))
        return writer.write_block(number, documents, splits)

    with ThreadPoolExecutor(num_workers) as pool:
        yield Eager()


def options_for(held_out, shard_bytes=1500):
    return PrepareOptions(
        validation=(held_out,), validation_share=0.2, shard_bytes=shard_bytes, workers=1
    )


def test_the_order_of_reading_and_writing_does_not_change_a_byte(files, tmp_path, monkeypatch):
    inputs, held_out = files
    prepare(inputs, tmp_path / "local", options_for(held_out))
    monkeypatch.setattr(preparation, "_engine", lambda options, work: eager_engine(work))
    prepare(inputs, tmp_path / "eager", options_for(held_out))
    assert len(shard_hashes(tmp_path / "local")) > 20
    assert read_manifest(tmp_path / "local") == read_manifest(tmp_path / "eager")


@pytest.mark.parametrize("stop", [0, 6, -1])
def test_a_stop_is_resumed_and_finished_sections_are_not_read_again(
    files, tmp_path, monkeypatch, stop
):
    inputs, held_out = files
    options = options_for(held_out, shard_bytes=3000)
    whole = prepare(inputs, tmp_path / "whole", options)
    write, read = writing.Writer.write, Reader.read
    last = stop % len(whole.shards)
    written, sources = [], []

    def fail(self, shard, entropies):
        if len(written) == last:
            raise KeyboardInterrupt
        written.append(shard.name)
        return write(self, shard, entropies)

    def note(self, source):
        sources.append(source.source)
        return read(self, source)

    with monkeypatch.context() as patch:
        patch.setattr(writing.Writer, "write", fail)
        with pytest.raises(KeyboardInterrupt):
            prepare(inputs, tmp_path / "d", options)
    monkeypatch.setattr(Reader, "read", note)
    assert prepare(inputs, tmp_path / "d", options) == whole
    if stop == -1:
        # Other sections are known, also which documents they hold out.
        assert sources == ["text5"]
        assert set(all_texts(tmp_path / "d")) == set(all_texts(tmp_path / "whole"))


def test_streams_are_refused_by_ray_early(tmp_path):
    pytest.importorskip("ray")
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ConfigError, match=r"pipe.txt can be read by this process only"):
        prepare([str(tmp_path / "pipe.txt")], tmp_path / "d", PrepareOptions(engine="ray"))
    assert not (tmp_path / "d").exists()


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Inputs that take seconds to score, the scorer, and what one engine makes of them."""
    folder, paths = tmp_path_factory.mktemp("scored"), []
    for name in range(3):
        path = folder / f"long{name}.jsonl"
        texts = [f"{name} {i}: {'word ' * (i % 50)}\n" * 60 for i in range(40)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        paths.append(str(path))
    save_model(
        folder / "scorer",
        random_byte_lm(**SMALL),
        ModelDescription(model=TransformerConfig(**SMALL)),
    )
    whole = folder / "whole"
    subprocess.run(command(paths, folder / "scorer", whole, "local"), check=True)
    return paths, folder / "scorer", whole


def command(inputs, scorer, out, engine):
    return [
        *(sys.executable, "-m", "bytelm", "data", "prepare", *inputs, "--scorer", str(scorer)),
        *("--out", str(out), "--shard-mb", "0.015", "--workers", "2", "--engine", engine),
        *("--validation-share", "0.1"),
    ]


def processes_of_ray(process, name):
    found = []
    for one in psutil.Process(process.pid).children(recursive=True):
        try:
            if one.name().startswith("ray::") and name in " ".join(one.cmdline()):
                found.append(one)
        except psutil.Error:
            continue
    return found


def wait_for(condition, process):
    ends = time.monotonic() + START_SECONDS
    while not condition():
        assert time.monotonic() < ends, "too slow"
        assert process.poll() is None, "it ended too early"
        time.sleep(0.05)


def num_blocks(out):
    journal = out / "preparing.jsonl"
    return journal.read_text().count('{"block"') if journal.exists() else 0


def begin_and_kill(inputs, scorer, out, engine):
    """Kill a command that has written some blocks; its workers end too."""
    process = subprocess.Popen(command(inputs, scorer, out, engine), stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: num_blocks(out) >= 4, process)
        assert num_blocks(out) < 20
        left = processes_of_ray(process, "_Writing") + processes_of_ray(process, "_read")
    finally:
        process.kill()
    process.wait()
    assert bool(left) == (engine == "ray")
    _, alive = psutil.wait_procs(left, timeout=60)
    assert not alive, "workers outlived the command"


def assert_same(out, whole):
    assert shard_hashes(out) == shard_hashes(whole)
    assert read_manifest(out) == read_manifest(whole)


@pytest.mark.slow
def test_what_ray_began_is_finished_after_a_kill_by_the_local_engine(scored, tmp_path):
    inputs, scorer, whole = scored
    out = tmp_path / "d"
    begin_and_kill(inputs, scorer, out, "ray")
    subprocess.run(command(inputs, scorer, out, "local"), check=True, timeout=START_SECONDS)
    assert_same(out, whole)


@pytest.mark.slow
def test_what_the_local_engine_began_is_finished_by_ray_though_its_workers_are_killed(
    scored, tmp_path
):
    inputs, scorer, whole = scored
    out = tmp_path / "d"
    begin_and_kill(inputs, scorer, out, "local")
    process = subprocess.Popen(command(inputs, scorer, out, "ray"), stdout=subprocess.DEVNULL)
    done = num_blocks(out)
    try:
        for blocks, name in ((2, "_Writing"), (5, "_read"), (9, "_Writing")):
            wait_for(lambda blocks=blocks: num_blocks(out) >= done + blocks, process)
            wait_for(lambda name=name: processes_of_ray(process, name), process)
            processes_of_ray(process, name)[0].send_signal(signal.SIGKILL)
        process.wait(START_SECONDS)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert_same(out, whole)


@pytest.mark.slow
def test_an_error_in_a_task_of_ray_is_one_message(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n{"text": 3}\n')
    done = subprocess.run(
        [
            *(sys.executable, "-m", "bytelm", "data", "prepare", str(path)),
            *("--out", str(tmp_path / "d"), "--engine", "ray"),
        ],
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
    )
    assert done.returncode == 1
    assert "bad.jsonl, line 2: field 'text' holds 3, not text" in done.stderr
    assert "Traceback" not in done.stderr
