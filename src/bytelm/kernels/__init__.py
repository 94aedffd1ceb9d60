"""What the model spends its time on: attention, normalised projections, segment operations.

The functions of masks and segments have twins, ``reference_*``, that are easy to read and that the
tests compare them with, gradients included. The twins of the projections are the model's modules.
"""

from bytelm.kernels.masks import Mask
from bytelm.kernels.projections import (
    feed_forward,
    is_eager_cpu,
    norm_linear,
    rotary_projection,
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
    AttentionPlan,
    attention,
    plan_attention,
    reference_attention,
)

__all__ = [
    "AttentionPlan",
    "Mask",
    "attention",
    "decoder_cross_attention",
    "encoder_cross_attention",
    "feed_forward",
    "is_eager_cpu",
    "norm_linear",
    "plan_attention",
    "reference_attention",
    "reference_decoder_cross_attention",
    "reference_encoder_cross_attention",
    "reference_segment_max",
    "rotary_projection",
    "segment_max",
]
