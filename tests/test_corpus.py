import bz2
import gzip
import io
import json
import lzma
import os
import sys
import tarfile
import tempfile
import threading
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import bytelm
from bytelm.codec import to_bytes
from bytelm.data import PrepareOptions, Reader, ReadOptions, find_inputs, prepare
from bytelm.data.zstd import window_size
from bytelm.errors import DataError

RECORDS = [{"text": "first"}, {"text": "zwei é"}, {"text": "\x00\xff"}]
JSONL = b"".join(json.dumps(r).encode() + b"\n" for r in RECORDS)
TEXTS = [r["text"].encode() for r in RECORDS]


def read(*arguments, **options):
    chosen = ReadOptions(**options)
    reader = Reader(chosen)
    inputs = find_inputs([str(a) for a in arguments], chosen)
    return [(d.source, d.data) for i in inputs for d in reader.read(i)]


def read_all(folder, **options):
    """Return the documents of a folder, and the note on each input by its name in the folder."""
    chosen = ReadOptions(**options)
    reader = Reader(chosen)
    inputs = find_inputs([str(folder)], chosen)
    documents = [d.data for one in inputs for d in reader.read(one)]
    notes = {os.path.relpath(record.name, folder): record.note for record in reader.records}
    return documents, notes


def arrow_compress(codec, data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as out:
        out.write(data)
    return sink.getvalue().to_pybytes()


def zstd_with_window(log, data):
    """A frame whose window has 2**log bytes and whose header does not tell the size of its text."""
    options = zstandard.ZstdCompressionParameters(window_log=log, write_content_size=False)
    file = io.BytesIO()
    with zstandard.ZstdCompressor(compression_params=options).stream_writer(
        file, closefd=False
    ) as writer:
        writer.write(data)
    return file.getvalue()


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


def test_binary_files_in_folders_are_left_out_by_name(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "weights.bin").write_bytes(b"\0\1\2")
    (tmp_path / "weights.bin.gz").write_bytes(gzip.compress(b"\0\1\2" * 9000))
    for mode in ("w", "w:gz", "w:xz"):
        suffix = mode.replace("w", "tar").replace(":", ".")
        with tarfile.open(tmp_path / f"src.{suffix}", mode) as archive:
            archive.add(tmp_path / "a.txt", "a.txt")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "a.txt", "a.txt")
    documents, notes = read_all(tmp_path)
    assert documents == [b"text"]
    assert notes == {
        "a.txt": "",
        "a.zip": "it is a zip archive: unpack it, and name the folder",
        "src.tar": "it is a tar archive: unpack it, and name the folder",
        "src.tar.gz": "it is a tar archive inside gzip: unpack it, and name the folder",
        "src.tar.xz": "it is a tar archive inside xz: unpack it, and name the folder",
        "weights.bin": "looks binary: --binary reads it",
        "weights.bin.gz": "looks binary inside gzip: --binary reads it",
    }
    for name in ("a.zip", "src.tar", "src.tar.gz"):
        with pytest.raises(DataError, match=f"{name}: it is a .* archive.*: unpack it"):
            read(tmp_path / name)
    assert len(read_all(tmp_path, binary=True)[0]) == 7
    assert read(tmp_path / "weights.bin.gz") == [("weights", b"\0\1\2" * 9000)]


@pytest.mark.parametrize("mark", [True, False])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@given(text=st.text(st.characters(min_codepoint=32, exclude_categories=["Cs"]), max_size=10))
@settings(max_examples=20, deadline=None)
def test_text_in_utf_16_and_utf_32_is_converted_and_said(encoding, mark, text):
    text = "Some words in Latin script.\r\n" * 40 + text * 20
    written = ("\ufeff" * mark + text).encode(encoding)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.txt").write_bytes(written)
        (Path(folder) / "b.txt.gz").write_bytes(gzip.compress(written))
        documents, notes = read_all(folder)
        assert documents == [text.encode()] * 2
        assert set(notes.values()) == {f"{encoding.upper()} text, converted to UTF-8"}
        assert read_all(folder, binary=True)[0] == [written] * 2


def test_bytes_that_only_begin_like_utf_16_are_kept(tmp_path):
    for data in (b"\xff\xfe", b"\xff\xfeabc", b"\xff\xfe\1\0\2\0" * 9, b"\0\0\0\0", b"a\0b\0c"):
        (tmp_path / "a.bin").write_bytes(data)
        assert read(tmp_path / "a.bin") == [("a", data)]


