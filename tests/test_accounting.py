import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from builders import (
    BLT_VARIANTS,
    NGRAMS,
    blt_config,
    random_blt,
    random_ids,
    random_patched,
    random_transformer,
)
from bytelm import cpu
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
from bytelm.config import BLTConfig, HashEmbeddingConfig, TransformerConfig
from bytelm.inference import Session
from bytelm.model.blt import BLT
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
    # What latents predict of a vocabulary is computed again for the gradients.
    again = parts["vocabulary"].linear if variant == "vocabulary" else 0
    assert found == 3 * sum(part.linear for part in parts.values()) + again


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
    matrices, embeddings = parameter_counts(blt_config(variant))
    assert matrices + embeddings == sum(p.numel() for p in model.parameters())
    assert embeddings == sum(p.numel() for p in model.encoder.embedding.parameters())


@pytest.mark.parametrize("variant", BLT_VARIANTS)
def test_linear_flops_of_stacks_equal_torchs_count_part_by_part(variant):
    blt, num_patches = random_blt(variant), 12
    parts = forward_flops(blt_config(variant), 50, num_patches)
    x = torch.randn(1, 50, 32)
    documents, positions = torch.zeros(1, 50, dtype=torch.long), torch.arange(50)[None]
    context = blt.encoder.spec.over_rows(documents, positions)
    assert parts["encoder"].linear == counted_linear(lambda: blt.encoder(x, context))
    x = torch.randn(1, num_patches, blt_config(variant).global_model.dim)
    rows = documents[:, :num_patches], positions[:, :num_patches]
    context = blt.global_model.spec.over_rows(*rows)
    assert parts["global"].linear == counted_linear(lambda: blt.global_model(x, context))


@pytest.mark.parametrize("variant", BLT_VARIANTS)
def test_parameters_by_part_are_those_of_the_model(variant):
    config, model = blt_config(variant), random_blt(variant)
    parts = parameters_by_part(config)
    assert sum(parts.values()) == sum(p.numel() for p in model.parameters())
    assert parts["byte embedding"] == model.encoder.embedding.ids.weight.numel()
    assert parts["global"] == sum(p.numel() for p in model.global_model.parameters())
    assert parts["encoder"] == sum(p.numel() for p in model.encoder.blocks.parameters())
    assert parts["decoder cross-attention"] == sum(
        p.numel() for p in model.decoder.cross_attention.parameters()
    )


@pytest.mark.parametrize("ngrams", [None, NGRAMS], ids=["bytes", "n-grams"])
def test_parameters_by_part_of_a_transformer_are_those_of_the_model(ngrams):
    config = TransformerConfig(**SMALL, hash_embeddings=ngrams)
    model, parts = random_transformer(hash_embeddings=ngrams), parameters_by_part(config)
    assert sum(parts.values()) == sum(p.numel() for p in model.parameters())
    assert parts.get("hash embeddings", 0) == (2 * 2 * 89 * config.dim if ngrams else 0)
    none = HashEmbeddingConfig(sizes=())
    assert TransformerConfig(**SMALL, hash_embeddings=none) == TransformerConfig(**SMALL)


NUM_BYTES, NUM_PATCHES = 18, 7
"""With ``StaticRule(3)``: BOS, the two after it, five of three bytes; all closed."""


class Products(TorchDispatchMode):
    """Counts as torch's counter does, which has hooks that would turn fused passes off."""

    def __init__(self):
        super().__init__()
        self.linear = self.attention = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, function._overloadpacket
        if packet not in flop_registry:
            with self:
                result = function.decompose(*args, **kwargs)
            return function(*args, **kwargs) if result is NotImplemented else result
        result = function(*args, **kwargs)
        flops = flop_registry[packet](*args, **kwargs, out_val=result)
        is_attention = "bmm" in str(packet) or "attention" in str(packet)
        self.attention += flops if is_attention else 0
        self.linear += 0 if is_attention else flops
        return result


def counted_session(model, ids):
    """FLOPs of feeding ids one at a time: products with weights, and those of attention."""
    session = Session(cpu.fuse(model.requires_grad_(False)))
    with Products() as products:
        for one in ids:
            session.feed(one[None])
    return products.linear, products.attention


