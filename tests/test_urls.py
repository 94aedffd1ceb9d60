"""Text at URLs: the documents of local files, streamed, and what cannot be read said early."""

import functools
import gzip
import http.server
import json
import random
import re
import threading

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bytelm.data import PrepareOptions, Reader, ReadOptions, find_inputs, prepare
from bytelm.data.urls import Remote, find_remote, is_url
from bytelm.errors import DataError

TEXTS = [f"text {n} " * (n + 1) for n in range(30)]


class Files(http.server.SimpleHTTPRequestHandler):
    """Server of a folder that refuses what is called secret, and breaks off what is "broken"."""

    asked = ()

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.asked.append(("HEAD", self.path))
        self.send_error(403) if "secret" in self.path else super().do_HEAD()

    def do_GET(self):
        self.asked.append(("GET", self.path))
        if "secret" in self.path:
            self.send_error(403)
        elif "broken" in self.path:
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            self.wfile.write(b'{"text": "some"}\n' * 1000)
        else:
            super().do_GET()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "web"
    folder.mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (folder / "books-01.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "plain.txt").write_text(TEXTS[3])
    pq.write_table(pa.table({"text": TEXTS}), folder / "table.parquet")
    return folder


@pytest.fixture
def server(folder):
    handler = type("Asked", (Files,), {"asked": []})
    web = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=folder)
    )
    thread = threading.Thread(target=web.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{web.server_address[1]}", handler.asked
    web.shutdown()
    web.server_close()
    thread.join()


@pytest.fixture
def memory(folder):
    """The files in the memory of this process, with a hidden one."""
    system = fsspec.filesystem("memory")
    for path in folder.iterdir():
        system.pipe_file(f"/corpus/in/{path.name}", path.read_bytes())
    system.pipe_file("/corpus/.hidden/x.txt", b"not read")
    yield "memory://corpus"
    system.rm("/corpus", recursive=True)


def read(*arguments, options=None):
    options = options or ReadOptions()
    reader = Reader(options)
    found = find_inputs(arguments, options)
    return [(d.source, d.data) for one in found for d in reader.read(one)], reader.records


def test_urls_are_told_from_paths():
    assert is_url("s3://bucket/key=1/*.txt")
    assert not is_url("hub:owner/name")
    assert not is_url("/data/http://x")
    assert Remote("http://host/a/b%20c.jsonl.gz?token=x/y", None, "").file_name == "b c.jsonl.gz"


@pytest.mark.parametrize("name", ["books-01.jsonl.gz", "plain.txt", "table.parquet"])
def test_a_file_at_an_address_is_read_as_a_local_one(server, folder, name):
    remote, records = read(f"{server[0]}/{name}")
    assert remote == read(str(folder / name))[0]
    assert records[0].name == f"{server[0]}/{name}"


def test_a_long_file_of_a_server_that_sends_no_parts_is_streamed(server, folder):
    noise = random.Random(0).randbytes(12_000_000)
    (folder / "long.bin").write_bytes(noise)
    options = ReadOptions(binary=True, cut_bytes=4_000_000)
    found, _ = read(f"{server[0]}/long.bin", options=options)
    assert b"".join(data for _, data in found) == noise


def test_an_address_can_have_a_query_and_a_source_can_be_named(server):
    found, _ = read(f"mine={server[0]}/plain.txt?a=b")
    assert found == [("mine", TEXTS[3].encode())]


@pytest.mark.parametrize("where", ["", "/in", "/in/*", "/i*/*.*"])
def test_folders_and_globs_hold_the_same_as_local_ones(memory, folder, where):
    found, _ = read(memory + where)
    expected, _ = read(str(folder))
    assert sorted(data for _, data in found) == sorted(data for _, data in expected)
    assert {"books", "table"} < {source for source, _ in found}
    assert len(read(memory, options=ReadOptions(include="*.txt"))[0]) == 1


def test_data_from_urls_is_prepared_once_and_again_if_they_change(memory, folder, tmp_path):
    options = PrepareOptions(validation_share=0.1)
    made = prepare([memory], tmp_path / "d", options)
    local = prepare([str(folder)], tmp_path / "local", options)
    assert made.fingerprint != ""
    assert sorted(made.sources().values(), key=str) == sorted(local.sources().values(), key=str)
    assert prepare([memory], tmp_path / "d", options) == made
    fsspec.filesystem("memory").pipe_file("/corpus/in/plain.txt", b"changed")
    with pytest.raises(DataError, match=r"other settings \(inputs differ\)"):
        prepare([memory], tmp_path / "d", options)


def test_a_url_twice_is_read_once(memory):
    found, records = read(f"{memory}/in/plain.txt", f"{memory}/in/*.txt")
    assert len(found) == 1
    assert records[1].note.startswith("the same as memory://")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.txt", "there is nothing at .*missing.txt: check the address"),
        ("secret.txt", "permission denied; check the credentials"),
        ("whole.parquet", "cannot read .*whole.parquet: .*range requests"),
    ],
)
def test_what_a_server_refuses_is_said(server, folder, tmp_path, name, message):
    if name == "whole.parquet":
        noise = [random.Random(n).randbytes(1_000_000) for n in range(20)]
        pq.write_table(pa.table({"text": noise}), folder / name)
    with pytest.raises(DataError, match=message):
        prepare([f"{server[0]}/{name}"], tmp_path / "d", PrepareOptions())


def test_a_file_that_breaks_off_is_an_error_even_if_damage_is_skipped(server, tmp_path):
    options = PrepareOptions(read=ReadOptions(skip_invalid=True, format="jsonl"))
    with pytest.raises(DataError, match=r"broken.jsonl: .*check the address and the network"):
        prepare([f"{server[0]}/broken.jsonl"], tmp_path / "d", options)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:9/x.txt", r"cannot read http://127.0.0.1:9/x.txt: .*the network"),
        ("memory://nothing/x.txt", "there is nothing at memory://nothing/x.txt"),
        ("memory://nothing/*.txt", r"memory://nothing/\*.txt matches no file"),
        ("nonsense://x/y.txt", "nonsense.*check the beginning of the URL"),
    ],
)
def test_urls_that_cannot_be_reached_are_named(url, message, tmp_path):
    with pytest.raises(DataError, match=message):
        prepare([url], tmp_path / "d", PrepareOptions())
    assert not (tmp_path / "d").exists()


def test_a_missing_package_is_named(monkeypatch):
    def need(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", need)
    with pytest.raises(DataError, match=re.escape("cannot read s3://b/k: Install s3fs")):
        find_remote("s3://b/k", None)
