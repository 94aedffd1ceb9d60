"""Data sets of the Hub by name, tested on a local copy of one."""

import socket

import pytest

from bytelm.data import PrepareOptions, Reader, ReadOptions, find_inputs, prepare
from bytelm.data.hub import hub_parts
from bytelm.errors import DataError

CARD = """---
configs:
- config_name: en
  data_files:
  - {split: train, path: "en/train-*.parquet"}
  - {split: test, path: "en/test.parquet"}
- config_name: chats
  data_files: "chats/*.parquet"
---
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A data set with two configurations, one of them with two splits."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("hub") / "letters"
    (folder / "en").mkdir(parents=True)
    (folder / "chats").mkdir()
    (folder / "README.md").write_text(CARD)
    for name, texts in (("train-0", ["a", "b"]), ("train-1", ["c"]), ("test", ["d"])):
        values = pa.array([text.encode() + b"\xe9" for text in texts]).view(pa.string())
        table = pa.table({"text": values, "n": list(range(len(texts)))})
        pq.write_table(table, folder / "en" / f"{name}.parquet")
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    pq.write_table(pa.Table.from_pylist([{"messages": turns}]), folder / "chats" / "x.parquet")
    return folder


def read(argument, **options):
    chosen = ReadOptions(**options)
    reader = Reader(chosen)
    return [(d.source, d.data) for i in find_inputs([argument], chosen) for d in reader.read(i)]


def test_a_data_set_is_streamed_by_name(copy, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    trained = [("letters", text + b"\xe9") for text in (b"a", b"b", b"c")]
    assert read(f"hub:{copy}:en") == trained
    assert read(f"hub:{copy}:en:test") == [("letters", b"d\xe9")]
    assert read(f"own=hub:{copy}:en:test") == [("own", b"d\xe9")]
    ((_, chat),) = read(f"hub:{copy}:chats", field="messages")
    assert b"Hi" in chat
    assert b"Hello" in chat
    # Nothing is kept.
    assert not list(tmp_path.rglob("*.arrow"))


def test_it_is_prepared_like_any_input(copy, tmp_path):
    options = PrepareOptions(workers=1, validation_share=0.0)
    data = prepare([f"hub:{copy}:en"], tmp_path / "d", options)
    again = prepare([f"hub:{copy}:en"], tmp_path / "d", options)
    assert data == again
    other = prepare([f"hub:{copy}:en:test"], tmp_path / "e", options)
    assert (tmp_path / "e").is_dir()
    assert other != data


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("", "missing.*'chats'"),
        (":de", "de"),
        (":en:validation", "validation"),
        (":en:test:x", "must look like"),
    ],
)
def test_what_cannot_be_read_is_explained_in_one_line(copy, rest, message):
    with pytest.raises(DataError, match=message) as caught:
        read(f"hub:{copy}{rest}")
    assert "\n" not in str(caught.value)


def test_without_a_network_the_remedy_is_named(monkeypatch):
    import datasets

    def refuse(*arguments, **options):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"service not known; check the name.*network.*copy"):
        read("hub:nobody/nothing")


def test_a_missing_column_is_named(copy):
    with pytest.raises(DataError, match="no column 'body'"):
        read(f"hub:{copy}:en", field="body")


def test_names_have_up_to_three_parts():
    assert hub_parts("hub:a/b") == ("a/b", None, "train")
    assert hub_parts("hub:a/b:c") == ("a/b", "c", "train")
    assert hub_parts("hub:a/b::test") == ("a/b", None, "test")
    with pytest.raises(DataError, match="must look like"):
        hub_parts("hub:")
