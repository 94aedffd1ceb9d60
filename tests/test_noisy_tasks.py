"""Tasks of lm-evaluation-harness on noised requests, with a toy model and hand-computed scores."""

import json

import numpy as np
import pytest

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from bytelm.cli.tasks import parse_parts
from bytelm.errors import ConfigError
from bytelm.evaluation.harness.noisy import NoisyLM, measure_noisy_tasks, noisy_tasks_section
from bytelm.evaluation.noise import parse_noise
from bytelm.evaluation.scores import Scores


class Capitals(LM):
    """Likes what has few capitals, and remembers what it was asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def loglikelihood(self, requests):
        self.asked = [one.args for one in requests]
        return [(-float(sum(c.isupper() for c in "".join(pair))), False) for pair in self.asked]

    def loglikelihood_rolling(self, requests):
        self.asked = [one.args for one in requests]
        return [-float(len(text)) for (text,) in self.asked]

    def generate_until(self, requests):
        self.asked = [one.args for one in requests]
        return [context for context, _ in self.asked]

    def get_model_info(self):
        return {"name": "capitals"}


def pairs(*arguments):
    return [Instance("loglikelihood", {}, one, n, ("t", n, 1)) for n, one in enumerate(arguments)]


def test_the_chosen_part_of_requests_is_noised():
    upper, toy = parse_noise("uppercase"), Capitals()
    requests = pairs(("the cat\n", " sat on "), ("", " b"))
    for part, asked in {
        "prompt": [("THE CAT\n", " sat on "), ("", " b")],
        "completion": [("the cat\n", " SAT ON "), ("", " B")],
        "both": [("THE CAT\n", " SAT ON "), ("", " B")],
    }.items():
        found = NoisyLM(toy, upper, part).loglikelihood(requests)
        assert toy.asked == asked
        assert found == toy.loglikelihood(pairs(*asked))
    assert requests[0].args == ("the cat\n", " sat on ")
    noisy = NoisyLM(toy, upper)
    assert noisy.generate_until(pairs(("a", {"until": ["\n"]}))) == ["A"]
    assert noisy.loglikelihood_rolling(pairs(("abc",))) == [-3]
    assert toy.asked == [("ABC",)]
    assert NoisyLM(toy, upper, "completion").generate_until(pairs(("a", {}))) == ["a"]
    assert noisy.get_model_info() == {"name": "capitals"}
    with pytest.raises(AttributeError):
        _ = noisy.nothing


def test_the_noise_of_a_text_is_that_of_the_text_alone():
    drop, toy = parse_noise("drop:0.5"), Capitals()
    NoisyLM(toy, drop, "both", seed=4).loglikelihood(pairs(("some context", " some rest")))
    expected = (drop("some context", 4).decode(), " " + drop("some rest", 4).decode())
    assert toy.asked == [expected]


def choose(lm):
    """Two documents with two choices each: the first choice is right."""
    requests = pairs(("x", " aa"), ("x", " Bbb"), ("Yy", " c"), ("Yy", " D"))
    nats = [value for value, _ in lm.loglikelihood(requests)]
    right = np.array([nats[0] > nats[1], nats[2] > nats[3]], float)
    return [Scores("letters", "acc", "mean", right, np.ones(2), ("0", "1"))]


def test_scores_and_changes_by_hand():
    """In capitals, the longer choice of the first document has more, and the others are alike."""
    toy = Capitals()
    found = measure_noisy_tasks(choose, toy, choose(toy), [parse_noise("uppercase")])
    scores = {(one.noise, one.part): (one.value.value, one.change.estimate.value) for one in found}
    assert scores == {
        ("clean", ""): (1, 0),
        ("uppercase", "prompt"): (1, 0),
        ("uppercase", "completion"): (0.5, -0.5),
        ("uppercase", "both"): (0.5, -0.5),
        ("uppercase", "mean"): pytest.approx((2 / 3, -1 / 3)),
    }
    changed = found[2].change
    assert (changed.estimate.low, changed.estimate.high, changed.p) == (-1, 0, 1)
    section = noisy_tasks_section(found)
    assert [row[:4] for row in section.rows][-1] == ("letters", "acc", "uppercase", "mean")
    assert all(len(row) == len(section.columns) for row in section.rows)
    assert json.loads(json.dumps(section.record, allow_nan=False))["scores"][2]["documents"] == 2
    drop = [parse_noise("drop")]
    (_, prompt) = measure_noisy_tasks(choose, toy, choose(toy), drop, parts=["prompt"])
    assert prompt.part == "prompt"


def test_parts_to_noise_are_named():
    assert parse_parts(None) == ()
    assert parse_parts("both, prompt") == ("prompt", "both")
    with pytest.raises(ConfigError, match="must be some of prompt,completion,both"):
        parse_parts("prompts")
