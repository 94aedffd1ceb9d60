"""The tour as a new user takes it, on little text and in little time."""

import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from bytelm.errors import ConfigError, DataError
from bytelm.language_model import LanguageModel
from bytelm.likelihood import Likelihood
from bytelm.progress import Progress
from bytelm.quickstart import FLOPS, _evaluate, run_quickstart
from bytelm.quickstart.coach import Coach
from bytelm.quickstart.text import affordable_bytes, prepare_text
from bytelm.training import Turns


def quickstart(*arguments, cwd):
    command = [sys.executable, "-m", "bytelm", "quickstart", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def source(folder, documents=60):
    rng = np.random.default_rng(0)
    words = ["def", "return", "self", "patch", "bytes", "entropy", "(", ")", ":", "\n"]
    folder.mkdir()
    for number in range(documents):
        text = " ".join(rng.choice(words, 600))
        (folder / f"{number}.txt").write_text(text)
    return folder


@pytest.mark.slow
def test_the_tour_on_a_folder_and_again(tmp_path):
    data = source(tmp_path / "text")
    began = time.monotonic()
    done = quickstart("--data", data, "--minutes", "0.5", cwd=tmp_path)
    assert time.monotonic() - began < 60
    assert done.returncode == 0, done.stderr
    # Half a minute is too little on any computer, which is said twice: at first, and in the end.
    assert done.stdout.count("too little for a meaningful result") == 2
    assert "--minutes" in done.stdout
    for line in ("BLT, entropy patches", "byte transformer", "xz -9, per file"):
        assert line in done.stdout
    out = tmp_path / "bytelm-quickstart"
    results = json.loads((out / "results.json").read_text())
    blt, byte, xz = results["rows"]
    assert blt["flops"] == pytest.approx(byte["flops"], rel=0.05)
    assert blt["flops"] < FLOPS / 2
    assert results["caution"]
    assert blt["patch_size"] > 2
    assert 0 < blt["bits_per_byte"] < 8
    assert xz["parameters"] is None
    for name in ("report.md", "training.svg", "entropies.svg", "rules.svg"):
        assert (out / name).stat().st_size > 500
    again = quickstart("--data", data, cwd=tmp_path)
    assert again.returncode == 0
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert rows == results["rows"]
    other = quickstart("--data", data, "--seed", "5", cwd=tmp_path)
    assert other.returncode == 1
    assert "holds a quickstart with other settings" in other.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the inputs hold no text"),
        (b"a few words\n" * 20, "needs at least 100,000 bytes"),
    ],
)
def test_too_little_text_is_said_at_once(run, tmp_path, monkeypatch, content, message):
    (tmp_path / "small.txt").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    status, _, err = run("quickstart", "--data", "small.txt")
    assert status == 1
    assert message in err
    assert "Traceback" not in err


def test_a_failed_quickstart_does_not_claim_its_folder(tmp_path):
    (tmp_path / "small.txt").write_bytes(b"a few words\n" * 20)
    out = tmp_path / "out"
    with pytest.raises(DataError, match="needs at least 100,000 bytes"):
        run_quickstart(tmp_path / "small.txt", out)
    assert not out.exists()
    with pytest.raises(DataError, match="nope"):
        run_quickstart(tmp_path / "nope", out, seed=1)
    assert not out.exists()
    # A folder that the user made stays, with what was in it.
    out.mkdir()
    (out / ".DS_Store").touch()
    with pytest.raises(DataError, match="nope"):
        run_quickstart(tmp_path / "nope", out)
    assert [path.name for path in out.iterdir()] == [".DS_Store"]


def test_an_interrupted_quickstart_keeps_its_folder(tmp_path):
    class Interrupted(Progress):
        def stage(self, title):
            if title.startswith("scoring"):
                raise KeyboardInterrupt

    data = source(tmp_path / "text")
    with pytest.raises(KeyboardInterrupt):
        run_quickstart(data, tmp_path / "out", progress=Interrupted())
    assert (tmp_path / "out" / "text" / "manifest.json").exists()
    with pytest.raises(ConfigError, match="holds a quickstart with other settings"):
        run_quickstart(data, tmp_path / "out", seed=1)


