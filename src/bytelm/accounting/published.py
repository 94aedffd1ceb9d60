"""FLOPs by the formulas of the paper (section 4.5 and appendix B, Table 11).

These are estimates for comparing models; the exact counts are close but not equal. A window counts
as half used; the projections between bytes and patches and the scorer are omitted; bytes have 256
ids. For the paper's models at a context of 8,192 bytes :mod:`bytelm.accounting.exact` gives 0.6 to
2.5% more.

All values are for the forward pass, per token, byte or patch unless stated otherwise; training
costs :data:`~bytelm.accounting.exact.TRAINING_FACTOR` times as much.

Symbols of the paper: ``l`` layers, ``h = h_k n_heads`` width, ``m`` context, ``V`` vocabulary,
``n_p`` patch size, ``k`` slots.
"""

from functools import singledispatch

from bytelm.config import BLTConfig, ModelConfig, StackConfig, TransformerConfig

D_FF = 4.0
"""Ratio of the feed-forward's width to the model's, for two matrices. SwiGLU has three matrices of
two thirds that width, at the same cost."""
NUM_BYTES = 256
"""Size of the paper's vocabulary of bytes, which has no special ids."""


def attention(num_layers: int, dim: int, context: float) -> float:
    """Return ``Attention(l, h_k, n_heads, m) = 4 l h_k n_heads (m + 1) / 2``."""
    return 4 * num_layers * dim * (context + 1) / 2


def qkvo(num_layers: int, dim: int, ratio: float = 1.0) -> float:
    """Return ``QKVO(l, h, r) = (2 r + 2) 2 l h^2``, with ``r`` keys for each query.

    (The paper's text defines ``r`` as queries to keys, but its BLT formula needs the inverse.)
    """
    return (2 * ratio + 2) * 2 * num_layers * dim**2


def feed_forward(num_layers: int, dim: int, d_ff: float = D_FF) -> float:
    """Return ``FeedForward(l, h, d_ff) = 2 l 2 h (d_ff h)``."""
    return 2 * num_layers * 2 * dim * d_ff * dim


def de_embedding(dim: int, vocab_size: int) -> int:
    """Return ``DeEmbedding(h, V) = 2 h V``; the embedding is a look-up, which costs nothing."""
    return 2 * dim * vocab_size


def cross_attention(num_layers: int, dim: int, keys: float, ratio: float) -> float:
    """Return ``CrossAttn(l, h_k, n_heads, p, r) = Attention(l, h_k, n_heads, p) + QKVO(l, h, r)``.

    Args:
        num_layers: layers with cross-attention.
        dim: width of the model.
        keys: keys visible to a query (``p``).
        ratio: keys for each query (``r``).
    """
    return attention(num_layers, dim, keys) + qkvo(num_layers, dim, ratio)


def transformer(
    num_layers: int, dim: int, context: float, vocab_size: int, d_ff: float = D_FF
) -> float:
    """Return ``Transformer = FeedForward + QKVO(r = 1) + Attention + DeEmbedding``, per token.

    With ``d_ff = 4`` this is ``24 l h^2 + 2 l h (m + 1) + 2 h V``.
    """
    blocks = feed_forward(num_layers, dim, d_ff) + qkvo(num_layers, dim)
    return blocks + attention(num_layers, dim, context) + de_embedding(dim, vocab_size)


@singledispatch
def per_byte(config: ModelConfig, context: int, unit_bytes: float) -> dict[str, float]:
    """Return the forward FLOPs per byte of a model, by part; empty for kinds without a formula.

    Args:
        config: configuration of the model, whose window is in units that it reads.
        context: context in bytes.
        unit_bytes: mean bytes per patch or token; 1 for a byte model.
    """
    return {}


@per_byte.register
def transformer_per_byte(
    config: TransformerConfig, context: int, unit_bytes: float = 1.0
) -> dict[str, float]:
    """Return the forward FLOPs per byte of a transformer over tokens or bytes, by part.

    The cost of a token is divided by the mean bytes per token.
    """
    per_unit = 1 / unit_bytes
    return {
        "transformer": per_unit * _stack(config, context * per_unit, config.window),
        "output": per_unit * de_embedding(config.dim, config.vocab_size),
    }


@per_byte.register
def blt_per_byte(config: BLTConfig, context: int, unit_bytes: float) -> dict[str, float]:
    """Return the forward FLOPs per byte of a BLT, by part.

    ::

        BLT =  Transformer(h_G, l_G, m = n_ctx / n_p, V = 0) / n_p
             + Transformer(h_E, l_E, m = w_E, V = 0)
             + Transformer(h_D, l_D, m = w_D, V = 256)
             + CrossAttn(h_E, l_E, p = n_p, r = n_p / k) k / n_p
             + CrossAttn(h_D, l_D, p = k, r = k / n_p)

    Args:
        config: configuration of the model; cross-attention counts for the layers that have it.
        context: context in bytes (``n_ctx``).
        unit_bytes: mean bytes per patch (``n_p``).
    """
    local, dim = config.local, config.local.dim
    slots_per_byte = config.cross_attention.slots / unit_bytes
    encoder_cross = cross_attention(
        config.encoder_cross_layers, dim, unit_bytes, 1 / slots_per_byte
    )
    return {
        "encoder": _stack(local.stack(local.encoder_layers), float(context), local.window),
        "encoder cross-attention": encoder_cross * slots_per_byte,
        "global": _stack(config.global_model, context / unit_bytes, None) / unit_bytes,
        "decoder": _stack(local.stack(local.decoder_layers), float(context), local.window),
        "decoder cross-attention": cross_attention(
            config.decoder_cross_layers, dim, float(config.cross_attention.slots), slots_per_byte
        ),
        "output": float(de_embedding(dim, NUM_BYTES)),
    }


def _stack(config: StackConfig, context: float, window: int | None) -> float:
    """Return the cost of a stack of blocks, with the configured widths instead of the paper's."""
    layers, dim = config.num_layers, config.dim
    visible = min(context, float(window or context))
    blocks = feed_forward(layers, dim, 1.5 * config.ffn_dim / dim)
    blocks += qkvo(layers, dim, config.kv_heads / config.num_heads)
    return blocks + attention(layers, config.num_heads * config.head_width, visible)
