"""Prompts of a file: each continued as if alone, and no answer lost or mixed up with another."""

import base64
import gzip
import io
import json
import signal
import sys

import pytest

import bytelm
from builders import random_patched
from bytelm.checkpoint import save_model
from bytelm.errors import ConfigError, DataError, NumericalError
from bytelm.inference import Request, Sampling
from bytelm.prompts import MAX_NAMED, Prompt, answer_prompts, read_prompts, resume
from bytelm.storage import to_json
from test_checkpoint import patched_description

DEFAULTS = Request(b"", 12, Sampling(temperature=0.9, seed=5), (b"q",))
OPTIONS = ("--max-bytes", 12, "--temperature", "0.9", "--seed", 5, "--stop", "q")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "model"
    model = random_patched(reset=True)
    save_model(path, model, patched_description(model))
    return path


@pytest.fixture(scope="module")
def lm(folder):
    return bytelm.load(folder, device="cpu")


def read(text, name="standard input"):
    return read_prompts(
        io.BytesIO(text if isinstance(text, bytes) else text.encode()), name, DEFAULTS
    )


def json_lines(*records):
    return "".join(json.dumps(one) + "\n" for one in records)


def alone(lm, request):
    return lm.generate(
        request.prompt, max_bytes=request.max_bytes, sampling=request.sampling, stop=request.stop
    )


def exact(record):
    """Return the bytes of an answer."""
    if "bytes" in record:
        return base64.b64decode(record["bytes"])
    return record["text"].encode()


def records_of(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def files(tmp_path):
    """A file of prompts, and the path of the answers."""
    lengths = [3, 14, 1, 9, 0, 20, 5]
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        json_lines(
            *({"prompt": f"the {n} ", "max_bytes": length} for n, length in enumerate(lengths))
        )
    )
    return path, tmp_path / "answers.jsonl"


@pytest.mark.parametrize("name", ["standard input", "a.txt", "a"])
def test_each_line_of_text_is_a_prompt(name):
    prompts = read(b"\xef\xbb\xbfone \r\n\n \n\xfftwo\n{three", name)
    assert [one.request.prompt for one in prompts] == [b"one ", b"\xfftwo", b"{three"]
    assert [one.index for one in prompts] == [0, 1, 2]
    assert [one.request.sampling.seed for one in prompts] == [5, 6, 7]
    assert {(one.request.max_bytes, one.request.stop) for one in prompts} == {(12, (b"q",))}


def test_a_text_of_objects_is_json_lines_unless_its_name_says_otherwise():
    line = '{"prompt": "a"}'
    assert read(line)[0].request.prompt == b"a"
    assert read(line, "a.txt")[0].request.prompt == line.encode()
    assert read(gzip.compress(line.encode()), "a.jsonl.gz")[0].request.prompt == b"a"


def test_objects_override_the_options():
    own = {
        "max_bytes": 3, "temperature": 1, "top_k": 4, "top_p": 0.5, "min_p": 0.25, "seed": -9,
        "stop": ["x", "é"], "id": "mine", "other": [1],
    }  # fmt: skip
    nothing = dict.fromkeys(own)
    prompts = read(json_lines({"text": "a", **own}, {"prompt": "b", "text": "c", **nothing}))
    sampling = Sampling(1.0, 4, 0.5, 0.25, -9)
    assert prompts == [
        Prompt(0, "mine", Request(b"a", 3, sampling, (b"x", "é".encode()))),
        Prompt(1, None, Request(b"b", 12, Sampling(0.9, seed=6), (b"q",))),
    ]
    assert read(json_lines({"prompt": "a", "stop": "xy", "id": 3}))[0].request.stop == (b"xy",)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds list, not an object"),
        ('{"promt": "a"}', "needs a text in the field 'prompt'"),
        ('{"prompt": 3}', "needs a text in the field 'prompt'"),
        ('{"prompt": "a", "max_bytes": "3"}', "max_bytes must be an integer, not '3'"),
        ('{"prompt": "a", "max_bytes": -1}', "max_bytes must be at least 0, not -1"),
        ('{"prompt": "a", "seed": true}', "seed must be an integer, not True"),
        ('{"prompt": "a", "seed": 1e3}', "seed must be an integer, not 1000.0"),
        ('{"prompt": "a", "top_p": 3}', "top_p must be above 0 and at most 1, not 3"),
        ('{"prompt": "a", "temperature": NaN}', "temperature must be 0"),
        ('{"prompt": "a", "temperature": 1' + "0" * 400 + "}", "too large"),
        ('{"prompt": "a", "stop": [""]}', "a stop string must not be empty"),
        ('{"prompt": "a", "stop": [1]}', "stop must be a text or a list of texts"),
        ('{"prompt": "a", "id": []}', "id must be a text or a number"),
    ],
)
def test_a_bad_line_is_named(line, message):
    good = '{"prompt": "a"}\n'
    with pytest.raises(DataError) as error:
        read(f"{good}\n{line}\n{good}")
    assert str(error.value).startswith("standard input line 3: ")
    assert message in str(error.value)
    with pytest.raises(DataError, match=r"wrong too: line 4, .*, 11, \.\.\."):
        read(good + good + f"{line}\n" * (MAX_NAMED + 2))


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_file_without_prompts_is_an_error(text):
    with pytest.raises(DataError, match="holds no prompts"):
        read(text)


