"""Fields of records: exact bytes, nested fields, names of classes."""

import json
import re
import tempfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bytelm
from bytelm.data import Reader, ReadOptions, find_inputs
from bytelm.data.records import Fields
from bytelm.data.tables import parquet_records
from bytelm.errors import DataError


def documents(path, **options):
    chosen = ReadOptions(**options)
    reader = Reader(chosen)
    return [d for one in find_inputs([str(path)], chosen) for d in reader.read(one)]


def read(path, **options):
    return [(d.source, d.data) for d in documents(path, **options)]


def unchecked(values, kind):
    """Return an Arrow array of strings that are not checked to be UTF-8."""
    raw = pa.array(values, pa.large_binary() if kind == pa.large_string() else pa.binary())
    return pa.Array.from_buffers(kind, len(raw), raw.buffers())


def save_dataset(table, folder):
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset(table).save_to_disk(folder)
    return folder


WRITERS = {
    "parquet": lambda table, path: (
        pq.write_table(table, path.with_suffix(".parquet")) or path.with_suffix(".parquet")
    ),
    "datasets": save_dataset,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()], ids=str)
def test_strings_that_are_not_utf8_give_their_exact_bytes(tmp_path, write, kind):
    column = unchecked([b"caf\xe9", b"\xff\xfe", "é".encode()], kind)
    nested = pa.StructArray.from_arrays([column], ["text"])
    table = pa.table({"text": column, "doc": nested, "source": column})
    path = write(table, tmp_path / "d")
    expected = [b"caf\xe9", b"\xff\xfe", "é".encode()]
    assert [data for _, data in read(path)] == expected
    assert [data for _, data in read(path, field="doc.text")] == expected
    named = read(path, source_field="source")
    assert [source for source, _ in named] == ["caf\ufffd", "\ufffd\ufffd", "é"]


@given(st.lists(st.binary(min_size=1), min_size=1))
def test_a_parquet_column_gives_the_bytes_that_it_holds(values):
    column = unchecked(values, pa.string())
    lists = pa.ListArray.from_arrays(range(len(values) + 1), column)
    name = pa.array(["é"] * len(values)).dictionary_encode()
    table = pa.table({"text": column, "lists": lists, "name": name})
    with tempfile.TemporaryFile() as file:
        pq.write_table(table, file)
        for field, expected in [("text", values), ("lists", [[value] for value in values])]:
            records = list(parquet_records(file, Fields(field, "name"), "x"))
            assert records == [{field: value, "name": "é".encode()} for value in expected]


def test_bytes_in_json_that_are_not_utf8_are_kept(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "caf\xe9 \\u00e9"}\n')
    assert read(tmp_path / "a.jsonl") == [("a", b"caf\xe9 \xc3\xa9")]


NESTED = [
    {"doc": {"text": "one", "meta": {"lang": "en"}}, "a.b": "own", "a": {"b": "nested"}},
    {"doc": {"text": "two", "meta": {"lang": "de"}}, "a.b": "own", "a": {"b": "nested"}},
]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", ""])
def test_nested_fields_are_named_with_dots(tmp_path, suffix):
    path = tmp_path / f"d.{suffix}" if suffix else tmp_path / "d"
    table = pa.Table.from_pylist(NESTED)
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in NESTED))
    elif suffix == "parquet":
        pq.write_table(table, path)
    else:
        save_dataset(table, path)
    found = read(path, field="doc.text", source_field="doc.meta.lang")
    assert found == [("en", b"one"), ("de", b"two")]
    # A field whose own name has a dot comes first.
    assert [data for _, data in read(path, field="a.b")] == [b"own", b"own"]
    with pytest.raises(DataError, match=r"has no (column|field) 'doc\.txt'; it has"):
        read(path, field="doc.txt")
    with pytest.raises(DataError, match=r"holds {.*}, not text"):
        read(path, field="doc")


def test_a_missing_parent_of_a_nested_field_is_an_invalid_record(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"doc": null}\n{"doc": {"text": "x"}}\n{"doc": "y"}\n')
    with pytest.raises(DataError, match=r"line 1 has no field 'doc\.text'"):
        read(tmp_path / "a.jsonl", field="doc.text")
    assert read(tmp_path / "a.jsonl", field="doc.text", skip_invalid=True) == [("a", b"x")]


def test_fields_that_may_be_meant_are_named(tmp_path):
    records = {"doc": {"text": "a", "title": "b"}, "meta": {"id": 1}, "more": {"id": 2}}
    (tmp_path / "a.jsonl").write_text(json.dumps(records))
    pq.write_table(pa.Table.from_pylist([records]), tmp_path / "a.parquet")
    for field, hint in (
        ("text", "did you mean 'doc.text'?"),
        ("dok.titel", "did you mean 'doc.title'?"),
        ("id", "did you mean one of 'meta.id', 'more.id'?"),
        ("doc.text,mor", "did you mean 'more'?"),
    ):
        for name in ("a.jsonl", "a.parquet"):
            with pytest.raises(DataError, match=re.escape(f"(or --source-field); {hint}")):
                bytelm.prepare(tmp_path / name, tmp_path / "d", field=field)


@pytest.mark.parametrize("is_parquet", [False, True])
def test_labels_give_the_names_of_their_classes(tmp_path, is_parquet):
    import datasets

    datasets.disable_progress_bars()
    label = datasets.ClassLabel(names=["neg", "pos"])
    features = {"text": datasets.Value("string"), "label": label, "meta": {"label": label}}
    rows = {"text": list("abc"), "label": [1, 0, -1], "meta": [{"label": n} for n in (0, 1, 1)]}
    dataset = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    path = tmp_path / ("d.parquet" if is_parquet else "d")
    if is_parquet:
        dataset.to_parquet(path)
    else:
        dataset.save_to_disk(path)
    found = read(path, source_field="label")
    assert found == [("pos", b"a"), ("neg", b"b"), ("d", b"c")]
    assert [source for source, _ in read(path, source_field="meta.label")] == ["neg", "pos", "pos"]


def test_the_last_of_several_fields_is_trained_on(tmp_path):
    records = [{"q": "a? ", "in": {"put": "b "}, "r": "c"}, {"q": "", "in": {"put": ""}, "r": "d"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    found = documents(tmp_path / "a.jsonl", field="q, in.put, r")
    assert [(d.data, d.ranges) for d in found] == [(b"a? b c", ((5, 6),)), (b"d", ((0, 1),))]
    with pytest.raises(DataError, match="line 1 has no field 'answer'"):
        read(tmp_path / "a.jsonl", field="q,answer")
    pq.write_table(pa.table({"q": ["x"], "r": ["y"], "q,r": ["own"]}), tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet", field="r,q") == [("b", b"yx")]
    # A field whose own name has a comma comes first.
    assert documents(tmp_path / "b.parquet", field="q,r")[0][:2] == (b"own", "b")
    with pytest.raises(DataError, match="has no column 'p'; it has q, r, q,r"):
        read(tmp_path / "b.parquet", field="p,r")
