import pytest
from torch.utils.flop_counter import FlopCounterMode

from builders import BLT_VARIANTS, blt_config, random_blt, random_ids, random_transformer
from bytelm.accounting import forward_flops, parameter_counts, training_flops
from bytelm.config import TransformerConfig
from bytelm.patching import build_patches

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