def test_answers_are_those_of_single_generation_and_come_as_they_end(lm):
    lengths = [30, 2, 17, 0, 5, 9]
    prompts = read(
        json_lines(*({"prompt": f"a {n}", "max_bytes": one} for n, one in enumerate(lengths)))
    )
    seen = []
    answers = list(answer_prompts(lm, prompts, num_slots=3, report=seen.append))
    assert sorted(one.prompt.index for one in answers) == list(range(6))
    assert answers[0].prompt.index != 0
    for one in answers:
        assert one.data == alone(lm, one.prompt.request)
        assert one.finish in ("length", "end", "stop")
    assert seen == sorted(seen)
    assert seen[-1] == sum(len(one.data) for one in answers)


def test_bytes_that_are_not_utf8_are_exact(lm):
    prompts = read(json_lines(*({"prompt": "a", "temperature": 3, "id": n} for n in range(9))))
    answers = list(answer_prompts(lm, prompts))
    records = records_of("\n".join(to_json(one.record()) for one in answers))
    assert [record["id"] for record in records] == [one.prompt.index for one in answers]
    assert [exact(record) for record in records] == [one.data for one in answers]
    assert {"bytes" in record for record in records} == {"\ufffd" in r["text"] for r in records}
    assert any("bytes" in record for record in records)


def test_an_error_of_one_prompt_leaves_the_others(run, folder, lm, tmp_path, monkeypatch):
    path = tmp_path / "p.jsonl"
    path.write_text(json_lines({"prompt": "a"}, {"prompt": "b" * 40, "id": "b"}, {"prompt": "c"}))
    command = ("generate", folder, "--prompts", path, *OPTIONS, "--max-document-bytes", 40)
    status, out, err = run(*command)
    assert status == 1
    assert err.endswith("1 of 3 prompts have no answer, but an error\n")
    first, *others = records_of(out)
    assert first.keys() == {"index", "id", "error"}
    assert (first["index"], first["id"]) == (1, "b")
    assert "40 bytes and 12 more are over the limit of 40" in first["error"]
    assert "--max-document-bytes" in first["error"]
    assert sorted(one["index"] for one in others) == [0, 2]

    from bytelm.inference.continuation import Continuation

    choose = Continuation.choose

    def fail(continuation, prediction):
        if continuation._sampler._sampling.seed == 7:
            raise NumericalError("not numbers")
        yield from choose(continuation, prediction)

    monkeypatch.setattr(Continuation, "choose", fail)
    records = records_of(run(*command)[1])
    assert {one["index"]: one.get("error") for one in records}[2] == "not numbers"
    assert "text" in next(one for one in records if one["index"] == 0)


