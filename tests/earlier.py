"""Runs as earlier versions left them."""

import json
from functools import reduce
from operator import getitem
from pathlib import Path

from bytelm.layout import saved_steps
from bytelm.progress import Callback, StopTraining
from bytelm.storage import FILES, _describe_files, write_json


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_metrics(self, step, metrics):
        if step == self.step:
            raise StopTraining


def forget_packing(run: Path) -> None:
    """Remove what checkpoints of earlier versions did not say: how rows are filled, and charged."""
    (checkpoint,) = saved_steps(run)
    missing = {
        "trainer.json": ["attended_flops"],
        "config.json": ["training", "recipe", "data", "packing"],
    }
    for name, path in missing.items():
        data = json.loads((checkpoint / name).read_text())
        *sections, key = path
        del reduce(getitem, sections, data)[key]
        write_json(checkpoint / name, data)
    (checkpoint / FILES).unlink()
    write_json(checkpoint / FILES, _describe_files(checkpoint))
    lines = (run / "recipe.yaml").read_text().splitlines()
    (run / "recipe.yaml").write_text("\n".join(line for line in lines if "packing" not in line))
