"""Studies: families of models compared at equal FLOPs, planned, run in slices, fitted and drawn."""

from bytelm.study.page import write_page
from bytelm.study.plan import Plan, Run, load_plan, plan_names, plan_runs
from bytelm.study.runs import is_finished, run_all, spent_flops
from bytelm.study.settling import Cost, run_cost, settle_run
from bytelm.study.table import write_table
from bytelm.study.text import prepare_text

__all__ = [
    "Cost",
    "Plan",
    "Run",
    "is_finished",
    "load_plan",
    "plan_names",
    "plan_runs",
    "prepare_text",
    "run_all",
    "run_cost",
    "settle_run",
    "spent_flops",
    "write_page",
    "write_table",
]
