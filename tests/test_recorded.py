"""Small trainings whose losses were recorded: a change of the code must not change them.

The recipes keep the configuration keys of the version that recorded them, 0.1.0 of 2026-11-24.
Where numbers are meant to change, `python tests/test_recorded.py` records them again, and the log
says why.
"""

import functools
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bytelm.config import Recipe, parse
from bytelm.data import PrepareOptions, prepare
from bytelm.tokens import train_tokenizer
from bytelm.training import Trainer, train

RECORD = Path(__file__).with_name("recorded_losses.json")
WORDS = ["the", "patch", "of", "bytes", "ends", "where", "entropy", "rises", "caf\u00e9", "\n"]
LOCAL = {"dim": 32, "num_heads": 2, "ffn_dim": 64, "window": 16}
GLOBAL = {"dim": 48, "num_layers": 2, "num_heads": 4, "ffn_dim": 96}
BLT = {
    "kind": "blt",
    "local": {**LOCAL, "encoder_layers": 1, "decoder_layers": 2},
    "global_model": GLOBAL,
    "cross_attention": {"slots": 2, "num_heads": 2},
}
TRANSFORMER = {"kind": "transformer", **GLOBAL}
SCORER = "entropy model"
RUNS = {
    SCORER: ("text", {"model": {**TRANSFORMER, "window": 16}}),
    "BLT, entropy patches": (
        "scored",
        {
            "model": {**BLT, "ngrams": {"sizes": [3, 5], "rows": 512}},
            "patching": {"kind": "entropy", "threshold": 4.0, "max_length": 8},
            "optimizer": {"rates": {"embeddings": 4, "global": 0.5}},
        },
    ),
    "BLT, space patches": (
        "text",
        {"model": BLT, "patching": {"kind": "space", "max_length": 6}},
    ),
    "transformer over tokens": (
        "text",
        {"model": {**TRANSFORMER, "vocab_size": 296}, "data": {"tokenizer": "tokenizer"}},
    ),
}


def prepare_text(folder: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(5, 90))) for _ in range(60)]
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "text.jsonl").write_text("\n".join(lines), "utf-8")
    prepare_as(folder, "text")
    train_tokenizer([text.encode() for text in texts], 296).save(folder / "tokenizer")


def prepare_as(folder: Path, name: str, scorer: Path | None = None) -> None:
    options = PrepareOptions(scorer=scorer, workers=1, validation_share=0.1)
    prepare([str(folder / "text.jsonl")], folder / name, options)


def losses_of(name: str, folder: Path) -> list[float]:
    """Train a model by its recipe."""
    data, changes = RUNS[name]
    values = {
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2},
        "train": {"steps": 12, "log_every": 1},
        **changes,
    }
    own = dict(changes.get("data", {}))
    if "tokenizer" in own:
        own["tokenizer"] = str(folder / own["tokenizer"])
    # That version filled rows in order.
    rows = {"row_bytes": 192, "rows_per_step": 4, "packing": "in-order"}
    values["data"] = {"path": str(folder / data), **rows, **own}
    recipe = parse(Recipe, values, name)
    if name == SCORER:
        train(recipe, folder / "scorer")
        lines = (folder / "scorer" / "metrics.jsonl").read_text("utf-8").splitlines()
        return [metrics["loss"] for metrics in map(json.loads, lines) if "loss" in metrics]
    # Checkpoints of the others are not needed, and would be of more than a gigabyte.
    trainer, losses = Trainer(recipe), []
    while trainer.num_steps < trainer.last_step:
        trainer.step()
        losses.append(trainer.report()["loss"])
    return losses


def trainings(folder: Path) -> Callable[[str], list[float]]:
    """Prepare the text, and return the losses of each run by its name."""
    prepare_text(folder)

    @functools.cache
    def trained(name: str) -> list[float]:
        if RUNS[name][0] == "scored":
            trained(SCORER)
            prepare_as(folder, "scored", folder / "scorer")
        return losses_of(name, folder)

    return trained


@pytest.fixture(scope="module")
def trained(tmp_path_factory, whole_samples):
    return trainings(tmp_path_factory.mktemp("recorded"))


# Its tables are as large as usual, those of the other BLT are small.
LARGE = "BLT, space patches"


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n == LARGE else ()) for n in RUNS]
)
def test_losses_are_those_recorded(trained, name):
    recorded = json.loads(RECORD.read_text("utf-8"))[name]
    assert len(recorded) == 12
    assert all(map(math.isfinite, recorded))
    # Processors add up in other orders; the same one gives the same bits.
    assert trained(name) == pytest.approx(recorded, rel=1e-6)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        losses_by_name = trainings(Path(made))
        found = {name: losses_by_name(name) for name in RUNS}
        RECORD.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
