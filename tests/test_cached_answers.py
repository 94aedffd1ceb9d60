"""Answers kept on disk: read again by the same model only, for the same request only."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from builders import random_byte_lm
from bytelm.errors import ConfigError
from bytelm.evaluation.harness import HarnessLM
from bytelm.evaluation.harness.caching import CachedLM, fingerprint, unwrapped
from bytelm.evaluation.harness.noisy import NoisyLM
from bytelm.evaluation.noise import parse_noise
from bytelm.evaluation.thresholds import with_threshold
from bytelm.language_model import LanguageModel
from serving_clients import tiny_lm
from test_harness import adapter
from test_local_tasks import folder
from test_log_probs import language_model
from test_report import checkpoints

__all__ = ["checkpoints", "folder"]

Run = Callable[..., tuple[int, str, str]]
PAIRS = [("The cat", " sat"), ("The cat", " ran"), ("", "é"), ("The cat", " sat")]
LINE = {"until": ["\n"], "max_gen_toks": 2}


def instances(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def ask(lm: Any) -> list[Any]:
    return [
        lm.loglikelihood(instances("loglikelihood", *PAIRS)),
        lm.loglikelihood_rolling(instances("loglikelihood_rolling", ("The cat",))),
        lm.generate_until(instances("generate_until", ("The cat", LINE), ("A", LINE))),
    ]


def quiet(lm: LanguageModel) -> HarnessLM:
    return HarnessLM(lm, show_progress=False)


@pytest.mark.parametrize("kind", ["byte", "token"])
def test_answers_are_those_of_the_model_and_are_asked_once(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lm = adapter(kind)
    expected = ask(lm)
    assert ask(CachedLM(lm, tmp_path)) == expected
    again = adapter(kind)

    def refuse(*arguments: Any) -> None:
        raise AssertionError("asked again")

    for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        monkeypatch.setattr(again, name, refuse)
    assert ask(CachedLM(again, tmp_path)) == expected


def test_models_and_thresholds_have_answers_of_their_own(tmp_path: Path):
    own = tiny_lm()
    lms = [own, with_threshold(own, 1.0), language_model(random_byte_lm(seed=1))]
    lms.append(language_model(random_byte_lm(seed=2)))
    for lm in lms:
        assert ask(CachedLM(quiet(lm), tmp_path)) == ask(quiet(lm))
    assert len(list(tmp_path.glob("*.db"))) == len(lms)
    assert fingerprint(quiet(own)) == fingerprint(quiet(tiny_lm()))
    assert fingerprint(quiet(own)) != fingerprint(HarnessLM(own, bytes_per_token=1))
    assert fingerprint(quiet(own)) != fingerprint(quiet(own), "other options")


def test_noised_requests_have_answers_of_their_own(tmp_path: Path):
    lm = adapter("byte")
    cached = CachedLM(lm, tmp_path)
    clean = ask(cached)
    for noise in map(parse_noise, ("uppercase", "bitflip:0.5")):
        found = NoisyLM(cached, noise, "both", seed=3)
        assert unwrapped(found) is lm
        expected = ask(NoisyLM(lm, noise, "both", seed=3))
        assert ask(found) == expected != clean
        assert ask(found) == expected


def test_a_damaged_file_is_named(tmp_path: Path):
    lm = adapter("byte")
    path = tmp_path / f"{fingerprint(lm)}.db"
    path.write_text("no database" * 99)
    with pytest.raises(ConfigError, match=rf"{path}: file is not a database; remove the file"):
        CachedLM(lm, tmp_path)
    with pytest.raises(ConfigError, match="cannot write"):
        CachedLM(lm, path / "below")


def test_the_command_keeps_answers(checkpoints: Path, folder: Path, tmp_path: Path, run: Run):
    asked = ["--tasks", "blimp_local", "--data", folder, "--json", "--cache", tmp_path / "kept"]
    found = [run("eval", checkpoints / "one", *asked) for _ in range(2)]
    assert found[0][0] == 0, found[0][2]
    assert json.loads(found[0][1]) == json.loads(found[1][1])
    assert len(list((tmp_path / "kept").glob("*.db"))) == 1
    status, _, errors = run("eval", checkpoints / "one", folder, *asked[-2:])
    assert (status, "--cache belongs to --tasks, --translate, --characters," in errors) == (1, True)
