"""Studies: families of models compared at equal FLOPs, planned, run in slices, fitted and drawn."""

from bytelm.study.page import write_page
from bytelm.study.plan import Plan, Run, load_plan, plan_names, plan_runs
from bytelm.study.runs import finished_result, run_all, share_done
from bytelm.study.settling import Cost, run_cost, settle_run
from bytelm.study.table import table_folder, write_table
from bytelm.study.text import prepare_text

__all__ = [
    "Cost",
    "Plan",
    "Run",
    "finished_result",
    "load_plan",
    "plan_names",
    "plan_runs",
    "prepare_text",
    "run_all",
    "run_cost",
    "settle_run",
    "share_done",
    "table_folder",
    "write_page",
    "write_table",
]
