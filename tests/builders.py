"""Small random models and byte strings that the tests share."""

import random
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from bytelm import codec
from bytelm.config import (
    BlockConfig,
    BLTConfig,
    HashEmbeddingConfig,
    NgramConfig,
    RopeScaling,
    StackConfig,
    TransformerConfig,
    parse,
)
from bytelm.lm import ByteLM, PatchedLM
from bytelm.model.blt import BLT
from bytelm.model.layers import init_linear
from bytelm.model.transformer import Transformer
from bytelm.model.vocabulary import build_trie
from bytelm.patching import EntropyRule, Patcher, SpaceRule, StaticRule
from bytelm.scoring import NgramScorer, TransformerScorer, fit_ngram_scorer

BASE_BLT = {
    "local": {
        "dim": 32,
        "num_heads": 2,
        "ffn_dim": 48,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "window": 8,
    },
    "global_model": {"dim": 48, "num_layers": 2, "num_heads": 2, "ffn_dim": 64},
    "cross_attention": {"slots": 2, "num_heads": 2},
    "hash_embeddings": {"sizes": [3, 4, 5], "num_buckets": 97},
}

# One per corner of the ablations: each differs from BASE_BLT in the named options.
BLT_VARIANTS = {
    "base": {},
    "one slot": {"cross_attention": {"slots": 1, "num_heads": 4}},
    "odd heads": {"cross_attention": {"slots": 3, "num_heads": 3}},
    "all layers": {
        "local": {"encoder_layers": 3},
        "cross_attention": {"encoder": "all", "residual": "doubled"},
    },
    "learned queries": {
        "local": {"encoder_layers": 2},
        "cross_attention": {"queries": "learned", "decoder": "first"},
    },
    "no cross-attention": {"cross_attention": {"encoder": "none", "decoder": "none"}},
    "no n-grams": {"hash_embeddings": {"sizes": []}, "local": {"window": None}},
    "many tables": {"hash_embeddings": {"functions": 2, "combine": "mean"}, "local": {"window": 3}},
    "no projection": {"global_model": {"dim": 64}},
    "grouped heads": {
        "local": {"num_heads": 4, "num_kv_heads": 2},
        "global_model": {"num_heads": 4, "num_kv_heads": 1, "norm_eps": 1e-3},
    },
}

_RANDOM = random.Random(0)
PIECES = sorted(
    {b"", *(bytes([byte]) for byte in range(0, 256, 2))}
    | {bytes(_RANDOM.choices(range(256), k=_RANDOM.choice((2, 2, 3)))) for _ in range(3000)}
    | {b"a", b"an", b"and", b"ant", b" t", b" the", b" then", b"e"}
)
"""Pieces of a vocabulary: some bytes begin many of them, some are none."""
TRIE = build_trie(PIECES)
BLT_VARIANTS["vocabulary"] = {
    "vocabulary": {
        "size": len(PIECES),
        "nodes": len(TRIE["begins"]),
        "widest": int(TRIE["branches"].diff().max()),
        "tied": False,
    }
}

