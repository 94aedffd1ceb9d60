"""Train and measure the runs of a study in slices, several runs at once.

::

    STUDY/runs/NAME/                a training run, as `bytelm train` makes it
    STUDY/runs/NAME/slices.jsonl    a line for each slice
    STUDY/runs/NAME/result.json     written last, when the run is trained and measured

Each run has a process of its own. One that dies does not affect the others, and is resumed from its
last checkpoint the next time, with the same numbers as if it had not been interrupted. Runs are
resolved before the processes start.
"""

import json
import signal
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from bytelm.errors import BytelmError, TrainingError
from bytelm.progress import Progress
from bytelm.stopping import Stopped
from bytelm.storage import append_line, to_json, write_text
from bytelm.study.measuring import SLICES, describe, machine, measure
from bytelm.study.plan import Plan, Run
from bytelm.study.resolving import Resolved, Resolver
from bytelm.study.resources import Resources
from bytelm.study.results import RESULT, finished_result, run_folder, write_result
from bytelm.training import train
from bytelm.training.run import METRICS
from bytelm.training.setup import choose_device
from bytelm.workers import accept_sigterm, ignore_sigint, shielded

ERROR = ".error.txt"
FAILED = 3
"""Exit status of a worker that has written the reason to :data:`ERROR`."""
POLL_SECONDS = 1.0


def run_all(
    plan: Plan,
    runs: list[Run],
    out: Path,
    *,
    workers: int,
    progress: Progress,
    deadline: float | None = None,
) -> list[str]:
    """Train and measure every run that is not finished, several at once.

    A signal, or the deadline, ends each of them after the step in progress, with a checkpoint.

    Args:
        plan: the plan of the study.
        runs: the runs.
        out: folder of the study, with its text prepared.
        workers: number of processes; they share the threads of this one and, with CUDA, are spread
            over the devices.
        progress: receives the progress.
        deadline: time, as ``time.time()`` gives it, after which no step begins.

    Returns:
        A line for each run that failed.

    Raises:
        ConfigError: a budget cannot be met, or a result is not one of the plan's; nothing is
            trained then.
    """
    pool = _Pool(plan, runs, out, workers, deadline, progress)
    with progress.counting("study", 100) as report:
        try:
            while pool.start():
                time.sleep(POLL_SECONDS)
                for news in pool.collect():
                    progress.note(news)
                report(int(100 * pool.share_done()), ", ".join(pool.active))
        except KeyboardInterrupt:
            pool.stop()
            raise
    return pool.problems


class _Pool:
    """Worker processes, each of which has one run."""

    def __init__(
        self,
        plan: Plan,
        runs: list[Run],
        out: Path,
        workers: int,
        deadline: float | None,
        progress: Progress,
    ) -> None:
        self.plan, self.out, self.workers, self.deadline = plan, out, workers, deadline
        resolver = Resolver(plan, out)
        pending = [run for run in runs if finished_result(plan, run, out) is None]
        self.pending = resolver.resolve_all(pending, progress)
        self.total_flops = sum(one.flops for one in self.pending)
        self.done_flops = 0.0
        self.active: dict[str, tuple[int, Resolved, Any]] = {}
        self.problems: list[str] = []

    def start(self) -> bool:
        """Start runs on idle workers; return whether any run is in progress."""
        is_late = self.deadline is not None and time.time() > self.deadline
        while self.pending and len(self.active) < self.workers and not is_late:
            resolved = self.pending.pop(0)
            name = resolved.run.name
            taken = {slot for slot, _, _ in self.active.values()}
            slot = min(set(range(self.workers)) - taken)
            arguments = (self.plan, resolved, self.out, self.deadline, slot, self.workers)
            process = get_context("spawn").Process(target=_work, args=arguments, name=name)
            with shielded():
                process.start()
            self.active[name] = (slot, resolved, process)
        return bool(self.active)

    def collect(self) -> list[str]:
        """Return a line for each process that has ended since the last call."""
        news = []
        for name, (_, resolved, process) in list(self.active.items()):
            if process.is_alive():
                continue
            del self.active[name]
            if process.exitcode:
                why = _problem(self.out, resolved.run, process.exitcode)
                self.problems.append(f"{name}: {why}")
                news.append(self.problems[-1])
            elif result := finished_result(self.plan, resolved.run, self.out):
                self.done_flops += resolved.flops
                news.append(_news(result))
        return news

    def share_done(self) -> float:
        """Return the share of the FLOPs of all pending runs that is spent."""
        active = [resolved for _, resolved, _ in self.active.values()]
        spent = sum(one.flops * share_done(self.out, one.run, one.steps) for one in active)
        return (self.done_flops + spent) / max(self.total_flops, 1.0)

    def stop(self) -> None:
        """Ask every process to end with a checkpoint, and wait for it; kill those left if asked."""
        processes = [process for _, _, process in self.active.values()]
        try:
            for process in processes:
                process.terminate()
            for process in processes:
                process.join()
        except KeyboardInterrupt:
            for process in processes:
                process.kill()
            raise


