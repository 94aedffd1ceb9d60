import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from builders import (
    BLT_VARIANTS,
    NGRAMS,
    blt_config,
    random_blt,
    random_ids,
    random_patched,
    random_transformer,
)
from bytelm.accounting import (
    break_down,
    cache_sizes,
    decode_costs,
    forward_flops,
    parameter_counts,
    parameters_by_part,
    total,
    training_flops,
)
from bytelm.config import NgramEmbeddingConfig, TransformerConfig
from bytelm.generation import start_session
from bytelm.model.attention import StackCache
from bytelm.patching import StaticRule, build_patches

SMALL = {"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 48, "window": 8}


def counted_linear(function):
    """FLOPs of matrix products, as torch counts them; attention apart."""
    with FlopCounterMode(display=False) as counter:
        function()
    by_operation = counter.get_flop_counts()["Global"]
    return sum(n for op, n in by_operation.items() if "attention" not in str(op))


@pytest.mark.parametrize("variant", BLT_VARIANTS)
def test_linear_flops_of_a_blt_equal_torchs_count(variant):
    blt, ids = random_blt(variant), random_ids(50)[None]
    patches = build_patches(random_ids(50, seed=1)[None] % 3 == 0)
    parts = forward_flops(blt_config(variant), 50, patches.num_patches)
    expected = counted_linear(lambda: blt(ids, patches))
    assert sum(part.linear for part in parts.values()) == expected


def test_linear_flops_of_a_transformer_equal_torchs_count():
    model, ids = random_transformer(), random_ids(40)[None]
    parts = forward_flops(TransformerConfig(**SMALL), 40)
    assert sum(part.linear for part in parts.values()) == counted_linear(lambda: model(ids))


@pytest.mark.parametrize("variant", [*BLT_VARIANTS, "transformer"])
def test_linear_flops_of_a_step_are_three_times_those_of_the_forward_pass(variant):
    """Every product has a gradient for its weights, and one for what went in.

    In bfloat16, where autograd does it: in float32 on a CPU the feed-forward layer computes one
    product again instead of keeping it, which is no part of the model's FLOPs.
    """
    ids = random_ids(50)[None]
    if variant == "transformer":
        model, inputs = random_transformer(), (ids,)
        parts = forward_flops(TransformerConfig(**SMALL), 50)
    else:
        patches = build_patches(random_ids(50, seed=1)[None] % 3 == 0)
        model, inputs = random_blt(variant), (ids, patches)
        parts = forward_flops(blt_config(variant), 50, patches.num_patches)
    model = model.bfloat16()
    found = counted_linear(lambda: model(*inputs).logsumexp(-1).sum().backward())
    assert found == 3 * sum(part.linear for part in parts.values())


@pytest.mark.parametrize(("length", "window"), [(10, None), (10, 3), (2, 3), (10, 10), (7, 1)])
def test_attention_flops_count_the_visible_pairs(length, window):
    config = TransformerConfig(**{**SMALL, "window": window})
    pairs = sum(min(i + 1, window or length) for i in range(length))
    part = forward_flops(config, length)["transformer"]
    assert part.attention == 2 * 4 * 32 * pairs


def test_training_costs_three_forward_passes_and_padding_is_paid_for():
    config = blt_config()
    forward = sum(part.total for part in forward_flops(config, 64, 16).values())
    assert training_flops(config, 64, 16) == 3 * forward
    assert training_flops(config, 64, 20) > training_flops(config, 64, 16)


def test_larger_patches_cost_less():
    costs = [training_flops(blt_config(), 240, 240 // size) for size in (2, 3, 4, 6, 8)]
    assert costs == sorted(costs, reverse=True)


@pytest.mark.parametrize("variant", BLT_VARIANTS)
def test_every_parameter_is_in_one_part(variant):
    model = random_blt(variant)
    assert sum(parameter_counts(model).values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("variant", BLT_VARIANTS)
def test_linear_flops_of_stacks_equal_torchs_count_part_by_part(variant):
    blt, num_patches = random_blt(variant), 12
    parts = forward_flops(blt_config(variant), 50, num_patches)
    x = torch.randn(1, 50, 32)
    documents, positions = torch.zeros(1, 50, dtype=torch.long), torch.arange(50)[None]
    context = blt.encoder.spec.over_rows(documents, positions)
    assert parts["encoder"].linear == counted_linear(lambda: blt.encoder.byte_states(x, context))
    x = torch.randn(1, num_patches, blt_config(variant).global_model.dim)
    rows = documents[:, :num_patches], positions[:, :num_patches]
    context = blt.global_model.spec.over_rows(*rows)
    assert parts["global"].linear == counted_linear(lambda: blt.global_model(x, context))


@pytest.mark.parametrize("variant", BLT_VARIANTS)
def test_parameters_by_part_are_those_of_the_model(variant):
    config, model = blt_config(variant), random_blt(variant)
    parts, counts = parameters_by_part(config), parameter_counts(model)
    assert sum(parts.values()) == sum(p.numel() for p in model.parameters())
    for name in ("byte embedding", "n-gram embeddings", "global"):
        assert parts[name] == counts[name]
    assert parts["encoder"] == sum(p.numel() for p in model.encoder.blocks.parameters())
    assert parts["decoder cross-attention"] == sum(
        p.numel() for p in model.decoder.cross_attention.parameters()
    )


@pytest.mark.parametrize("ngrams", [None, NGRAMS], ids=["bytes", "n-grams"])
def test_parameters_by_part_of_a_transformer_are_those_of_the_model(ngrams):
    config, model = TransformerConfig(**SMALL, ngrams=ngrams), random_transformer(ngrams=ngrams)
    parts, counts = parameters_by_part(config), parameter_counts(model)
    assert sum(parts.values()) == sum(p.numel() for p in model.parameters())
    assert parts.keys() == counts.keys()
    assert parts.get("n-gram embeddings", 0) == (2 * 2 * 89 * config.dim if ngrams else 0)
    none = NgramEmbeddingConfig(sizes=())
    assert TransformerConfig(**SMALL, ngrams=none) == TransformerConfig(**SMALL)


NUM_BYTES, NUM_PATCHES = 18, 7
"""With ``StaticRule(3)``: BOS, the two after it, five of three bytes; all closed."""


def counted_session(model, ids):
    """FLOPs of feeding ids one at a time: products with weights, and batched products."""
    session = start_session(model.requires_grad_(False))
    with FlopCounterMode(display=False) as counter:
        for one in ids:
            session.feed(one[None])
    by_operation = counter.get_flop_counts()["Global"]
    batched = sum(n for op, n in by_operation.items() if "bmm" in str(op))
    return sum(by_operation.values()) - batched, batched


@pytest.mark.parametrize("variant", BLT_VARIANTS)
def test_flops_of_a_session_equal_torchs_count_of_it(variant):
    model, config = random_patched(variant, rule=StaticRule(3)), blt_config(variant)
    linear, batched = counted_session(model, random_ids(NUM_BYTES))
    parts = forward_flops(config, NUM_BYTES, NUM_PATCHES)
    assert sum(part.linear for part in parts.values()) == linear
    # The first byte meets its patch in segments, whose products torch does not count.
    first = forward_flops(config, 1, 1)
    uncounted = sum(part.attention for name, part in first.items() if "cross-attention" in name)
    assert sum(part.attention for part in parts.values()) - uncounted == batched


def test_decoding_byte_by_byte_adds_up_to_the_forward_pass():
    for config in (TransformerConfig(**SMALL), blt_config("all layers")):
        steps = [decode_costs(config, n, n, element_size=4) for n in range(1, 31)]
        for name, part in forward_flops(config, 30, 30).items():
            assert sum(step[name].flops for step in steps) == pytest.approx(part.total)


def test_what_runs_per_patch_is_read_once_per_patch():
    config = blt_config()
    parts, costs = parameters_by_part(config), decode_costs(config, 60, 20, element_size=2)
    norms = 2 * config.global_model.dim * config.global_model.num_layers
    assert costs["global"].weights_read == pytest.approx(2 * (parts["global"] - norms) / 3)
    norms = 2 * config.local.dim * config.local.decoder_layers
    assert costs["decoder"].weights_read == 2 * (parts["decoder"] - norms)
    assert costs["n-gram embeddings"].weights_read == 2 * 3 * config.local.dim
    tables = decode_costs(TransformerConfig(**SMALL, ngrams=NGRAMS), 60, element_size=2)
    assert tables["n-gram embeddings"].weights_read == 2 * 4 * SMALL["dim"]


def held(cache: StackCache, element_size=4):
    elements = 0
    for layer in cache._layers:
        elements += sum(seen.numel() for seen in layer._seen)
    return element_size * elements


@pytest.mark.parametrize("variant", ["base", "all layers", "no n-grams"])
def test_caches_are_those_that_a_session_holds(variant):
    model, config = random_patched(variant, rule=StaticRule(3)), blt_config(variant)
    session = start_session(model)
    for one in random_ids(NUM_BYTES):
        session.feed(one[None])
    sizes = cache_sizes(config, NUM_BYTES, NUM_PATCHES, element_size=4)
    assert sizes["encoder"] == held(session._caches.encoder)
    assert sizes["global"] == held(session._caches.global_model)
    assert sizes["decoder"] == held(session._caches.decoder)
    latent = sum(x.numel() for layer in session._last for x in layer)
    assert sizes["decoder cross-attention"] == 4 * latent


def test_a_scorer_is_a_part_that_no_gradient_passes():
    config, scorer = blt_config(), TransformerConfig(**SMALL)
    alone = break_down(config, 64, 16, element_size=4)
    parts = break_down(config, 64, 16, element_size=4, scorer=scorer)
    assert {k: v for k, v in parts.items() if k != "scorer"} == alone
    forward = sum(part.total for part in forward_flops(scorer, 64).values()) / 64
    assert parts["scorer"].training == parts["scorer"].forward == pytest.approx(forward)
    assert total(alone.values()).training == pytest.approx(training_flops(config, 64, 16) / 64)
    assert parts["scorer"].parameters == sum(parameters_by_part(scorer).values())
