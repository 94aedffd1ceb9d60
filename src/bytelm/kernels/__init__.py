"""Performance-critical functions: attention, normalised projections, segment operations.

Attention and segment operations have readable reference implementations, ``reference_*``, with
which the tests compare their results and gradients. The references of the projections are the
modules of the model.
"""

from bytelm.kernels.cross_entropy import reference_target_nats, target_nats
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
    "reference_target_nats",
    "rotary_projection",
    "segment_max",
    "target_nats",
]