def test_utf_16_records_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(JSONL.decode().encode("utf-16"))
    (tmp_path / "b.json").write_bytes(json.dumps(RECORDS, indent=1).encode("utf-16"))
    assert read(tmp_path) == [(name, text) for name in "ab" for text in TEXTS]


def test_names_that_are_not_text_become_text(tmp_path):
    folder = os.path.join(os.fsencode(tmp_path), b"na\xffme")
    os.mkdir(folder)
    with open(os.path.join(folder, b"x.txt"), "wb") as file:
        file.write(b"text")
    assert read(os.fsdecode(folder)) == [("na?me", b"text")]
    (tmp_path / "a.jsonl").write_text('{"text": "x", "s": "\\ud800"}\n{"text": "y", "s": null}\n')
    assert read(tmp_path / "a.jsonl", source_field="s") == [("?", b"x"), ("a", b"y")]


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(JSONL)))
    options = ReadOptions(format="jsonl")
    (one,) = find_inputs(["-"], options)
    assert [(d.source, d.data) for d in Reader(options).read(one)] == [("stdin", t) for t in TEXTS]


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
    one, two = reader.records
    assert (one.documents, one.empty_documents, one.note) == (1, 1, "")
    assert (two.documents, two.empty_documents, two.note) == (0, 1, "empty")


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


SUFFIXES = [
    (suffix, COMPRESSORS[kind])
    for kind, names in {
        ".bz2": ".bz2 .bzip2 .bz2.part",
        ".gz": ".gz .gzip .GZ .gz.part .gz.1 .bin",
        ".lz4": ".lz4 .lz4.tmp",
        ".xz": ".xz .xz.part",
        ".zst": ".zst .zstd .zst.part",
    }.items()
    for suffix in names.split()
] + [(".lzma", partial(lzma.compress, format=lzma.FORMAT_ALONE))]


@pytest.mark.parametrize(("suffix", "compress"), SUFFIXES)
def test_compressions_are_known_by_content_or_name(tmp_path, suffix, compress):
    path = tmp_path / f"d.jsonl{suffix}"
    path.write_bytes(compress(JSONL))
    if suffix == ".bin":  # No suffix tells of records.
        assert read(path, format="jsonl") == [("d.jsonl", t) for t in TEXTS]
        assert read(path) == [("d.jsonl", JSONL)]
    else:
        assert read(path) == read(tmp_path) == [("d", t) for t in TEXTS]