def test_an_error_that_is_no_ones_fault_ends_everything(lm, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("bytelm.inference.engine.Engine._predictions", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(answer_prompts(lm, read("a")))


def test_the_command_writes_a_file_and_resumes_after_a_kill(run, folder, lm, files):
    path, out = files
    command = ("generate", folder, "--prompts", path, *OPTIONS, "--slots", 2, "--out", out)
    status, printed, err = run(*command)
    assert (status, printed) == (0, "")
    assert err.startswith("generating 7/7 ")
    assert "bytes/s" in err
    whole = out.read_text()
    answers = {one["index"]: exact(one) for one in records_of(whole)}
    prompts = read(path.read_bytes())
    assert answers == {one.index: alone(lm, one.request) for one in prompts}

    lines = whole.splitlines(keepends=True)
    for end in (0, 1, 9, 10, 11, 40, len(lines[0]), len(whole) - 1):
        out.write_text(whole[:end])
        done = whole[:end].count("\n")
        status, _, err = run(*command)
        assert status == 0
        assert (f"{done} of 7 prompts are answered in {out} already" in err) == (done > 0)
        assert out.read_text().startswith("".join(lines[:done]))
        assert {one["index"]: exact(one) for one in records_of(out.read_text())} == answers
        assert out.read_text().count("\n") == 7
    assert run(*command) == (0, "", f"7 of 7 prompts are answered in {out} already\n")


def test_an_interrupt_keeps_what_was_answered(run, folder, files, monkeypatch):
    path, out = files
    command = ("generate", folder, "--prompts", path, *OPTIONS, "--out", out)
    from bytelm.cli import prompting

    append = prompting.append_line
    monkeypatch.setattr(sys.modules["bytelm.cli.app"]._interrupts, "_last", 0.0)

    def append_and_stop(path, line):
        append(path, line)
        if path.read_text().count("\n") == 3:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(prompting, "append_line", append_and_stop)
        status, _, err = run(*command)
    assert status == 130
    assert err.splitlines()[-1] == "stopped: the same command resumes"
    before = out.read_text()
    assert before.count("\n") == 3
    status, _, err = run(*command)
    assert status == 0
    assert f"3 of 7 prompts are answered in {out} already" in err
    assert out.read_text().startswith(before)
    assert sorted(one["index"] for one in records_of(out.read_text())) == list(range(7))


def test_errors_are_tried_again(tmp_path, lm):
    out = tmp_path / "new" / "a.jsonl"
    prompts = read("a\nb\n" + "c" * 50)
    assert resume(out, prompts, "m") == prompts
    answers = list(answer_prompts(lm, prompts, max_document_bytes=30))
    out.write_text("".join(to_json(one.record("m")) + "\n" for one in answers))
    assert resume(out, prompts, "m") == prompts[2:]
    assert "error" not in out.read_text()
    assert out.read_text().count("\n") == 2
    # More prompts may be added at the end of the file.
    more = read("a\nb\n" + "c" * 50 + "\nd")
    assert resume(out, more, "m") == more[2:]


def test_answers_to_anything_else_are_not_touched(tmp_path, lm):
    out = tmp_path / "a.jsonl"
    prompts = read("a\nb")
    text = "".join(to_json(one.record("m")) + "\n" for one in answer_prompts(lm, prompts))
    out.write_text(text)
    for others, model in ((read("b\na"), "m"), (read("a"), "m"), (prompts, "n")):
        with pytest.raises(ConfigError, match=r"a\.jsonl line [12] is an answer to another prompt"):
            resume(out, others, model)
        assert out.read_text() == text
    for content in (
        b"precious",
        b"{}\n",
        b"\xff\n",
        b"3\n",
        b'{"index": [], "key": 1}\n',
        b'["error"]\n',
        b'{"index": 0}\n',
        b"[]",
    ):
        out.write_bytes(content)
        with pytest.raises(DataError, match="line 1 is not an answer"):
            resume(out, prompts, "m")
        assert out.read_bytes() == content
    with pytest.raises(ConfigError, match="is not a file"):
        resume(tmp_path, prompts, "m")


def test_prompts_from_standard_input(run, folder, lm):
    status, out, _ = run("generate", folder, "--prompts", "-", *OPTIONS, stdin=b"one\ntwo\n")
    assert status == 0
    answers = {one["index"]: exact(one) for one in records_of(out)}
    assert answers == {one.index: alone(lm, one.request) for one in read("one\ntwo\n")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["a prompt", "--prompts", "x"], "leave out PROMPT"),
        (["--chat", "--raw", "--prompts", "x"], "leave out --chat and --raw"),
        (["--out", "x"], "--out is about a file of prompts: add --prompts FILE"),
        (["--slots", "3"], "--slots is about a file of prompts"),
        (["--prompts", "missing"], "cannot read missing: "),
    ],
)
def test_options_that_do_not_go_together_are_named(run, folder, options, message):
    status, out, err = run("generate", folder, *options)
    assert (status, out) == (1, "")
    assert message in err


def test_a_bad_line_is_named_before_the_model_is_loaded(run, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    status, out, err = run("generate", tmp_path / "missing", "--prompts", tmp_path / "p.jsonl")
    assert (status, out) == (1, "")
    assert "p.jsonl line 2: " in err
    assert len(err.splitlines()) == 1