def _work(
    plan: Plan, resolved: Resolved, out: Path, deadline: float | None, slot: int, workers: int
) -> None:
    """Work on a slice of one run; this is the target of a worker process."""
    ignore_sigint()
    accept_sigterm()
    if torch.cuda.is_available():
        torch.cuda.set_device(slot % torch.cuda.device_count())
    else:
        # OMP_NUM_THREADS may limit the threads that there are to share.
        torch.set_num_threads(max(torch.get_num_threads() // workers, 1))
    folder = run_folder(out, resolved.run)
    (folder / ERROR).unlink(missing_ok=True)
    try:
        left = None if deadline is None else max(deadline - time.time(), 0.0)
        run_slice(plan, resolved, out, left)
    except Stopped:
        # Before the run was set up; the next time begins here.
        return
    except Exception as error:
        folder.mkdir(parents=True, exist_ok=True)
        what = str(error) if isinstance(error, BytelmError) else repr(error)
        write_text(folder / ERROR, what)
        if isinstance(error, BytelmError):
            sys.exit(FAILED)
        raise


def run_slice(plan: Plan, resolved: Resolved, out: Path, time_limit: float | None = None) -> bool:
    """Work on a run until it is finished or time is up; return whether it is finished.

    A run that diverges is finished too, with the failure as its result.

    Raises:
        ConfigError: the study changed since the run began.
        DataError, CheckpointError: as :func:`bytelm.training.train`.
    """
    run, recipe = resolved.run, resolved.recipe
    folder = run_folder(out, run)
    device = choose_device(recipe.train)
    try:
        with Resources(device) as resources:
            trained = train(recipe, folder, time_limit=time_limit)
    except TrainingError as error:
        write_result(out, run, {**describe(plan, resolved, out), "failure": str(error)})
        return True
    record = {"steps": trained.step, **resources.record(), "machine": machine(device)}
    append_line(folder / SLICES, to_json(record))
    if trained.finished:
        write_result(out, run, measure(plan, resolved, out, folder, trained))
    return trained.finished


def share_done(out: Path, run: Run, steps: int) -> float:
    """Return the share of a run's steps that it last reported; 1 if the run is measured too."""
    if (run_folder(out, run) / RESULT).exists():
        return 1.0
    path = run_folder(out, run) / METRICS
    if not path.exists():
        return 0.0
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 4096, 0))
        lines = file.read().decode("utf-8", "replace").splitlines()
    for line in reversed(lines):
        try:
            return min(float(json.loads(line)["step"]) / steps, 0.99)
        except (ValueError, KeyError, TypeError):
            # The first line is cut off, the last may be incomplete, others may have no step.
            continue
    return 0.0


def _problem(out: Path, run: Run, exit_code: int) -> str:
    path = run_folder(out, run) / ERROR
    if exit_code > 0 and path.exists():
        return path.read_text("utf-8")
    how = f"killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"status {exit_code}"
    return f"its process ended early ({how}): run the same command again to resume it"


def _news(result: dict[str, Any]) -> str:
    name = result["run"]["name"]
    if result["failure"]:
        return f"{name}: {result['failure']}"
    return f"{name}: {result['bpb']:.4f} bpb, {result['train_bytes'] / 1e6:.1f} MB read"
