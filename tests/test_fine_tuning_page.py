"""The commands and the code of docs/fine-tuning.md, run from top to bottom as a reader would."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import bytelm
from builders import BASE_BLT, merged
from bytelm.config import load_recipe
from bytelm.layout import best_step, saved_steps

PAGE = (Path(__file__).parents[1] / "docs" / "fine-tuning.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
SMALLER = {
    "4.0e-4": "1.0e-2",
    "warmup_steps: 50": "warmup_steps: 10",
    "rows_per_step: 8": "rows_per_step: 1",
    "steps: 500": "steps: 2",
    "train.steps=4000": "train.steps=15",
}
"""Text of the page, and what stands for it in a short run."""
PAIRS = {"cat": "chat", "dog": "chien", "green tree": "arbre vert"}
REPLIES = {"What is the capital of France?": "Paris", "And of Italy?": "Rome"}


def write_lines(name, records):
    Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))


def texts(seed):
    """Made-up words, some far more frequent than others."""
    letters, rng = list("etaoinshrdlu"), np.random.default_rng(0)
    words = ["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(99)]
    rng = np.random.default_rng(seed)
    counts = rng.integers(5, 40, 150)
    return [{"text": " ".join(words[i] for i in rng.zipf(1.5, n) % 99)} for n in counts]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The files that the page takes for granted: a trained BLT, and new data of each kind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        write_lines("old.jsonl", texts(0))
        bytelm.prepare("old.jsonl", "old")
        ngrams = {"kind": "ngram", "max_order": 3, "min_count": 1, "max_contexts": 4096}
        bytelm.train({"model": ngrams, "data": {"path": "old"}}, "scorer")
        bytelm.prepare("old.jsonl", "scored", scorer="scorer", validation_share=0.1, workers=1)
        blt = {
            "model": {"kind": "blt", **merged(BASE_BLT, {"local": {"window": 64}})},
            "patching": {"kind": "entropy", "patch_size": 3.0},
            "data": {"path": "scored", "row_bytes": 128, "rows_per_step": 1},
            "optimizer": {"learning_rate": 1e-2, "warmup_steps": 1, "schedule": "wsd"},
            "train": {"steps": 10, "validation_bytes": 1000},
        }
        bytelm.train(blt, "runs/blt")
        write_lines("new.jsonl", texts(1))
        pairs = [{"prompt": f"Translate: {k}\n", "response": v} for k, v in PAIRS.items()]
        write_lines("pairs.jsonl", pairs)
        messages = []
        for asked, said in REPLIES.items():
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        write_lines("chats.jsonl", [{"messages": messages}])
        yield Path.cwd()


def commands():
    """The commands of the page, as lists of words."""
    for kind, text in BLOCKS:
        if kind == "" and text.startswith("bytelm "):
            for command in re.split(r"^(?=bytelm )", text, flags=re.MULTILINE)[1:]:
                yield shlex.split(command)


def smaller(text):
    for old, new in SMALLER.items():
        text = text.replace(old, new)
    return text


@pytest.mark.slow
def test_the_page_runs(run, place):
    assert all(old in PAGE for old in SMALLER)
    recipes = [text for kind, text in BLOCKS if kind == "yaml"]
    (tune,) = [smaller(text) for text in recipes if text.startswith("# tune.yaml\n")]
    Path("tune.yaml").write_text(tune)
    shown = {}
    for command in commands():
        if {"import", "blt-1b", "blt-1b-released"} & set(command):
            continue  # They need the released weights.
        if command[1:3] == ["data", "prepare"]:
            share = "0.1" if "new.jsonl" in command else "0"
            command += ["--validation-share", share, "--workers", "1"]
        if {"data.path=pairs", "data.path=chats"} & set(command):
            command.insert(3, "train.steps=100")
        status, shown[tuple(command)], err = run(*map(smaller, command[1:]))
        assert not status, (command, err)

    def output(*words):
        (found,) = [text for command, text in shown.items() if set(words) <= set(command)]
        return found

    # What is generated ends where a response does.
    assert output("generate", "runs/pairs") == "chat\n"
    assert output("generate", "runs/chat") == "Paris\n"
    assert "bits per byte" in output("eval", "runs/tuned/best")
    assert "trained" in output("data", "inspect", "pairs")
    assert [one.name for one in saved_steps(Path("runs/blt/superseded/10-steps"))]
    assert best_step(Path("runs/further")) is not None

    # Every other recipe is one, on top of the first.
    for text in recipes:
        Path("other.yaml").write_text(text)
        more = ["data.path=new-data", "train.steps=1"]
        assert load_recipe("other.yaml", more if "init" in text else [*more, "init.from=runs/blt"])

    namespace = {}
    (code,) = [text for kind, text in BLOCKS if kind == "python"]
    exec(compile(code, "fine-tuning.md", "exec"), namespace)
    replies = [m["content"] for m in namespace["messages"] if m["role"] == "assistant"]
    assert [*replies, namespace["reply"]] == [b"Paris", b"Rome"]


def test_the_commands_that_need_released_weights_have_these_options(run):
    for command in commands():
        if command[1] == "import":
            out = run(*command[1:3], "--help")[1]
            assert all(word in out for word in command if word.startswith("--"))
