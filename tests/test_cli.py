"""The command line as a user meets it: every verb on real files, and every mistake in one line."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from builders import BASE_BLT
from bytelm.cli.options import build_rule
from bytelm.config import RULES, MonotonicPatching, PatchingConfig
from bytelm.data import read_manifest
from bytelm.display import progress as display
from bytelm.evaluation.tail import BANDS
from bytelm.terminal import escape_controls
from commands import invoke
from foreign import hf_model, save_official

SMALL = {"kind": "transformer", "dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 48}
WORDS = ["the", "patch", "of", "bytes", "is", "cut", "where", "entropy", "rises", "\n"]


def test_prepare_ends_with_a_table_of_what_was_read_and_what_was_not(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("in [put]")
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02}.txt").write_text("text\n")
    for i in range(20):
        (folder / f"{i:02}.bin").write_bytes(b"\0")
    status, out, _ = run("data", "prepare", folder, "--out", "d")
    assert status == 0
    joined = "".join(out.split())
    assert "in[put]/00.txttext15" in joined
    assert "19moreinputs1995" in joined
    assert "9moreinputswithnotes00see" in joined
    assert "looksbinary:--binaryreadsit" in joined
    assert "30read,20notread30150" in joined


def test_a_damaged_file_is_in_the_table_and_the_manifest(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for i in range(20):
        Path(f"in/{i}.bin").write_bytes(b"\0")
    text = "".join(map(str, range(9999))).encode()
    Path("in/z.txt.gz").write_bytes(gzip.compress(text)[:-10])
    status, _, err = run("data", "prepare", "in", "--out", "d")
    assert status == 1
    assert "cannot read in/z.txt.gz: " in err
    assert "--skip-invalid" in err
    status, out, _ = run("data", "prepare", "in", "--out", "d", "--skip-invalid")
    assert status == 0
    assert re.search(r"in/z\.txt\.gz +text +1 +3\d,\d+ +not read to its end: ", out)
    (noted,) = (one for one in read_manifest(Path("d")).inputs if one.kind == "text")
    assert noted.note.startswith("not read to its end: ")


def test_options_of_a_scorer_need_one(run, world, tmp_path):
    for options in (("--patch-size", "4.5"), ("--reset-at-newline",), ("--device", "cuda")):
        status, _, err = run("data", "prepare", world / "d", "--out", tmp_path / "d", *options)
        assert status == 1
        assert f"{options[0]} is about entropies, which need a scorer: add --scorer" in err
        assert not (tmp_path / "d").exists()


def test_few_bytes_held_out_are_a_warning(run, world, tmp_path):
    assert "only 5,311 bytes are held out" in run("data", "info", world / "d")[1]
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(3000)))
    arguments = ("data", "prepare", tmp_path / "a.txt", "--out", tmp_path / "d")
    options = ("--format", "lines", "--validation-share", "0.7")
    assert "held out, so" not in run(*arguments, *options)[1]


def test_names_of_files_stay_on_one_line_of_the_table(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a\nb.txt", "c\td\x1b[2J.txt"):
        Path(name).write_text(name)
    out = run("data", "prepare", *Path().iterdir(), "--out", "d", "--validation-share", "0")[1]
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert r"a\x0ab.txt text 1 7" in lines
    assert r"c\x09d\x1b[2J.txt text 1 11" in lines
    assert r"a\x0ab 1 7 0" in lines


def test_a_home_folder_is_expanded_in_options(run, world, tmp_path, monkeypatch):
    """Shells expand ``~`` at the beginning of a word only."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text.txt").write_text("some text\n")
    (tmp_path / "blt").symlink_to(world / "blt")
    assert run("data", "prepare", "~/text.txt", "--out=~/d")[0] == 0
    assert (tmp_path / "d" / "manifest.json").exists()
    assert run("data", "info", "~/d")[0] == 0
    status, out, _ = run("patch", "~/blt", "~/text", "--rule", "space", "--figure=~/x.svg")
    assert status == 0
    assert out.startswith("~/text\n")
    assert (tmp_path / "x.svg").exists()
    assert run("data", "prepare", "~nobody-here", "--out", "~nobody-here")[0] == 1


