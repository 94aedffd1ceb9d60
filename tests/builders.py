"""Small random models and byte strings that the tests share."""

import numpy as np
import torch
from hypothesis import strategies as st

from bytelm import codec
from bytelm.config import BLTConfig, NgramEmbeddingConfig, StackConfig, TransformerConfig, parse
from bytelm.model.blt import BLT
from bytelm.model.layers import init_linear
from bytelm.model.patched import PatchedModel
from bytelm.model.scorers import TransformerScorer
from bytelm.model.transformer import Transformer
from bytelm.patching import EntropyRule, Patcher

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
    "ngrams": {"sizes": [3, 4, 5], "rows": 97},
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
    "no n-grams": {"ngrams": {"sizes": []}, "local": {"window": None}},
    "many tables": {"ngrams": {"functions": 2, "combine": "mean"}, "local": {"window": 3}},
    "no projection": {"global_model": {"dim": 64}},
}


NGRAMS = NgramEmbeddingConfig(sizes=(2, 4), rows=89, functions=2)
"""Tables for a plain transformer."""


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
        if not parameter.any():
            init_linear(parameter, generator)
    return model.eval()


def random_blt(variant="base", seed=0) -> BLT:
    return randomise(BLT(blt_config(variant)), seed)


def random_transformer(seed=0, **changes) -> Transformer:
    options = {"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 48, "window": 8}
    return randomise(Transformer(TransformerConfig(**{**options, **changes})), seed)


def random_scorer(seed=1, reset_at_newline=False, ngrams=None) -> TransformerScorer:
    transformer = random_transformer(seed, num_layers=1, window=6, ngrams=ngrams)
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


def random_patched(
    variant="base", seed=0, max_length=None, rule=None, reset=False, scorer_ngrams=None
) -> PatchedModel:
    scorer = random_scorer(seed + 1, reset_at_newline=reset, ngrams=scorer_ngrams)
    if rule is None:
        sample = torch.randint(0, codec.VOCAB_SIZE, (1, 400), generator=torch.Generator())
        with torch.no_grad():
            entropies = scorer.entropies(sample)
        rule = EntropyRule(threshold=threshold_between(entropies, 0.6))
    return PatchedModel(random_blt(variant, seed), Patcher(rule, max_length), scorer).eval()


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
