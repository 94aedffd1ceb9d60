"""The paper's formulas give the paper's numbers (Tables 1, 2 and 11, appendix B)."""

import pytest

from bytelm.accounting import TRAINING_FACTOR, forward_flops, published
from bytelm.config import BLTConfig, TransformerConfig, load_recipe

LLAMA_2 = (32_000, 3.7)
LLAMA_3 = (128_256, 4.4)
# Forward FLOPs per byte at 8,192 bytes of context, by patch size: Table 10, worked out by hand.
TABLE_10 = {
    "blt-400m": {4: 4.16e8, 6: 3.16e8, 8: 2.69e8},
    "blt-1b": {4: 1.007e9, 6: 7.61e8, 8: 6.43e8},
    "blt-2b": {4: 1.427e9, 6: 1.038e9, 8: 8.49e8},
    "blt-4b": {4: 2.488e9, 6: 1.735e9, 8: 1.368e9},
    "blt-8b": {4: 3.732e9, 6: 2.569e9, 8: 1.998e9},
}


def llama_per_byte(dim, num_layers, tokenizer, context):
    vocab_size, bytes_per_token = tokenizer
    config = TransformerConfig(
        dim=dim,
        num_layers=num_layers,
        num_heads=dim // 128,
        ffn_dim=round(dim * 8 / 3),
        vocab_size=vocab_size,
    )
    return published.transformer_per_byte(config, context, unit_bytes=bytes_per_token)


def blt(name, **overrides) -> BLTConfig:
    config = load_recipe(name, [f"model.{k}={v}" for k, v in overrides.items()]).model
    assert isinstance(config, BLTConfig)
    return config


def with_the_papers_feed_forward(config):
    """Hidden layers of 8/3 of the width, which recipes round up to multiples of 256."""
    sections = {
        name: getattr(config, name).model_copy(
            update={"ffn_dim": round(getattr(config, name).dim * 8 / 3)}
        )
        for name in ("local", "global_model")
    }
    return config.model_copy(update=sections)


def per_byte_of(config, patch_size, context=8192):
    return sum(published.blt_per_byte(config, context, float(patch_size)).values())


@pytest.mark.parametrize(
    ("dim", "num_layers", "tokenizer", "expected"),
    [
        (1280, 24, LLAMA_2, 3.14e8),  # Llama 2, 470M; Table 2 has 3.1e8
        (3072, 32, LLAMA_2, 2.13e9),  # Llama 2, 3.6B; 2.1e9
        (1280, 23, LLAMA_3, 3.05e8),  # Llama 3, 450M; 3.1e8
        (3072, 35, LLAMA_3, 2.07e9),  # Llama 3, 3.9B; 2.1e9
    ],
)
def test_the_baselines_of_table_2(dim, num_layers, tokenizer, expected):
    parts = llama_per_byte(dim, num_layers, tokenizer, 8192)
    assert sum(parts.values()) == pytest.approx(expected, rel=0.005)


def test_the_terms_of_a_transformer_add_up_to_the_papers_short_form():
    layers, dim, context, vocab = 24, 1280, 2214.0, 32_000
    short = 24 * layers * dim**2 + 2 * layers * dim * (context + 1) + 2 * dim * vocab
    assert published.transformer(layers, dim, context, vocab) == short


# The paper gives neither depths nor widths of these: guesses that hit its parameter counts.
LARGE = {
    "global_model.dim": 3072,
    "global_model.num_heads": 24,
    "global_model.ffn_dim": 8192,
    "global_model.num_layers": 46,
    "cross_attention.slots": 3,
}


@pytest.mark.parametrize(
    ("name", "changes", "patch_size", "expected", "table_2"),
    [
        ("blt-400m", {}, 6, 3.16e8, 3.1e8),
        ("blt-1b", LARGE, 6, 2.126e9, 2.1e9),
        (
            "blt-1b",
            {
                **LARGE,
                "global_model.num_layers": 58,
                "local.encoder_layers": 3,
                "cross_attention.encoder": "all",
            },
            8,
            2.07e9,
            2.1e9,
        ),
    ],
)
def test_the_blts_of_table_2(name, changes, patch_size, expected, table_2):
    config = blt(name, **changes)
    ours = per_byte_of(with_the_papers_feed_forward(config), patch_size)
    assert ours == pytest.approx(expected, rel=0.005)
    assert per_byte_of(config, patch_size) == pytest.approx(table_2, rel=0.04)


def test_the_parts_of_the_small_blt():
    parts = published.blt_per_byte(with_the_papers_feed_forward(blt("blt-400m")), 8192, 6.0)
    assert parts["global"] == pytest.approx(1.713e8, rel=0.001)
    assert parts["encoder"] == pytest.approx(1.494e7, rel=0.001)
    assert parts["decoder"] + parts["output"] == pytest.approx(1.050e8, rel=0.001)
    assert parts["encoder cross-attention"] == pytest.approx(3.1e6, rel=0.02)
    assert parts["decoder cross-attention"] == pytest.approx(2.21e7, rel=0.003)


def test_the_models_of_table_1_have_equal_training_flops():
    config = with_the_papers_feed_forward(blt("blt-8b"))
    llama_3 = llama_per_byte(4096, 32, LLAMA_3, 16384)
    per_byte = [per_byte_of(config, 4.5, 16384), per_byte_of(config, 6.1, 16384)]
    per_byte.append(sum(llama_3.values()))
    assert per_byte == pytest.approx([3.447e9, 2.589e9, 3.389e9], rel=0.002)
    # 4.5 T bytes by entropy, 6 T by spaces, and 1 T tokens.
    training = [
        TRAINING_FACTOR * flops * num_bytes
        for flops, num_bytes in zip(per_byte, (4.5e12, 6e12, 4.4e12), strict=True)
    ]
    assert training == pytest.approx([4.65e22, 4.66e22, 4.47e22], rel=0.003)
    assert max(training) < 1.045 * min(training)


@pytest.mark.parametrize("name", TABLE_10)
def test_the_models_of_table_10(name):
    config = blt(name)
    for patch_size, expected in TABLE_10[name].items():
        narrow = with_the_papers_feed_forward(config)
        assert per_byte_of(narrow, patch_size) == pytest.approx(expected, rel=0.002)
        assert per_byte_of(config, patch_size) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("name", TABLE_10)
def test_exact_counts_are_close_to_the_published_formula(name):
    config = blt(name)
    for patch_size in (4, 6, 8):
        exact = sum(f.total for f in forward_flops(config, 8192, 8192 // patch_size).values())
        assert exact / 8192 == pytest.approx(per_byte_of(config, patch_size), rel=0.04)


def test_a_byte_transformer_is_one_with_a_token_per_byte_and_sees_its_window():
    config = load_recipe("entropy-100m").model
    assert isinstance(config, TransformerConfig)
    parts = published.transformer_per_byte(config, 8192)
    assert sum(parts.values()) == pytest.approx(2.1e8, rel=0.02)
    assert parts == published.transformer_per_byte(config, 512)