UNREAD = {
    "a.txt.Z": (b"\x1f\x9d\x90ab", "compress"),
    "a.txt.br": (b"\x8b\x02\x80hello\x03\xff", "brotli"),
    "a.txt.lz": (b"LZIP\x01\x0c", "lzip"),
    "a.7z": (b"7z\xbc\xaf\x27\x1c\0", "a 7z archive"),
    "a.rar": (b"Rar!\x1a\x07\0", "a rar archive"),
    "a.old": (b"\x02\x21\x4c\x18abc", "legacy lz4"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_other_compressions_and_archives_are_named_with_a_remedy(tmp_path, name):
    data, kind = UNREAD[name]
    (tmp_path / name).write_bytes(data)
    (tmp_path / "good.txt").write_text("text")
    with pytest.raises(DataError, match=f"{name}: it is .*{kind}.*(decompress|unpack) it"):
        read(tmp_path / name)
    documents, notes = read_all(tmp_path)
    assert documents == [b"text"]
    assert kind in notes[name]
    assert read(tmp_path / name, binary=True)[0][1] == data


def test_text_with_the_suffix_of_a_compression_that_is_not_read_is_text(tmp_path):
    (tmp_path / "breizh.br").write_text("Demat d'an holl")
    assert read(tmp_path / "breizh.br") == [("breizh", b"Demat d'an holl")]


@pytest.mark.parametrize("log", [27, 28, 30, 31])
def test_zstandard_with_long_windows(tmp_path, log):
    (tmp_path / "a.txt.zst").write_bytes(zstd_with_window(log, b"some text\n") * 2)
    assert read(tmp_path / "a.txt.zst") == [("a", b"some text\n" * 2)]
    (tmp_path / "a.txt.zst").write_bytes(zstd_with_window(log, b"some text\n")[:-4])
    with pytest.raises(DataError, match=r"cannot read .*a\.txt\.zst"):
        read(tmp_path / "a.txt.zst")


def test_zstandard_beyond_the_bound_names_the_remedy(tmp_path, monkeypatch):
    data = bytearray(zstd_with_window(31, b"some text\n"))
    data[5] = 22 << 3  # A window of 2**32 bytes.
    (tmp_path / "a.txt.zst").write_bytes(data)
    with pytest.raises(DataError, match=r"4,096 MiB is above 2,048 MiB: .*zstd -d --long=31"):
        read(tmp_path / "a.txt.zst")
    (tmp_path / "a.txt.zst").write_bytes(zstd_with_window(28, b"some text\n"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(DataError, match=r"256 MiB needs a package: install bytelm\[zstd\]"):
        read(tmp_path / "a.txt.zst")


@pytest.mark.parametrize("content_size", [0, 200, 300, 70_000, 2**28])
def test_window_sizes_are_those_of_the_library(content_size):
    size = content_size or -1
    for log in (10, 17, 27, 31):
        options = zstandard.ZstdCompressionParameters(
            window_log=log, write_content_size=content_size > 0
        )
        codec = zstandard.ZstdCompressor(compression_params=options).compressobj(size=size)
        data = codec.compress(b"x") + codec.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        expected = zstandard.get_frame_parameters(data)
        assert window_size(data) == expected.window_size
        assert window_size(b"\x50\x2a\x4d\x18\2\0\0\0ab" + data) == expected.window_size


JSON_SHAPES = {
    "lines": lambda records: "".join(json.dumps(r) + "\n" for r in records),
    "array": json.dumps,
    "indented array": partial(json.dumps, indent=2),
    "array of lines": lambda records: "[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n",
    "indented objects": lambda records: "\n".join(json.dumps(r, indent=1) for r in records),
}


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
@pytest.mark.parametrize("shape", JSON_SHAPES)
@given(texts=st.lists(st.text(min_size=1).map(lambda text: text * 50), min_size=1, max_size=5))
@settings(max_examples=15, deadline=None)
def test_json_files_of_any_shape_are_read_as_records(suffix, shape, texts):
    records = [{"id": i, "text": text, "n": [1, {}]} for i, text in enumerate(texts)]
    data = JSON_SHAPES[shape](records).encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"c4-train.00000-of-01024{suffix}"
        path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
        expected = [("c4-train", to_bytes(text)) for text in texts]
        assert read(path) == read(folder) == expected


def test_long_arrays_are_read_in_linear_time_and_parts(tmp_path):
    records = [{"text": "word " * length} for length in (3, 500_000, 7, 100_000, 1)] * 2
    (tmp_path / "a.json").write_text(json.dumps(records))
    assert read(tmp_path) == [("a", record["text"].encode()) for record in records]


@pytest.mark.parametrize("suffix", [".jsonl", ".jl", ".jsonlines", ".ndjson", ".ldjson", ".json"])
def test_suffixes_of_records(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes(b"\n" + JSONL)
    assert read(tmp_path / f"a{suffix}") == read(tmp_path) == [("a", t) for t in TEXTS]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"plain words", "holds neither .* --format text reads the file as text"),
        (b"[1, 2]", "holds neither .* record 1 holds int, not an object; --format text"),
        (b'{"name": "x"}', "has no field 'text'; it has 'name'.*--format text"),
        (b'[{"text": "a"}, {"text": "b"}', "record 3 is not JSON: it ends too early"),
        (b'[{"text": "a"}, {"text": "b', "record 2 is not JSON"),
        (b'{\n"text": "a"}\n{"text": ', "record 2 is not JSON"),
        (b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
    ],
)
def test_json_that_holds_no_records_names_the_remedy(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(path)
    assert read(path, format="text") == [("a", content)]


def test_other_json_and_julia_in_folders_stay_text(tmp_path):
    files = {"package.json": b'{\n "name": "x"\n}', "main.jl": b"f(x) = x + 1\n", "e.json": b"[]"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "r.json").write_text(json.dumps(RECORDS))
    documents, notes = read_all(tmp_path)
    assert documents == [files["e.json"], files["main.jl"], files["package.json"], *TEXTS]
    assert notes["package.json"] == "its records have no 'text': read as text"
    assert notes["e.json"] == "holds no records: read as text"
    assert notes["r.json"] == ""


def test_records_that_are_read_as_one_document_are_pointed_out(tmp_path):
    (tmp_path / "a.jsonl.bak").write_bytes(JSONL)
    documents, notes = read_all(tmp_path)
    assert documents == [JSONL]
    assert notes == {"a.jsonl.bak": "holds JSON: --format jsonl reads its lines as records"}


def pipe(data):
    """Return the path of a pipe from which data can be read, as a shell's <(...) makes it."""
    reading, writing = os.pipe()

    def write():
        with os.fdopen(writing, "wb") as file:
            file.write(data)

    threading.Thread(target=write, daemon=True).start()
    return f"/dev/fd/{reading}"


@pytest.mark.skipif(not os.path.isdir("/dev/fd"), reason="needs /dev/fd")
def test_pipes_are_read(tmp_path):
    numbers = b"".join(b"%d\n" % i for i in range(50_000))
    (tmp_path / "a.txt").write_text("a")
    assert read(tmp_path / "a.txt", f"more={pipe(numbers)}") == [("a", b"a"), ("more", numbers)]
    assert read(pipe(b"hi\n")) == [("pipe", b"hi\n")]
    for compress in COMPRESSORS.values():
        found = read(pipe(compress(JSONL * 1000)), format="jsonl")
        assert found == [("pipe", t) for t in TEXTS] * 1000
    assert read(pipe(json.dumps(RECORDS).encode()), format="json") == [("pipe", t) for t in TEXTS]
    os.mkfifo(tmp_path / "named-00.jsonl")
    thread = threading.Thread(target=(tmp_path / "named-00.jsonl").write_bytes, args=(JSONL,))
    thread.start()
    assert read(tmp_path / "named-00.jsonl") == [("named", t) for t in TEXTS]
    thread.join()
    documents, notes = read_all(tmp_path)
    assert documents == [b"a"]
    assert notes["named-00.jsonl"] == "neither a file nor a folder"
    for path in (pipe(b"PK\3\4"), pipe(gzip.compress(b"PAR1"))):
        with pytest.raises(DataError, match=r"unpack it|decompress it"):
            read(path)


def test_links_are_followed_once_and_what_cannot_be_read_is_named(tmp_path):
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "far.txt").write_text("far")
    (root / "a.txt").write_text("a")
    (root / "sub" / "b.txt").write_text("b")
    (root / "again").symlink_to(root / "sub")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "sub" / "parent").symlink_to(root)
    (root / "self").symlink_to("self")
    (root / "gone").symlink_to("nowhere")
    (root / "copy.txt").symlink_to("a.txt")
    documents, notes = read_all(root)
    assert documents == [b"a", b"b", b"far"]
    already = "a link to a folder that is read already"
    assert notes["sub"] == notes["again/parent"] == already
    assert notes["gone"] == "a broken link"
    assert notes["self"].startswith("cannot be read: ")
    assert notes["copy.txt"] == f"the same as {root}/a.txt, which is read"
    assert {name for name, note in notes.items() if not note} == {
        "a.txt", "again/b.txt", "linked/far.txt"}  # fmt: skip
    with pytest.raises(DataError, match="gone is a broken link: mend it"):
        read(root / "gone")


@pytest.mark.parametrize("name", ["sub", "b.txt"])
def test_what_may_not_be_read_is_named(tmp_path, monkeypatch, name):
    (tmp_path / "root" / "sub").mkdir(parents=True)
    (tmp_path / "root" / "a.txt").write_text("a")
    (tmp_path / "root" / "b.txt").write_text("b")
    (tmp_path / "root" / "sub" / "c.txt").write_text("c")

    def forbid(function):
        def checked(path, *args, **kwargs):
            if Path(path).name == name:
                raise PermissionError(13, "Permission denied", str(path))
            return function(path, *args, **kwargs)

        return checked

    # Permissions do not stop root, as whom tests may run.
    monkeypatch.setattr(os, "scandir", forbid(os.scandir))
    monkeypatch.setattr(Path, "open", forbid(Path.open))
    documents, notes = read_all(tmp_path / "root")
    assert set(documents) == {b"a", b"b", b"c"} - {{"sub": b"c", "b.txt": b"b"}[name]}
    assert notes[name] == "cannot be read: Permission denied"
    with pytest.raises(DataError, match=f"cannot read .*{name}: Permission denied; check its"):
        read(tmp_path / "root" / name)


def test_a_file_of_two_inputs_is_read_once_with_a_word(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "sub" / "b.txt").write_text("b")
    spelled = tmp_path / "sub" / ".." / "a.txt"
    reader = Reader(ReadOptions())
    inputs = find_inputs([str(spelled), str(tmp_path), f"x={tmp_path}/sub"], ReadOptions())
    assert [d.data for one in inputs for d in reader.read(one)] == [b"a", b"b"]
    notes = [record.note for record in reader.records]
    same = "the same as {}, which is read"
    assert notes == ["", same.format(spelled), "", same.format(tmp_path / "sub" / "b.txt")]
    prepare([str(tmp_path / "a.txt")], tmp_path / "d", PrepareOptions(validation_share=0.0))
    assert len(read(tmp_path / "d", tmp_path / "d")) == 1


def test_patterns_and_folders_that_match_nothing_are_named(tmp_path):
    for name in ("one", "two", "none"):
        (tmp_path / name).mkdir()
    (tmp_path / "one" / "a.py").write_text("a")
    (tmp_path / "two" / "b.md").write_text("b")
    folders = [str(tmp_path / name) for name in ("one", "two", "none")]
    inputs = find_inputs(folders, ReadOptions(include="*.py"))
    nothing = "no file in it matches --include"
    assert [one.note for one in inputs] == ["", nothing, nothing]
    assert find_inputs(folders, ReadOptions())[-1].note == "no file in it"
    with pytest.raises(DataError, match=r"hold no file to read: .*/two \(no file in it matches"):
        find_inputs(folders[1:], ReadOptions(include="*.py"))


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


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_damaged_files_are_passed_over_from_where_they_cannot_be_read(tmp_path, suffix):
    lines = [f"line {i}, {i * 7919 % 10007}\n".encode() for i in range(20_000)]
    whole = COMPRESSORS[suffix](b"".join(lines))
    (tmp_path / f"a.txt{suffix}").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b.txt").write_bytes(b"whole")
    with pytest.raises(DataError, match=f"a\\.txt{suffix}: .*add --skip-invalid to pass over"):
        read(tmp_path)
    documents, notes = read_all(tmp_path, skip_invalid=True)
    assert documents[-1] == b"whole"
    assert notes["b.txt"] == ""
    assert notes[f"a.txt{suffix}"].startswith("not read to its end: ")
    assert all(b"".join(lines).startswith(one) for one in documents[:-1])
    # Lines up to the damage are the beginning of the file too.
    documents, _ = read_all(tmp_path, skip_invalid=True, format="lines", include="a*")
    assert documents == [line.rstrip() for line in lines[: len(documents)]]
    if suffix == ".gz":
        assert len(documents) > 5000


@pytest.mark.parametrize("name", ["a.parquet", "a.json.gz", "a.jsonl.gz"])
def test_damaged_files_of_records_are_passed_over_too(tmp_path, name):
    pq.write_table(pa.table({"text": ["x" * 100] * 1000}), tmp_path / name)
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress(JSONL * 1000))
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b.txt").write_bytes(b"whole")
    documents, notes = read_all(tmp_path, skip_invalid=True)
    assert documents[-1] == b"whole"
    assert set(documents[:-1]) <= set(TEXTS)
    assert "not read to its end: " in notes[name]
    assert "empty" not in notes[name]


def test_missing_inputs_are_named(tmp_path):
    with pytest.raises(DataError, match="'no/such' matches no file"):
        read("no/such")
    with pytest.raises(DataError, match="hold no file to read"):
        read(tmp_path)
    with pytest.raises(DataError, match="there are no inputs: name at least one"):
        bytelm.prepare([], tmp_path / "d")
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


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_no_more_than_max_bytes_of_an_input_are_read_which_is_noted(tmp_path, name):
    (tmp_path / name).write_bytes(JSONL * 3000)
    (source,) = find_inputs([str(tmp_path)], ReadOptions())
    reader = Reader(ReadOptions(max_bytes=1000))
    size = sum(len(document.data) for document in reader.read(source))
    assert 1000 <= size < 1100
    assert f"only the first {size:,} bytes are read" in reader.records[0].note


def test_a_short_document_is_not_cut(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n")
    assert read(tmp_path / "a.txt", cut_bytes=8) == [("a", b"one\ntwo\n")]
