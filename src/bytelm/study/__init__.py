"""Studies, which compare families of models at equal FLOPs."""

from bytelm.study.costs import Cost, run_costs
from bytelm.study.loading import load_plan, parse_plan, plan_names
from bytelm.study.page import write_page
from bytelm.study.plan import Plan, Run, plan_runs
from bytelm.study.resolving import Resolved, Resolver
from bytelm.study.results import finished_result
from bytelm.study.runs import run_all, share_done
from bytelm.study.table import find_table, table_folder, write_table
from bytelm.study.text import check_text, prepare_text

__all__ = [
    "find_table",
    "Cost",
    "Plan",
    "Resolved",
    "Resolver",
    "Run",
    "check_text",
    "finished_result",
    "load_plan",
    "parse_plan",
    "plan_names",
    "plan_runs",
    "prepare_text",
    "run_all",
    "run_costs",
    "share_done",
    "table_folder",
    "write_page",
    "write_table",
]