def test_no_more_text_is_read_than_there_is_time_for(tmp_path):
    data = source(tmp_path / "text", documents=300)
    whole = sum(path.stat().st_size for path in data.iterdir())
    text = prepare_text(data, tmp_path / "some", 400_000, Progress())
    assert 350_000 < sum(s.text_bytes for s in text.sources().values()) < 410_000
    # A single file is read up to there.
    one = tmp_path / "one.txt"
    one.write_bytes(b"".join(path.read_bytes() for path in sorted(data.iterdir())))
    text = prepare_text(one, tmp_path / "part", 400_000, Progress())
    assert 350_000 < sum(s.text_bytes for s in text.sources().values()) < 410_000
    text = prepare_text(data, tmp_path / "all", 2 * whole, Progress())
    assert sum(s.text_bytes for s in text.sources().values()) == whole


def test_evaluation_ends_on_time_on_the_same_text_for_all_models(tmp_path, monkeypatch):
    class Fake(LanguageModel):
        context_bytes = 512

        def __init__(self):
            self.read = []

        def likelihood(self, texts, *, stride=None):
            ((_, text),) = texts
            self.read.append(text)
            return {"": Likelihood(nats=1.0, num_bytes=len(text))}

    documents = [bytes([n]) * (n + 1) for n in range(9)]
    clock = iter(map(float, range(99)))
    monkeypatch.setattr("bytelm.quickstart.time.monotonic", lambda: next(clock))
    models = [Fake(), Fake()]
    kept, likelihoods = _evaluate(models, documents, 3.5, lambda done, total: None)
    assert kept == models[0].read == models[1].read == documents[:5]
    assert [one.num_bytes for one in likelihoods] == [15, 15]
    # However late it is, there is a result.
    assert _evaluate([Fake()], documents, -1.0, lambda done, total: None)[0] == documents[:1]


def test_slow_computers_prepare_less_text(monkeypatch):
    clock = iter([0.0, 0.5, 0.0, 5.0, 0.0, 1e6, 0.0, 0.001])
    monkeypatch.setattr("bytelm.quickstart.text.time.monotonic", lambda: next(clock))
    usual, slow, slowest, fast = (affordable_bytes(360.0) for _ in range(4))
    assert fast == 16_000_000
    assert slow == pytest.approx(usual / 10, rel=0.01)
    assert slowest == 400_000


class Slow(Progress):
    """Notes what is said."""

    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def test_a_slow_computer_is_told_once_with_the_time_that_would_be_enough(tmp_path):
    progress = Slow()
    coach = Coach(progress, tmp_path, time.monotonic(), 6.0)
    # 1 GFLOP/s, and 4e12 FLOPs for each of two models: 8,000 seconds of training.
    turns = Turns(reachable=0.2e12, seconds=5.0, flops_per_second=1e9)
    coach.check_speed(turns)
    assert progress.notes == []
    turns.seconds = 20.0
    for _ in range(3):
        coach.check_speed(turns)
    (said,) = progress.notes
    assert "6 minutes allow 5% of the usual training" in said
    assert "1 minute allows 1%" in str(Coach(progress, tmp_path, 0.0, 1.0).caution(4e10))
    wanted = int(re.search(r"--minutes (\d+)", said)[1])
    assert 60 * wanted > 8000
    assert 60 * wanted < 1.3 * 8000
    assert "6 minutes allow 38%" in str(coach.caution(1.5e12))
    assert coach.caution(2.5e12) is None


def test_a_fast_computer_is_told_nothing(tmp_path):
    progress = Slow()
    coach = Coach(progress, tmp_path, time.monotonic(), 6.0)
    coach.check_speed(Turns(reachable=FLOPS, seconds=20.0, flops_per_second=3e10))
    assert progress.notes == []


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64])
def test_a_seed_that_recipes_cannot_hold_is_refused_at_once(tmp_path, seed):
    with pytest.raises(ConfigError, match=f"the seed must be between 0 and .*, not {seed}"):
        run_quickstart(tmp_path / "nope", tmp_path / "out", seed=seed)
    assert not (tmp_path / "out").exists()