NGRAMS = HashEmbeddingConfig(sizes=(2, 4), num_buckets=89, functions=2)
"""Hash embeddings for a plain transformer."""
SPACE_BLT = {
    "model": {
        "kind": "blt",
        "local": {"dim": 16, "num_heads": 2, "ffn_dim": 24, "decoder_layers": 1, "window": 8},
        "global_model": {"dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 24},
        "cross_attention": {"num_heads": 2},
        "hash_embeddings": {"num_buckets": 53},
    },
    "patching": {"kind": "space"},
    "data": {"row_bytes": 64, "rows_per_step": 2},
}
"""A recipe without steps: a small BLT with space patches."""


def merged(base, changes):
    result = dict(base)
    for key, value in changes.items():
        result[key] = merged(result.get(key, {}), value) if isinstance(value, dict) else value
    return result


def blt_config(variant="base") -> BLTConfig:
    return parse(BLTConfig, merged(BASE_BLT, BLT_VARIANTS[variant]), "test")


def randomise(model, seed):
    """Weights none of which are 0, as they are before training: every part must matter."""
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    for parameter in model.parameters():
        if parameter.any():
            continue
        if parameter.dim() > 1:
            init_linear(parameter, generator)
        else:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.eval()


def block_config(**changes) -> BlockConfig:
    return BlockConfig(**{"dim": 16, "num_heads": 2, "ffn_dim": 24, **changes})


def randomise_module(module, seed=0):
    """Weights of about unit gain, biases and norms included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            std = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
            parameter.normal_(float("norm" in name), std, generator=generator)
    return module


def random_blt(variant="base", seed=0) -> BLT:
    blt = randomise(BLT(blt_config(variant)), seed)
    if blt.vocabulary is not None:
        blt.vocabulary.load_state_dict(TRIE, strict=False)
    return blt


def random_transformer(seed=0, **changes) -> Transformer:
    options = {"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 48, "window": 8}
    return randomise(Transformer(TransformerConfig(**{**options, **changes})), seed)


def random_byte_lm(seed=0, **changes) -> ByteLM:
    return ByteLM(random_transformer(seed, **changes)).eval()


def random_scorer(seed=1, reset_at_newline=False, ngrams=None) -> TransformerScorer:
    transformer = random_transformer(seed, num_layers=1, window=6, hash_embeddings=ngrams)
    return TransformerScorer(transformer, reset_at_newline=reset_at_newline)


def threshold_between(entropies: torch.Tensor, quantile: float) -> float:
    """A threshold at about ``quantile``, in the widest gap nearby: rounding cannot cross it."""
    values = entropies.flatten().sort().values.double()
    if len(values) < 2:
        return float(values[0]) + 1.0
    centre = int(quantile * (len(values) - 1))
    low, high = max(centre - 5, 0), min(centre + 5, len(values) - 1)
    gaps = values[low + 1 : high + 1] - values[low:high]
    at = low + int(gaps.argmax())
    return float((values[at] + values[at + 1]) / 2)


def fitted_ngram_scorer(reset_at_newline=False) -> NgramScorer:
    documents = [random_ids(400, seed=n, num_values=40).numpy() for n in range(3)]
    documents.append(codec.encode(b"the cat sat on the mat\n" * 9))
    scorer = fit_ngram_scorer(documents, NgramConfig(max_order=3, min_count=1))
    scorer.reset_at_newline = reset_at_newline
    return scorer


def random_patched(
    variant="base",
    seed=0,
    max_length=None,
    rule=None,
    reset=False,
    scorer_ngrams=None,
    ngram_scorer=False,
) -> PatchedLM:
    if ngram_scorer:
        scorer = fitted_ngram_scorer()
    else:
        scorer = random_scorer(seed + 1, reset_at_newline=reset, ngrams=scorer_ngrams)
    if rule is None:
        sample = torch.randint(0, codec.VOCAB_SIZE, (1, 400), generator=torch.Generator())
        with torch.no_grad():
            entropies = scorer.entropies(sample)
        rule = EntropyRule(threshold=threshold_between(entropies, 0.6))
    return PatchedLM(random_blt(variant, seed), Patcher(rule, max_length), scorer).eval()


def lm_models():
    """Makers of models of every kind, by name: each must have every property."""
    return {
        **{name: (lambda name=name: random_patched(name)) for name in BLT_VARIANTS},
        "space": lambda: random_patched(rule=SpaceRule()),
        "static": lambda: random_patched(rule=StaticRule(3)),
        "monotonic": lambda: random_patched(rule=EntropyRule(increase=0.05)),
        "combined": lambda: random_patched(rule=EntropyRule(threshold=4.0, increase=0.01)),
        "every byte a patch": lambda: random_patched(rule=EntropyRule(threshold=-1.0)),
        "never a boundary": lambda: random_patched(rule=EntropyRule(threshold=99.0)),
        "capped": lambda: random_patched(max_length=3),
        "reset": lambda: random_patched(reset=True, scorer_ngrams=NGRAMS),
        "n-gram scorer": lambda: random_patched(ngram_scorer=True),
        "stateful rule": lambda: random_patched(rule=CumulativeRule(9.0), max_length=5),
        "learned rule": lambda: random_patched(rule=LearnedRule(32)),
        "transformer": random_byte_lm,
        "transformer with n-grams": lambda: random_byte_lm(window=None, hash_embeddings=NGRAMS),
        "llama-like": lambda: random_byte_lm(
            num_heads=4,
            num_kv_heads=2,
            head_dim=12,
            norm_eps=1e-3,
            qk_norm=True,
            qkv_bias=True,
            rope_layout="half",
            rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_context=64),
        ),
    }


def some_by_default(names):
    """Parameters of a fixture: one model of each way to decode, the rest in the slow stage."""
    some = {
        "base",
        "no cross-attention",
        "vocabulary",
        "every byte a patch",
        "reset",
        "n-gram scorer",
        "stateful rule",
        "learned rule",
        "transformer with n-grams",
    }
    return [pytest.param(name, marks=() if name in some else pytest.mark.slow) for name in names]


@dataclass(frozen=True)
class CumulativeRule:
    """A patch begins once the entropies since the last boundary add up to a budget."""

    budget: float
    needs_entropies: ClassVar[bool] = True

    def start(self):
        return 0.0

    def advance(self, seen, memory):
        decisions = []
        for entropy in seen.entropies.tolist():
            memory += entropy
            decisions.append(memory > self.budget)
            memory = 0.0 if decisions[-1] else memory
        return torch.tensor(decisions, device=seen.ids.device), memory


class LearnedRule(torch.nn.Module):
    """A linear head on the encoder's states says where patches begin."""

    needs_entropies: ClassVar[bool] = False
    needs_states: ClassVar[bool] = True

    def __init__(self, dim):
        super().__init__()
        self.head = torch.nn.Linear(dim, 1)

    def forward(self, seen):
        return self.head(seen.states)[..., 0] > 0.3


def stack_config(**changes) -> StackConfig:
    return StackConfig(**{"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 48, **changes})


def ids_of(document: bytes) -> torch.Tensor:
    return torch.from_numpy(codec.encode(document))


def pack(documents, length=None):
    """One row of documents (each a tensor of ids), padded to ``length``."""
    ids = torch.cat(documents)
    numbers = torch.cat([torch.full_like(d, i) for i, d in enumerate(documents)])
    padding = (length or len(ids)) - len(ids)
    ids = torch.cat([ids, torch.zeros(padding, dtype=torch.long)])
    numbers = torch.cat([numbers, torch.full((padding,), -1)])
    return ids, numbers


# Random bytes, text with repeats and newlines (long patches), and bytes that are not UTF-8.
byte_strings = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=40).map(lambda s: s.encode("utf-8", "surrogatepass")),
    st.lists(
        st.sampled_from([b"a", b"ab ", b"\n", b"the ", b"\xff", "é".encode()]), max_size=30
    ).map(b"".join),
)


def random_ids(length, seed=0, num_values=codec.VOCAB_SIZE) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, num_values, length))


class LargestTensor(torch.overrides.TorchFunctionMode):
    """Watches, as a context, how large the tensors are that torch functions return."""

    num_bytes = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.num_bytes = max(self.num_bytes, result.untyped_storage().nbytes())
        return result


piece_sizes = st.lists(st.integers(0, 20), max_size=8)


def cut(sequence, sizes):
    """``sequence`` in pieces of the given sizes, then the rest in one."""
    begin = 0
    for size in sizes:
        yield sequence[begin : begin + size]
        begin += size
    yield sequence[begin:]