def test_eval_has_the_reading_options_of_prepare(run, world, tmp_path):
    records = [{"body": "some words", "from": "here"}, {"body": 3}]
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "b.bin").write_bytes(b"\0")
    options = ("--field", "body", "--source-field", "from", "--json")
    command = ("eval", world / "blt", tmp_path, "--include", "*.[jb]*", *options)
    status, _, err = run(*command)
    assert status == 1
    assert "--skip-invalid" in err
    status, out, err = run(*command, "--skip-invalid", "--cut-bytes", "4")
    assert status == 0, err
    assert json.loads(out)["sources"]["here"]["bytes"] == 10
    assert "1 invalid records skipped" in " ".join(err.split())
    assert "looks binary" in " ".join(err.split())
    known = {*run("data", "prepare", "--help")[1].split(), *err.split()}
    assert {"--format", "--skip-invalid", "--include", "--binary", "--cut-bytes"} <= known


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Everything that takes a while to make, made by the commands a user would type."""
    folder = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(0)
    lines = [json.dumps({"text": " ".join(rng.choice(WORDS, 40))}) for _ in range(200)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    (folder / "empty.txt").touch()
    options = {"data": {"row_bytes": 128, "rows_per_step": 4}, "train": {"steps": 4}}
    recipes = {
        "entropy": {"model": {**SMALL, "window": 8}},
        "blt": {
            "model": {"kind": "blt", **BASE_BLT},
            "patching": {"kind": "entropy", "patch_size": 3.0},
        },
    }
    for name, recipe in recipes.items():
        recipe = {**recipe, **options, "optimizer": {"warmup_steps": 1}}
        (folder / f"{name}.yaml").write_text(json.dumps(recipe))

    commands = [
        ("data", "prepare", "text.jsonl", "--out", "d", "--validation-share", "0.1"),
        ("train", "entropy.yaml", "data.path=d", "--out", "entropy"),
        ("data", "prepare", "d", "--scorer", "entropy", "--out", "scored", "--workers", "1"),
        ("train", "blt.yaml", "data.path=scored", "--out", "blt"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in commands:
            assert invoke(*command) == 0
    return folder


def test_help_and_version(run):
    status, out, _ = run("--help")
    assert status == 0
    for verb in (
        "quickstart",
        "data",
        "train",
        "eval",
        "patch",
        "generate",
        "serve",
        "recipes",
        "flops",
    ):
        assert verb in out
    from bytelm.version import __version__

    assert run("--version")[1].strip() == __version__


@pytest.mark.parametrize(
    "verb",
    ["quickstart", "train", "eval", "patch", "generate", "serve", "recipes", "flops", "plan",
     "data prepare", "data calibrate", "data inspect"],
)  # fmt: skip
def test_every_verb_has_help(run, verb):
    status, out, _ = run(*verb.split(), "--help")
    assert status == 0
    assert "Usage" in out


def test_help_does_not_wait_for_torch():
    code = "import sys, bytelm.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout.strip() == "False"


def test_neither_loading_nor_training_on_one_device_waits_for_fsdp():
    code = (
        "import sys, bytelm, bytelm.cli; bytelm.load, bytelm.train; import bytelm.training.run; "
        "print('torch' in sys.modules, 'torch.distributed.fsdp' in sys.modules, "
        "'torch.distributed.tensor' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout.split() == ["True", "False", "False"]


def test_data_inspect_and_calibrate(run, world, tmp_path):
    figure = tmp_path / "scored.svg"
    status, out, _ = run("data", "inspect", world / "scored", "--verify", "--out", figure)
    assert status == 0
    assert "</svg>" in figure.read_text()
    assert re.search(r"text +\d\.\d{3} +\d+\.\d\d .*\u2588", out)
    status, out, _ = run("data", "inspect", world / "scored", "--patches")
    assert re.search(r"text +200 +38,063 +5,311 +\d\.\d\d", out)
    assert "sample" not in out
    status, out, _ = run("data", "info", world / "scored", "--verify")
    assert status == 0
    assert "text" in out
    assert "all files match their hashes" in out
    status, out, _ = run("data", "calibrate", world / "scored", "--patch-size", "2.5")
    assert status == 0
    assert re.search(r"patches of 2\.[45]", out)
    (threshold,) = re.findall(r"threshold (\d\.\d+)", out)
    status, out, _ = run("data", "calibrate", world / "scored", "--threshold", threshold)
    assert status == 0
    assert re.search(r"patches of 2\.[45]", out)
    both = ("--threshold", threshold, "--patch-size", "3")
    status, _, err = run("data", "calibrate", world / "scored", *both)
    assert status == 1
    assert "exclude each other" in err
    status, out, _ = run("data", "calibrate", world / "scored", "--rule", "monotonic",
                         "--patch-size", "3", "--max-length", "8")  # fmt: skip
    assert re.search(r"bytes: monotonic, max_length 8, increase \d", out)


def test_eval(run, world):
    (world / "other.txt").write_text("the patch of bytes")
    text, other = f"mine={world / 'text.jsonl'}", world / "other.txt"
    for arguments in ([text, other],):
        status, out, _ = run("eval", world / "blt", *arguments)
        assert status == 0
        assert "mine" in out
        assert "other" in out
        assert "all" in out
    status, out, _ = run("eval", world / "entropy", world / "text.jsonl", "--json")
    row = json.loads(out)["sources"]["text"]
    assert 1 < row["bits_per_byte"] < 12
    assert row["bytes"] == sum(
        len(json.loads(line)["text"].encode())
        for line in (world / "text.jsonl").read_text().splitlines()
    )


def test_eval_gives_the_sum_of_all_sources_whatever_they_are_called(run, world):
    text = world / "text.jsonl"
    (world / "more.txt").write_text("the patch of bytes")
    out = run("eval", world / "blt", f"all={text}", f"sources={world / 'more.txt'}", "--json")[1]
    found = json.loads(out)
    one, other = found["sources"]["all"], found["sources"]["sources"]
    for key in ("bytes", "patches"):
        assert found["all"][key] == one[key] + other[key]
    nats = sum(x["bits_per_byte"] * x["bytes"] for x in (one, other))
    assert found["all"]["bits_per_byte"] == pytest.approx(nats / found["all"]["bytes"])


def test_eval_names_the_units_and_speaks_strict_json(run, world, tmp_path):
    def parse(out):
        return json.loads(out, parse_constant=lambda name: pytest.fail(name))

    (tmp_path / "some.txt").write_text("the patch of bytes")
    found = parse(run("eval", world / "blt", tmp_path / "some.txt", "--json")[1])
    assert found["sources"]["some"]["patches"] > 1
    found = parse(run("eval", world / "entropy", tmp_path / "some.txt", "--json")[1])
    assert found["sources"]["some"].keys() == {"bits_per_byte", "bytes"}
    tokens = tmp_path / "tokens.json"
    run("data", "tokenizer", world / "d", "--vocab-size", 270, "--out", tokens)
    status, out, err = run(
        "train", world / "entropy.yaml", f"data.path={world / 'd'}", f"data.tokenizer={tokens}",
        "model.vocab_size=270", "train.steps=1", "--out", tmp_path / "t",
    )  # fmt: skip
    assert status == 0, err
    assert "bytes/token" in out
    found = parse(run("eval", tmp_path / "t", tmp_path / "some.txt", "--json")[1])
    assert found["sources"]["some"].keys() == {"bits_per_byte", "bytes", "tokens"}
    assert "bytes/token" in run("eval", tmp_path / "t", tmp_path / "some.txt")[1]


def test_eval_of_prepared_data_leaves_out_what_was_trained_on(run, world):
    status, out, _ = run("eval", world / "blt", world / "d", "--json")
    assert status == 0
    held_out = read_manifest(world / "d").sources("validation")["text"].text_bytes
    assert json.loads(out)["all"]["bytes"] == held_out


def test_eval_measures_languages_the_tail_and_patches(run, world, tmp_path):
    for language, text in {"en": "the cat\na dog\n", "de": "die Katze\nein Hund\n"}.items():
        (tmp_path / f"{language}.txt").write_text(text)
    text = tmp_path / "long.text"
    text.write_text("the cat and the dog are here. " * 20)
    command = ("eval", world / "blt", text, "--format", "text", "--threads", "1")
    options = ("--parallel", tmp_path / "*.txt", "--tail", "--frequencies", world / "text.jsonl")
    options += ("--drift", "--thresholds", "0.5,99", "--against", world / "entropy")
    status, out, err = run(*command, *options, "--figures", tmp_path / "figures", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["all"]["bytes"] == text.stat().st_size
    assert set(found["languages: entropy"]["languages"]) == {"de", "en"}
    assert found["languages: blt"]["reference"] == "en"
    assert found["unevenness across languages"]["differences"][0]["minus"] == "blt"
    assert set(found["words by frequency"]["groups"]) <= {*BANDS}
    assert set(found["characters by script"]["groups"]) == {"LATIN", "white space", "other"}
    assert found["entropy drift: bytes per patch by position"]["documents"] == 1
    assert len(found["thresholds at inference"]["thresholds"]) == 3
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn == {"languages.svg", "drift.svg", "thresholds.svg"}
    status, out, _ = run("eval", world / "entropy", "--parallel", tmp_path / "*.txt")
    assert status == 0
    assert "unevenness across languages" in out


def test_eval_measures_noise_and_asks_about_characters(run, world, tmp_path):
    (tmp_path / "cute").mkdir()
    rows = [f"{word}\t{' '.join(word)}" for word in ("one", "two", "six", "ten", "ace", "cat")]
    (tmp_path / "cute" / "spell.tsv").write_text("\n".join(["input1\tlabel", *rows]))
    (tmp_path / "text.txt").write_text("the patch of bytes " * 12)
    options = ("--noise", "drop:0.5,nfc", "--characters", "--data", tmp_path, "--limit", 1)
    status, out, err = run("eval", world / "blt", tmp_path / "text.txt", *options, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found.keys() == {
        "all", "sources", "noise", "characters: generated words", "characters: CUTE",
    }  # fmt: skip
    assert list(found["noise"]["noises"]) == ["clean", "drop:0.5", "nfc"]
    assert found["characters: CUTE"]["cute spell"]["num_questions"] == 1
    out = run("eval", world / "blt", tmp_path / "text.txt", "--noise", "drop")[1]
    assert "clean" in out
    assert "change" in out


def test_text_comes_through_a_pipe(run, tmp_path):
    command = ["data", "prepare", "-", "--out", tmp_path / "d"]
    text = b"any bytes \xff\n" * 200
    process = [sys.executable, "-m", "bytelm", *command]
    subprocess.run(process, input=text, check=True, capture_output=True)
    assert read_manifest(tmp_path / "d").sources()["stdin"].text_bytes == len(text)
    status, _, err = run(*command, stdin=b"other")
    assert status == 1
    assert "may have been made from other standard input" in err


def test_names_may_hold_what_looks_like_markup(run, world, tmp_path):
    line = json.dumps({"text": "some text", "lang": "[/INST] [bold]x"})
    (tmp_path / "x.jsonl").write_text(line)
    status, out, err = run("data", "prepare", tmp_path / "x.jsonl", "--out", tmp_path / "d[/x]",
                           "--source-field", "lang")  # fmt: skip
    assert status == 0, err
    assert "[/INST] [bold]x" in out
    assert "nothing is held out" in out
    status, out, err = run("train", world / "blt.yaml", f"data.path={world / 'scored'}",
                           "--out", tmp_path / "run[/x]")  # fmt: skip
    assert status == 0, err


def test_patch_shows_every_byte_and_the_rule(run, world):
    status, out, _ = run("patch", world / "blt", "the patch é")
    assert status == 0
    shown, summary = out.splitlines()
    assert "12 bytes" in summary
    assert "(entropy, threshold" in summary
    assert shown.replace("|", "").encode().decode("unicode_escape").encode("latin-1") in (
        "the patch é".encode(),
        "the patch é".encode().decode().encode("latin-1"),
    )
    status, out, _ = run("patch", world / "blt", "a bc", "--rule", "space")
    assert out.splitlines()[0] == "a |bc"
    status, out, _ = run("patch", world / "blt", "abcdef", "--rule", "static", "--length", "3")
    assert out.splitlines()[0] == "ab|cde|f"


def test_patch_reads_standard_input_and_speaks_json(run, world):
    status, out, _ = run("patch", world / "blt", "--json", stdin=b"\xff\xfe any bytes")
    assert status == 0
    record = json.loads(out)
    assert "".join(record["patches"]).startswith("\\xff\\xfe any bytes")
    assert len(record["entropies"]) == 13
    assert record["boundaries"][0] == 0


def test_patch_of_a_long_text_says_how_far_it_is(run, world, monkeypatch):
    monkeypatch.setattr(display, "PLAIN_SECONDS", 0.0)
    text = b"the patch of bytes " * 3000
    status, out, err = run("patch", world / "entropy", "--rule", "space", stdin=text)
    assert status == 0
    assert "patching, 14%" in err
    assert "patching" not in out
    assert run("patch", world / "entropy", "short", "--rule", "space")[2] == ""


def test_patch_compares_rules_in_one_list_of_json(run, world):
    records = json.loads(run("patch", world / "blt", "some text", "--compare", "--json")[1])
    assert [record["rule"]["kind"] for record in records] == ["entropy", "static", "space"]


def test_patch_escapes_what_a_terminal_would_obey(run, world):
    text = b"a\x1b[31mr|d\x07\0"
    status, out, _ = run("patch", world / "blt", "--rule", "static", stdin=text)
    assert status == 0
    assert out.splitlines()[0] == r"a\x1b[|31mr|\|d\x07\x00"


def test_generation_escapes_control_characters_on_a_terminal_only(run, world, monkeypatch):
    arguments = ("generate", world / "blt", "the ", "--max-bytes", "60", "--temperature", "3")
    plain = run(*arguments)[1]
    assert escape_controls(plain) != plain
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run(*arguments)[1] == escape_controls(plain)
    status, _, err = run(*arguments, "--raw")
    assert status == 1
    assert "send it to a file or pipe" in err


def test_patch_with_a_scorer_needs_a_rule(run, world):
    status, _, err = run("patch", world / "entropy", "text")
    assert status == 1
    assert "has no patching rule of its own: name one" in err
    assert "`--rule entropy --threshold 1.3`" in err
    status, out, _ = run(
        "patch", world / "entropy", "text", "--rule", "entropy", "--threshold", "0"
    )
    assert out.splitlines()[0] == "t|e|x|t"
    status, _, err = run("patch", world / "entropy", "text", "--rule", "entropy")
    assert "the entropy rule has no threshold yet" in err


@pytest.mark.parametrize("suffix", ["svg", "png", "pdf"])
def test_patch_draws_figures(run, world, tmp_path, suffix):
    one, many = tmp_path / f"one.{suffix}", tmp_path / f"many.{suffix}"
    text = "the patch of bytes é is cut 日本\n"
    assert run("patch", world / "blt", text, "--figure", one)[0] == 0
    status, out, _ = run("patch", world / "blt", text, "--compare", "--figure", many)
    assert status == 0
    assert "(space)" in out
    assert min(one.stat().st_size, many.stat().st_size) > 2000
    if suffix == "svg":
        assert "</svg>" in one.read_text()


def test_generate_is_reproducible_and_writes_raw_bytes(run, world):
    arguments = ("generate", world / "blt", "the ", "--max-bytes", "30", "--seed", "3")
    first, again = run(*arguments), run(*arguments)
    assert first == again
    assert first[0] == 0
    assert first[1].endswith("\n")


def test_recipes_are_listed_and_printed(run):
    _, out, _ = run("recipes")
    assert "blt-8b" in out
    assert "cpu-study" in out
    # The whole comment, also where it has two lines, without the commands.
    assert "docs/log.md has the search for rates." in " ".join(out.split())
    assert "bytelm study" not in out
    _, out, _ = run("recipes", "entropy-ngram")
    assert out.startswith("# An n-gram scorer")
    _, out, _ = run("recipes", "cpu-study")
    assert "name: cpu-study" in out


def cells(out, name):
    """Numbers of the rows of a table that begin with a name."""
    rows = [line for line in out.splitlines() if re.match(rf"{name}  +\S", line)]
    return [re.split(r"  +", row)[1:] for row in rows]


def test_flops_shows_every_part_beside_the_published_formula(run):
    status, out, _ = run("flops", "blt-400m", "--patch-size", 6, "--context", 8192)
    assert status == 0
    assert "rows of 8,192 bytes, 1,365 patches of 6 bytes" in out
    forward, decode = cells(out, "global")
    assert forward == ["488 M", "162 M", "14 M", "176 M", "54%", "177 M"]
    assert decode == ["190 M", "325 MB", "55.9 MB", "335 MB"]
    assert cells(out, "total")[0] == ["2.87 G", "303 M", "26.2 M", "329 M", "100%", "322 M"]
    assert "987 M FLOPs per byte; 4.93e+19 for the 50 G bytes of 11,921 steps" in out
    assert "46 GB of parameters" in out
    assert "not counted: --scorer entropy-100m adds" in out
    assert max(map(len, out.splitlines())) <= 80


def test_flops_counts_the_scorer_where_it_is_named(run):
    _, without, _ = run("flops", "blt-400m")
    _, out, _ = run("flops", "blt-400m", "--scorer", "entropy-100m")
    assert cells(out, "scorer")[0][:4] == ["99.5 M", "199 M", "21.3 M", "220 M"]
    assert cells(out, "total")[0][:4] == cells(without, "total")[0][:4]
    assert "total with scorer" in out
    _, out, _ = run("flops", "blt-400m", "--scorer", "entropy-ngram")
    assert cells(out, "scorer")[0][:4] == ["0", "0", "0", "0"]


def test_flops_of_transformers_tables_and_overrides(run, world):
    _, out, _ = run("flops", "byte-1m", "--precision", "bfloat16")
    assert cells(out, "output")[1][1] == "66.6 kB"
    assert "scorer" not in out
    assert cells(run("flops", "entropy-100m")[1], "total")[0][0] == "99.5 M"
    assert "no FLOPs" in run("flops", "entropy-ngram")[1]
    _, deeper, _ = run("flops", "byte-1m", "model.num_layers=10")
    assert cells(deeper, "transformer")[0][0] == "2.01 M"
    status, out, _ = run("flops", world / "blt.yaml")
    assert status == 0
    assert out.startswith("blt: rows of 128 bytes")


def test_flops_of_tokens_are_divided_by_their_bytes(run):
    status, out, _ = run("flops", "token-1m", "--patch-size", 2)
    assert status == 0
    assert "rows of 1,024 bytes, 512 tokens of 2 bytes" in out
    # 2 * 128 * 4,096 a token.
    assert cells(out, "output")[0][1] == "524 k"
    status, _, error = run("flops", "token-1m")
    assert status == 1
    assert "give it in bytes" in error


def test_a_model_of_tokens_from_text_to_text(run, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = run("data", "tokenizer", world / "d", "--vocab-size", 270, "--out", "t.json")
    assert status == 0
    assert "270 tokens" in out
    status, _, error = run("data", "tokenizer", world / "d", "--out", "t.json")
    assert (status, "exists" in error) == (1, True)
    recipe = {
        "model": {**SMALL, "vocab_size": 270},
        "data": {"row_bytes": 128, "rows_per_step": 4, "tokenizer": "t.json"},
        "train": {"steps": 4},
    }
    Path("token.yaml").write_text(json.dumps(recipe))
    train = ("train", "token.yaml", f"data.path={world / 'd'}", "--out", "run")
    assert run(*train)[0] == 0
    status, out, _ = run("eval", "run", world / "text.jsonl", "--json")
    found = json.loads(out)["all"]
    text = [json.loads(line)["text"] for line in (world / "text.jsonl").read_text().splitlines()]
    assert found["bytes"] == sum(map(len, text))
    assert found["tokens"] < found["bytes"]
    assert run("generate", "run", "the ", "--max-bytes", 8)[0] == 0
    status, _, error = run(*train[:3], "model.vocab_size=300", "--out", "other")
    assert status == 1
    assert "has 270 tokens: set model.vocab_size=270" in error
    status, _, error = run("data", "prepare", world / "d", "--scorer", "run", "--out", "scored")
    assert status == 1
    assert "it is a token model" in error
    status, _, error = run("patch", "run", "the", "--rule", "entropy", "--threshold", 1)
    assert status == 1
    assert "no byte entropies" in error


@pytest.mark.parametrize("recipe", [["blt-8b", "--scorer", "entropy-100m"], ["byte-1m"]])
def test_flops_draws_a_figure(run, tmp_path, recipe):
    assert run("flops", *recipe, "--figure", tmp_path / "a.svg")[0] == 0
    assert "</svg>" in (tmp_path / "a.svg").read_text()


def test_a_finished_run_says_so_again(run, world):
    status, out, err = run("train", world / "blt.yaml", f"data.path={world / 'scored'}",
                           "--out", world / "blt")  # fmt: skip
    assert status == 0, err
    assert "FLOPs in" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "blt-9b"], "did you mean 'blt-8b'?"),
        (["train", "blt-1b", "--out", "{tmp}/r"], "add data.path=FOLDER"),
        (["train", "blt-1b", "data.path=nowhere", "--out", "{tmp}/r"], "is not prepared data"),
        (["train", "entropy-ngram", "--out", "{tmp}/r"], "add data.path=FOLDER"),
        (["train", "blt-1b", "train.stepz=1"], "did you mean 'steps'?"),
        (["train", "{world}/blt.yaml", "--time-limit", "soon"], "must look like 90s, 9m or 2h"),
        (["data", "prepare", "nothing*", "--out", "{tmp}/d"], "matches no file"),
        (["data", "info", "{tmp}"], "is not prepared data"),
        (["data", "calibrate", "{world}/d"], "has no entropies"),
        (["data", "calibrate", "{world}/scored", "--rule", "combined"], "needs --increase"),
        (["data", "calibrate", "{world}/scored", "--patch-size", "500"], "cannot be reached"),
        (["eval", "{tmp}/none", "x"], "there is no such folder"),
        (["eval", "{world}/blt", "no-file"], "matches no file"),
        (["generate", "{tmp}"], "is not a checkpoint"),
        (["generate", "{world}/blt", "--top-p", "3"], "top_p must be above 0 and at most 1, not 3"),
        (["generate", "{world}/blt", "--temperature", "-1"], "temperature must be 0"),
        (["patch", "{world}/blt", "x", "--figure", "{tmp}/x.nonsense"], "cannot draw"),
        (["flops", "blt-9b"], "did you mean 'blt-8b'?"),
        (["flops", "blt-1m", "--patch-size", "0.5"], "a patch size of 0.5 bytes is out of range"),
        (["flops", "blt-1m", "--patch-size", "nan"], "between 1 and the context of 1,024 bytes"),
        (["flops", "byte-1m", "--patch-size", "4"], "no patches: leave out --patch-size"),
        (["flops", "byte-1m", "--scorer", "entropy-tiny"], "no patches: leave out --scorer"),
        (["flops", "blt-1m", "--scorer", "blt-1m"], "blt-1m is a BLT, not a scorer"),
        (["flops", "blt-1m", "patching={{kind: space}}"], "give it, for example --patch-size 6"),
        (
            ["flops", "blt-1m", "patching={{kind: static, length: 4}}", "--scorer", "entropy-tiny"],
            "static patches need no scorer",
        ),
        (["flops", "blt-1m", "--figure", "{tmp}/x.nonsense"], "cannot draw"),
        (["recipes", "nothing"], "'nothing' is neither a shipped recipe nor a plan"),
        (["data", "prepare", "", "--out", "{tmp}/d"], "an input is empty"),
        (["data", "prepare", "{world}/text.jsonl", "--out", "{world}/text.jsonl"], "is not empty"),
        (
            ["data", "prepare", "{world}/d", "--out", "{tmp}/d", "--scorer", "{tmp}/no"],
            "there is no such folder",
        ),
        (["train", "{world}/blt.yaml", "--out", "{world}/text.jsonl"], "holds no run"),
        (["train", "{world}/blt.yaml", "train.seed=-1"], "train.seed: Input should be greater"),
        (["train", "{world}/blt.yaml", "data.mixture={{}}"], "should have at least 1 item"),
        (["train", "{world}/blt.yaml", "data.path=2024-13-01"], "2024-13-01 is not prepared data"),
        (["train", "{world}/blt.yaml", "data.path=2024"], "not 2024: write it in quotes"),
        (["train", "{world}/blt.yaml", "model={{dim: 3}}"], "'model.kind' is missing: one of"),
        (
            [
                "train",
                "blt-1m",
                "data.path={world}/scored",
                "model.global_model.dim=80000000",
                "model.global_model.num_heads=8",
                "--out",
                "{tmp}/r",
            ],
            "there is not enough memory",
        ),
        (
            ["patch", "{world}/blt", "x", "--rule", "entropy", "--threshold", "nan"],
            "threshold: Input should be a finite number",
        ),
        (["eval", "{world}/blt", "{world}/blt.yaml", "--stride", "0"], "between 1 and 128, not 0"),
        (["eval", "{world}/blt", "{world}/empty.txt"], "there is no text to evaluate"),
        (["eval", "{world}/blt"], "name the text to measure"),
        (["eval", "{world}/blt", "--noise", "drop"], "name the text to measure"),
        (["eval", "{world}/blt", "--tail"], "name the text to measure"),
        (["eval", "{world}/blt", "--reference", "en"], "--reference belongs to --parallel"),
        (["eval", "{world}/blt", "x", "--frequencies", "x"], "--frequencies belongs to --tail"),
        (["eval", "{world}/blt", "x", "--against", "x"], "--against belongs to --tasks,"),
        (["eval", "{world}/blt", "--parallel", "{world}"], "name the same for all"),
        (
            ["eval", "{world}/blt", "{world}/text.jsonl", "--thresholds", "high"],
            "must be numbers",
        ),
        (["eval", "{world}/blt", "--parallel", "x", "--against", "{world}/blt"], "given twice"),
        (["eval", "{world}/blt", "{world}/text.jsonl", "--noise", "dop"], "unknown noise 'dop'"),
        (["eval", "{world}/blt", "--characters", "--data", "{world}"], "neither a folder cute"),
    ],
)
def test_mistakes_end_in_one_line_and_status_1(run, world, tmp_path, arguments, message):
    status, _, err = run(*(a.format(tmp=tmp_path, world=world) for a in arguments))
    assert status == 1
    assert message in err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1


def test_import_and_export(run, tmp_path):
    blt, entropy = save_official(hf_model(), tmp_path)
    ours, theirs, again = tmp_path / "ours", tmp_path / "theirs", tmp_path / "again"
    command = ("import", "official", "--blt", blt, "--entropy", entropy, "--out")
    status, out, _ = run(*command, ours)
    assert status == 0
    assert re.search(r"[\d,]+ parameters in .*ours\nentropy patching: .*threshold", out)
    status, out, _ = run("export", "hf", ours, "--out", theirs)
    assert status == 0
    assert "use_cache=False" in out
    assert run("import", "hf", theirs, "--out", again)[0] == 0
    texts = [run("generate", folder, "some", "--max-bytes", 20)[1] for folder in (ours, again)]
    assert texts[0] == texts[1]
    status, _, err = run(*command, ours)
    assert status == 1
    assert re.fullmatch(r"error: .*ours exists: choose another name or remove it\n", err)
    status, _, err = run("import", "hf", blt, "--out", tmp_path / "never")
    assert status == 1
    assert err.count("\n") == 1
    assert "bytelm import official" in err


class BudgetPatching(PatchingConfig):
    """A user's rule with a field that no option sets."""

    kind: Literal["cli-budget"] = "cli-budget"
    nats: float = 8.0


def test_options_change_a_models_own_rule_and_keep_its_other_fields():
    RULES.add(BudgetPatching)
    own = BudgetPatching(nats=3.0, max_length=9)
    assert build_rule("cli-budget", None, None, None, 4, own) == own.model_copy(
        update={"max_length": 4}
    )
    assert build_rule("cli-budget", None, None, None, None, own) == own
    other = build_rule("monotonic", None, 1.5, None, None, own)
    assert other == MonotonicPatching(increase=1.5, max_length=9)