@pytest.mark.parametrize("variant", BLT_VARIANTS)
def test_flops_of_a_session_equal_torchs_count_of_it(variant):
    model, config = random_patched(variant, rule=StaticRule(3)), blt_config(variant)
    linear, attention = counted_session(model, random_ids(NUM_BYTES))
    parts = forward_flops(config, NUM_BYTES, NUM_PATCHES)
    # The first latent predicts in the pass of a row, and again for the bytes to come.
    again = parts["vocabulary"].linear // NUM_PATCHES if variant == "vocabulary" else 0
    assert sum(part.linear for part in parts.values()) + again == linear
    # Torch has no formula for the operation that the first byte, a row of its own, passes through,
    # and none for the segments in which patches meet their bytes.
    first = forward_flops(config, 1, 1).items()
    uncounted = sum(part.attention for name, part in first if name != "encoder cross-attention")
    uncounted += parts["encoder cross-attention"].attention
    assert sum(part.attention for part in parts.values()) - uncounted == attention


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
    assert costs["hash embeddings"].weights_read == 2 * 3 * config.local.dim
    tables = decode_costs(TransformerConfig(**SMALL, hash_embeddings=NGRAMS), 60, element_size=2)
    assert tables["hash embeddings"].weights_read == 2 * 4 * SMALL["dim"]


def held(cache):
    """Bytes of memory of the keys and values in a cache."""
    tensors = [*cache.keys, *cache.values]
    used = min(int(cache.positions[0]), cache.room)
    return sum(4 * tensor.numel() * used // cache.room for tensor in tensors)


@pytest.mark.parametrize("variant", ["base", "all layers", "no n-grams", "grouped heads"])
def test_caches_are_those_that_a_state_holds(variant):
    model, config = random_patched(variant, rule=StaticRule(3)), blt_config(variant)
    state = model.new_state()
    state.prefill(0, random_ids(NUM_BYTES))
    sizes = cache_sizes(config, NUM_BYTES, NUM_PATCHES, element_size=4)
    assert sizes["encoder"] == held(state._encoder_cache)
    assert sizes["global"] == held(state._global_cache)
    assert sizes["decoder"] == held(state._decoder_cache)
    latent = sum(x.numel() for layer in state.latent.read(None) for x in layer)
    assert sizes["decoder cross-attention"] == 4 * latent


BLOCKS = {
    "grouped": {"num_heads": 4, "num_kv_heads": 2},
    "one group, wide heads": {"num_heads": 4, "num_kv_heads": 1, "head_dim": 12},
    "biases": {"qkv_bias": True, "out_bias": True, "ffn_bias": True},
    "qk norms": {"qk_norm": True},
}


@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
def test_options_of_blocks_are_counted(options):
    """Parameters and products of a transformer and of each stack of a BLT."""
    config = TransformerConfig(**{**SMALL, **options})
    model, ids = random_transformer(**options), random_ids(40)[None]
    parts = forward_flops(config, 40)
    assert sum(part.linear for part in parts.values()) == counted_linear(lambda: model(ids))
    assert sum(parameters_by_part(config).values()) == sum(p.numel() for p in model.parameters())
    base = blt_config().model_dump()
    config = BLTConfig(
        **{**base, **{part: {**base[part], **options} for part in ("local", "global_model")}}
    )
    blt = BLT(config)
    patches = build_patches(random_ids(50, seed=1)[None] % 3 == 0)
    parts = forward_flops(config, 50, patches.num_patches)
    expected = counted_linear(lambda: blt(random_ids(50)[None], patches))
    assert sum(part.linear for part in parts.values()) == expected
    assert sum(parameters_by_part(config).values()) == sum(p.numel() for p in blt.parameters())


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_shared_keys_save_memory_and_no_arithmetic(kv_heads):
    config = TransformerConfig(**{**SMALL, "num_heads": 4, "num_kv_heads": kv_heads})
    full = TransformerConfig(**{**SMALL, "num_heads": 4})
    sizes, full_sizes = (
        cache_sizes(one, 50, element_size=4)["transformer"] for one in (config, full)
    )
    assert sizes * 4 == full_sizes * kv_heads
    costs, full_costs = (forward_flops(one, 50)["transformer"] for one in (config, full))
    assert costs.attention == full_costs.attention
    assert sum(
        decode_costs(config, n, element_size=4)["transformer"].flops for n in range(1, 21)
    ) == (pytest.approx(forward_flops(config, 20)["transformer"].total))


def test_a_scorer_is_a_part_that_no_gradient_passes():
    config, scorer = blt_config(), TransformerConfig(**SMALL)
    alone = break_down(config, 64, 16, element_size=4)
    parts = break_down(config, 64, 16, element_size=4, scorer=scorer)
    assert {k: v for k, v in parts.items() if k != "scorer"} == alone
    forward = sum(part.total for part in forward_flops(scorer, 64).values()) / 64
    assert parts["scorer"].training == parts["scorer"].forward == pytest.approx(forward)
    assert total(alone.values()).training == pytest.approx(training_flops(config, 64, 16) / 64)
    assert parts["scorer"].parameters == sum(parameters_by_part(scorer).values())
