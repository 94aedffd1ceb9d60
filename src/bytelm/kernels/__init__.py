"""What the model spends its time on: attention, normalised projections, segment operations.

Each function has a twin, ``reference_*``, that is easy to read and that the tests compare it with,
gradients included.
"""

from bytelm.kernels.projections import (
    NORM_EPS,
    feed_forward,
    norm_linear,
    reference_feed_forward,
    reference_norm_linear,
    reference_rotary_projection,
    rotary_projection,
    rotate,
)
from bytelm.kernels.segments import (
    decoder_cross_attention,
    encoder_cross_attention,
    reference_decoder_cross_attention,
    reference_encoder_cross_attention,
    reference_segment_max,
    segment_max,
)
from bytelm.kernels.self_attention import (
    AttentionMask,
    attention,
    attention_mask,
    reference_attention,
)

__all__ = [
    "NORM_EPS",
    "AttentionMask",
    "attention",
    "attention_mask",
    "decoder_cross_attention",
    "encoder_cross_attention",
    "feed_forward",
    "norm_linear",
    "reference_attention",
    "reference_decoder_cross_attention",
    "reference_encoder_cross_attention",
    "reference_feed_forward",
    "reference_norm_linear",
    "reference_rotary_projection",
    "reference_segment_max",
    "rotary_projection",
    "rotate",
    "segment_max",
]
