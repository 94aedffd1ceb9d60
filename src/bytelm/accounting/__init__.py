"""FLOPs, parameters and memory from a model's configuration, without running it.

:mod:`bytelm.accounting.exact` counts what our models compute,
:mod:`bytelm.accounting.published` is the paper's own formulas, and
:mod:`bytelm.accounting.breakdown` puts all counts of a model side by side.
"""

from bytelm.accounting import published
from bytelm.accounting.breakdown import (
    SCORER,
    Breakdown,
    PartCost,
    break_down,
    break_down_recipe,
    total,
)
from bytelm.accounting.exact import (
    TRAINING_BYTES,
    TRAINING_FACTOR,
    DecodeCost,
    Flops,
    cache_sizes,
    decode_costs,
    forward_flops,
    parameter_counts,
    parameters_by_part,
    training_flops,
)
from bytelm.accounting.parts import Matrix, Part, SelfAttention, register_parts

__all__ = [
    "SCORER",
    "TRAINING_BYTES",
    "TRAINING_FACTOR",
    "Breakdown",
    "DecodeCost",
    "Flops",
    "Matrix",
    "Part",
    "PartCost",
    "SelfAttention",
    "break_down",
    "break_down_recipe",
    "cache_sizes",
    "decode_costs",
    "forward_flops",
    "parameter_counts",
    "parameters_by_part",
    "published",
    "register_parts",
    "total",
    "training_flops",
]
