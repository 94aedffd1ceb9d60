import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bytelm.data import PrepareOptions, Reader, ReadOptions, find_inputs, prepare
from bytelm.errors import DataError

RECORDS = [{"text": "first"}, {"text": "zwei é"}, {"text": "\x00\xff"}]
JSONL = b"".join(json.dumps(r).encode() + b"\n" for r in RECORDS)
TEXTS = [r["text"].encode() for r in RECORDS]


def read(*arguments, **options):
    chosen = ReadOptions(**options)
    reader = Reader(chosen)
    inputs = find_inputs([str(a) for a in arguments], chosen)
    return [(d.source, d.data) for i in inputs for d in reader.read(i)]


def arrow_compress(codec, data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as out:
        out.write(data)
    return sink.getvalue().to_pybytes()


COMPRESSORS = {
    ".bz2": bz2.compress,
    ".gz": gzip.compress,
    ".lz4": partial(arrow_compress, "lz4"),
    ".xz": lzma.compress,
    ".zst": partial(arrow_compress, "zstd"),
}


@pytest.mark.parametrize(("suffix", "compress"), [("", bytes), *COMPRESSORS.items()])
def test_records_and_text_are_read_through_compression(tmp_path, suffix, compress):
    (tmp_path / f"books-03.jsonl{suffix}").write_bytes(compress(JSONL))
    (tmp_path / f"raw.txt{suffix}").write_bytes(compress(b"\xff\x00any bytes\r\n"))
    found = read(tmp_path / f"books-03.jsonl{suffix}", tmp_path / f"raw.txt{suffix}")
    assert found == [*(("books", t) for t in TEXTS), ("raw", b"\xff\x00any bytes\r\n")]


def test_lines_are_documents_on_request(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n\nthree")
    found = read(tmp_path / "a.txt", format="lines")
    assert [data for _, data in found] == [b"one", b"two", b"three"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary()])
def test_parquet_columns_of_text_or_bytes(tmp_path, kind):
    values = [t if kind == pa.binary() else t.decode("latin-1") for t in TEXTS]
    table = pa.table({"body": pa.array(values, kind), "lang": ["a", "b", "a"]})
    pq.write_table(table, tmp_path / "x.parquet")
    found = read(tmp_path / "x.parquet", field="body", source_field="lang")
    expected = [t if kind == pa.binary() else t.decode("latin-1").encode() for t in TEXTS]
    assert found == list(zip(["a", "b", "a"], expected, strict=True))


def test_a_hugging_face_dataset_on_disk(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    dataset = datasets.Dataset.from_list([{"text": t, "n": i} for i, t in enumerate("abc")])
    dataset.filter(lambda r: r["n"] != 1).save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one") == [("one", b"a"), ("one", b"c")]
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match="name one of test, train, as PATH/SPLIT"):
        read(tmp_path / "two")
    assert len(read(tmp_path / "two" / "train")) == 3


def test_directories_are_searched_without_hidden_or_binary_files(tmp_path):
    root = tmp_path / "tree"
    (root / "sub" / ".git").mkdir(parents=True)
    (root / "sub" / ".git" / "config").write_text("hidden")
    (root / "sub" / "b.py").write_text("b")
    (root / "a.py").write_text("a")
    (root / "c.md").write_text("c")
    (root / "image").write_bytes(b"\x89PNG\x00")
    (root / "more.jsonl").write_bytes(JSONL)
    texts = [("tree", b"a"), ("tree", b"c"), *(("more", t) for t in TEXTS), ("tree", b"b")]
    assert read(root) == texts
    assert read(root, include="*.py") == [("tree", b"a"), ("tree", b"b")]
    assert ("tree", b"\x89PNG\x00") in read(root, binary=True)
    assert read(root / "image") == [("image", b"\x89PNG\x00")]


def test_globs_and_names(tmp_path):
    for name in ("x-00.txt", "x-01.txt", "y.txt"):
        (tmp_path / name).write_text(name)
    found = read(f"{tmp_path}/x-*.txt", f"mine={tmp_path}/y.txt")
    assert found == [("x", b"x-00.txt"), ("x", b"x-01.txt"), ("mine", b"y.txt")]
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    (tmp_path / "sub" / "deep" / "z.txt").write_text("z")
    assert len(read(f"{tmp_path}/**/*.txt")) == 4


def test_a_source_is_named_only_if_the_whole_argument_matches_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder, text in (("data/lang=en", "english"), ("en", "wrong")):
        Path(folder).mkdir(parents=True)
        Path(folder, "p.txt").write_text(text)
    english, wrong = ("p", b"english"), ("p", b"wrong")
    for argument in ("data/lang=en/*.txt", "data/lang=en/p.txt", "data/lang=*/p.txt"):
        assert read(argument) == [english]
        assert read(f"~/{argument}") == [english]
        assert read(f"mine=~/{argument}") == [("mine", b"english")]
    assert read("data/lang=en") == [("lang=en", b"english")]
    assert read("en/*.txt") == [wrong]
    # A mistyped pattern must not match files elsewhere.
    (tmp_path / "en" / "q.md").write_text("wrong")
    with pytest.raises(DataError, match=r"'data/lang=en/\*.md' matches no file"):
        read("data/lang=en/*.md")


def test_include_matches_names_and_paths(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.py", "b.md", "sub/c.py"):
        (tmp_path / name).write_text(name)
    assert [d for _, d in read(tmp_path, include="*.py")] == [b"a.py", b"sub/c.py"]
    assert [d for _, d in read(tmp_path, include="sub/*")] == [b"sub/c.py"]


def test_binary_files_in_folders_are_counted(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "utf16.txt").write_text("text", "utf-16")
    reader, inputs = Reader(ReadOptions()), find_inputs([str(tmp_path)], ReadOptions())
    assert [d.data for one in inputs for d in reader.read(one)] == [b"text"]
    assert reader.num_binary == 1


def test_names_that_are_not_text_become_text(tmp_path):
    folder = os.path.join(os.fsencode(tmp_path), b"na\xffme")
    os.mkdir(folder)
    with open(os.path.join(folder, b"x.txt"), "wb") as file:
        file.write(b"text")
    assert read(os.fsdecode(folder)) == [("na?me", b"text")]
    (tmp_path / "a.jsonl").write_text('{"text": "x", "s": "\\ud800"}\n{"text": "y", "s": null}\n')
    assert read(tmp_path / "a.jsonl", source_field="s") == [("?", b"x"), ("a", b"y")]


def test_standard_input():
    code = (
        "from bytelm.data import *\n"
        "o = ReadOptions(format='jsonl')\n"
        "for i in find_inputs(['-'], o):\n"
        "    print([(d.source, d.data) for d in Reader(o).read(i)])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=JSONL, capture_output=True, check=True
    )
    assert eval(done.stdout) == [("stdin", t) for t in TEXTS]


def test_prepared_data_can_be_prepared_again(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    prepare([str(tmp_path / "a.jsonl")], tmp_path / "d", PrepareOptions(validation_share=0.4))
    assert sorted(read(tmp_path / "d")) == sorted(("a", t) for t in TEXTS)


def test_empty_documents_are_counted_and_passed_over(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "x"}\n')
    reader = Reader(ReadOptions())
    inputs = find_inputs([str(tmp_path)], ReadOptions())
    assert [d.data for i in inputs for d in reader.read(i)] == [b"x"]
    assert reader.num_empty == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        (b'["a"]\n', "line 1 holds list, not an object"),
        (b'{"body": "a"}\n', "has no field 'text'; it has 'body': choose one with --field"),
        (b'{"text": 3}\n', "field 'text' holds 3, not text"),
        (b"\xff\xfe\n", "line 1 is not JSON"),
    ],
)
def test_bad_records_are_located_and_can_be_skipped(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert "--skip-invalid" in str(caught.value)
    path.write_bytes(content + b'{"text": "good"}\n')
    assert read(path, skip_invalid=True)[-1] == ("a", b"good")


def test_lone_surrogates_in_json_are_kept(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\\ud800"}\n')
    assert read(tmp_path / "a.jsonl") == [("a", b"\xed\xa0\x80")]


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_files_that_were_joined_are_read_to_the_end(tmp_path, suffix):
    parts = [COMPRESSORS[suffix](bytes([letter]) * 100_000) for letter in b"abc"]
    (tmp_path / f"a.txt{suffix}").write_bytes(b"".join(parts))
    ((_, data),) = read(tmp_path)
    assert data == b"a" * 100_000 + b"b" * 100_000 + b"c" * 100_000


DAMAGED = {
    "a.parquet": b"PAR1nonsense",
    **{f"a.jsonl{suffix}": compress(JSONL * 1000) for suffix, compress in COMPRESSORS.items()},
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_named(tmp_path, name):
    whole = DAMAGED[name]
    for damaged in (whole[: len(whole) // 2], b"nonsense" + whole):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(DataError, match=f"cannot read .*{name}"):
            read(tmp_path / name)


def test_missing_inputs_are_named(tmp_path):
    with pytest.raises(DataError, match="'no/such' matches no file"):
        read("no/such")
    with pytest.raises(DataError, match="hold no file to read"):
        read(tmp_path)
    pq.write_table(pa.table({"a": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="has no column 'text'; it has a"):
        read(tmp_path / "x.parquet")
    with pytest.raises(DataError, match="Parquet cannot be read from standard input"):
        read("-", format="parquet")


def test_one_line_of_many_megabytes(tmp_path):
    text = "ab" * 10_000_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    (tmp_path / "a.txt").write_text(text)
    assert [len(data) for _, data in read(tmp_path)] == [len(text)] * 2


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_progress_follows_the_compressed_file(tmp_path, suffix):
    (tmp_path / f"a.jsonl{suffix}").write_bytes(COMPRESSORS[suffix](JSONL * 3000))
    (source,) = find_inputs([str(tmp_path)], ReadOptions())
    reader, positions = Reader(ReadOptions()), []
    for _ in reader.read(source):
        positions.append(reader.position)
    assert positions == sorted(positions)
    assert 0 < positions[0] <= positions[-1] == source.num_bytes


@given(data=st.binary(max_size=300), cut_bytes=st.integers(1, 40))
def test_cut_documents_join_to_the_whole_and_end_at_newlines_where_they_can(data, cut_bytes):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.txt"
        path.write_bytes(data)
        pieces = [piece for _, piece in read(path, cut_bytes=cut_bytes)]
    assert b"".join(pieces) == data
    assert all(0 < len(piece) <= cut_bytes for piece in pieces)
    for piece in pieces[:-1]:
        assert piece.endswith(b"\n") or b"\n" not in piece[cut_bytes // 2 :]


def test_a_short_document_is_not_cut(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n")
    assert read(tmp_path / "a.txt", cut_bytes=8) == [("a", b"one\ntwo\n")]
