"""FLOPs, parameters and memory of a model, computed from its configuration.

:mod:`bytelm.accounting.exact` counts the operations of bytelm's models,
:mod:`bytelm.accounting.published` has the formulas of the paper, and
:mod:`bytelm.accounting.breakdown` combines all counts of a model.
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
    packed_flops,
    parameter_counts,
    parameters_by_part,
    run_lengths,
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
    "packed_flops",
    "parameter_counts",
    "parameters_by_part",
    "published",
    "register_parts",
    "run_lengths",
    "total",
    "training_flops",
]
