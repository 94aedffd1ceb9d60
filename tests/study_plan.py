"""A small plan of made-up models that the tests of studies share."""

import json

import numpy as np

from bytelm.study import Plan, parse_plan
from bytelm.study.inheritance import merge

WORDS = ["the", "patch", "of", "bytes", "is", "cut", "where", "entropy", "rises", "\n"]
PREPARED = ("text", "scored", "scorers", "tokenizers", "text.json")
TINY = {"dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 24}


PLAN = {
    "name": "test",
    "title": "A test",
    "text": {"train": ["x.jsonl"], "validation": ["held.jsonl"], "evaluated_bytes": 3000},
    "scorers": {"table": {"recipe": "entropy-ngram", "overrides": ["model.min_count=1"]}},
    "base": {
        "data": {"row_bytes": 64, "rows_per_step": 2},
        "train": {"validation_bytes": 500, "validate_every": 1000, "checkpoint_every": 1000},
    },
    "families": {
        "byte": {
            "label": "bytes",
            "recipe": {"model": {"kind": "transformer"}},
            "sizes": {"s": {"model": {**TINY, "dim": 32, "ffn_dim": 48}}},
        },
        "tokens": {"label": "tokens", "like": "byte", "vocab_size": 270, "unit_bytes": 2},
        "space": {
            "label": "space patches",
            "unit_bytes": 5,
            "recipe": {
                "model": {
                    "kind": "blt",
                    "cross_attention": {"num_heads": 2},
                    "hash_embeddings": {"num_buckets": 53},
                },
                "patching": {"kind": "space"},
            },
            "sizes": {
                "s": {
                    "model": {
                        "local": {
                            "dim": 16,
                            "num_heads": 2,
                            "ffn_dim": 24,
                            "decoder_layers": 1,
                            "window": 8,
                        },
                        "global_model": TINY,
                    }
                }
            },
        },
        "entropy": {
            "label": "entropy patches",
            "like": "space",
            "scorer": "table",
            "recipe": {"patching": {"kind": "entropy", "patch_size": 3.0}},
        },
    },
    "runs": [
        {"families": ["byte", "tokens"], "sizes": ["s"], "flops": [6.2e8, 8.2e8]},
        {"families": ["space", "entropy"], "sizes": ["s"], "flops": [6.2e8]},
        {"families": ["byte"], "sizes": ["s"], "flops": [6.2e8], "seeds": [1]},
    ],
    "comparisons": {
        "training": {
            "kind": "training",
            "title": "At equal FLOPs",
            "families": ["byte", "tokens", "space", "entropy"],
            "baseline": "byte",
        },
        "inference": {
            "kind": "inference",
            "title": "At equal inference",
            "families": ["byte/s", "tokens/s"],
            "baseline": "byte/s",
        },
        "all": {"kind": "table", "title": "All", "families": ["byte", "space"]},
    },
}


def plan(**changes) -> Plan:
    """Return the plan with changes laid over it."""
    return parse_plan(merge(PLAN, changes), "test")


def changed(path, value):
    """Return the data of the plan with one value replaced."""
    *parents, last = path.split(".")
    data = json.loads(json.dumps(PLAN))
    at = data
    for parent in parents:
        at = at[int(parent) if parent.isdigit() else parent]
    at[last] = value
    return data


def write_text(folder):
    """Write made-up sentences, two of which are in both files, and return the plan's ``text``."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(5, 60))) for _ in range(300)]
    parts = {"train": texts[:260], "validation": [*texts[260:], texts[3], texts[7]]}
    names = {"train": "x.jsonl", "validation": "held.jsonl"}
    for part, some in parts.items():
        lines = "\n".join(json.dumps({"text": text}) for text in some)
        (folder / names[part]).write_text(lines)
    return {part: [str(folder / name)] for part, name in names.items()}


def link_prepared(out, folder):
    """Give a folder the prepared text of a study, without its runs."""
    for part in PREPARED:
        (folder / part).symlink_to(out / part)
