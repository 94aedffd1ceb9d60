"""FLOPs, parameters and memory of a model, computed from its configuration.

:mod:`bytelm.accounting.exact` counts the operations of bytelm's models,
:mod:`bytelm.accounting.published` has the formulas of the paper,
:mod:`bytelm.accounting.breakdown` combines all counts of a model, and :mod:`bytelm.accounting.plan`
says what a run on several GPUs needs.
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
from bytelm.accounting.plan import GPUS, Gpu, RunPlan, plan_run

__all__ = [
    "GPUS",
    "SCORER",
    "TRAINING_BYTES",
    "TRAINING_FACTOR",
    "Breakdown",
    "DecodeCost",
    "Flops",
    "Gpu",
    "Matrix",
    "Part",
    "PartCost",
    "RunPlan",
    "SelfAttention",
    "break_down",
    "break_down_recipe",
    "cache_sizes",
    "decode_costs",
    "forward_flops",
    "packed_flops",
    "parameter_counts",
    "parameters_by_part",
    "plan_run",
    "published",
    "register_parts",
    "run_lengths",
    "total",
    "training_flops",
]
