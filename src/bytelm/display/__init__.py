"""Terminal output of the command line: progress, tables and patches."""

from bytelm.display.inputs import show_inputs
from bytelm.display.plan import show_plan
from bytelm.display.progress import ConsoleProgress, TrainingBar
from bytelm.display.sections import show_section
from bytelm.display.tables import (
    cost_shares,
    costs_title,
    patches_record,
    show_costs,
    show_data,
    show_likelihood,
    show_patches,
    show_quickstart,
    show_statistics,
    show_study_costs,
    si,
)
from bytelm.display.waiting import COMPILING, explaining

__all__ = [
    "COMPILING",
    "ConsoleProgress",
    "TrainingBar",
    "cost_shares",
    "costs_title",
    "explaining",
    "patches_record",
    "show_costs",
    "show_data",
    "show_statistics",
    "show_inputs",
    "show_likelihood",
    "show_patches",
    "show_plan",
    "show_quickstart",
    "show_section",
    "show_study_costs",
    "si",
]
