"""Part `training`: steps of the recipe's BLT; `plain` takes those of a transformer the same way.

Rows, patches and documents are random; precision (bf16 autocast), optimiser and compilation are
those of `bytelm train`. FLOPs are by `bytelm.accounting`, with the patches that are there, not the
room for them; the share of the peak is against the matrix product measured in the same process.
"""

import gc
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from benchmarks.parts.hardware import datasheet_rate, matmul_rate
from benchmarks.parts.models import (
    PATCH_SIZE,
    Batch,
    batches,
    blt_config,
    build,
    num_parameters,
    row_bytes,
)
from benchmarks.parts.notes import Notes, Target
from benchmarks.record import scrubbed
from benchmarks.summary import clocks, median, minimum
from benchmarks.timing import Sample, time_once
from bytelm.accounting import training_flops
from bytelm.config import BLTConfig, OptimizerConfig, TransformerConfig
from bytelm.training.optim import build_optimizer

ROWS = (4, 2, 1)
"""Rows in a step, tried in turn until one fits into memory."""
FEWER_BUCKETS = 50_002
REASON = 400
"""Characters of a compiler's reason that are kept."""
EAGER_STEPS, COMPILED_STEPS, TINY_STEPS = 3, 12, 2

Config = BLTConfig | TransformerConfig


class Job:
    """A model, its optimiser and what to feed them."""

    def __init__(self, config: Config, rows: int, target: Target) -> None:
        self.config, self.rows, self.target = config, rows, target
        self.peak = matmul_rate(target)
        self.model = build(config, target.device)
        self.optimizer = build_optimizer(self.model, OptimizerConfig())
        self._batches: Iterator[Batch] = batches(target, rows)

    def step(self) -> dict[str, Sample]:
        """One step; forward with backward, and the update, timed apart."""
        batch = next(self._batches)

        def forward_backward() -> None:
            with torch.autocast(self.target.device, torch.bfloat16):
                loss = batch.loss(self._logits(batch))
            loss.backward()

        def update() -> None:
            clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

        device = self.target.device
        return {
            "forward_backward": time_once(forward_backward, device),
            "update": time_once(update, device),
        }

    def flops(self) -> float:
        """Of forward and backward in one step."""
        num_bytes = row_bytes(self.target)
        return self.rows * training_flops(self.config, num_bytes, round(num_bytes / PATCH_SIZE))

    def _logits(self, batch: Batch) -> Tensor:
        if isinstance(self.config, BLTConfig):
            return self.model(batch.ids, batch.patches())
        return self.model(batch.ids, batch.documents)


def run(target: Target, notes: Notes) -> None:
    """The BLT."""
    configs: list[Config] = [blt_config(target)]
    if not target.tiny:
        configs.append(blt_config(target, FEWER_BUCKETS))
    train(target, notes, configs)


def train(target: Target, notes: Notes, configs: list[Config]) -> None:
    """Steps of the first of some models that fits, without and with compilation."""
    job = fitting_job(target, notes, configs)
    notes.put("peak FLOP/s", job.peak)
    notes.put("parameters", num_parameters(job.model))
    notes.put("rows of a step", job.rows)
    notes.put("bytes of a row", row_bytes(target))
    notes.put("FLOPs of a step", job.flops())
    with notes.attempt("eager"):
        count = TINY_STEPS if target.tiny else EAGER_STEPS
        notes.put("eager", figures(job, lambda: [job.step() for _ in range(count)]))
    with notes.attempt("compiled"):
        _compiled(target, notes, job)


def _compiled(target: Target, notes: Notes, job: Job) -> None:
    torch._dynamo.utils.counters.clear()
    # As bytelm.training does it.
    job.model.compile(dynamic=False, backend="eager" if target.tiny else "inductor")
    notes.put("first compiled step", job.step())
    notes.put("counters after the first step", counters())
    count = TINY_STEPS if target.tiny else COMPILED_STEPS
    notes.put("compiled", figures(job, lambda: [job.step() for _ in range(count)]))
    # Equal to those after the first step, unless something was compiled again.
    notes.put("counters after all steps", counters())


def fitting_job(target: Target, notes: Notes, configs: list[Config]) -> Job:
    """The first model and number of rows of which a step fits into memory."""
    for config in configs:
        for rows in ROWS:
            _free()
            try:
                job = Job(config, rows, target)
                notes.put("first eager step", job.step())
            except torch.OutOfMemoryError as error:
                shown = f"{rows} rows, {_num_buckets(config)} hash buckets"
                notes.put(f"too large: {shown}", scrubbed(str(error))[:300])
                del error
                job = None
            if job is not None:
                notes.put("hash buckets", _num_buckets(config))
                return job
    raise RuntimeError("nothing fits into memory")


def figures(job: Job, steps: Callable[[], list[dict[str, Sample]]]) -> dict[str, Any]:
    """Rates of some steps, and the memory they take."""
    on_cuda = job.target.device == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    samples = steps()
    phases = {name: [sample[name] for sample in samples] for name in samples[0]}
    clock = clocks(phases["update"])[0]
    seconds = median(phases["forward_backward"], clock)
    rate = job.flops() / seconds
    with_update = seconds + median(phases["update"], clock)
    num_bytes = job.rows * row_bytes(job.target)
    found = {
        "samples": phases,
        "clock": clock,
        "fastest forward and backward, seconds": minimum(phases["forward_backward"], clock),
        "bytes/s, forward and backward": num_bytes / seconds,
        "bytes/s, with an update for every step": num_bytes / with_update,
        "FLOP/s": rate,
        "of the matrix product": rate / job.peak,
    }
    if on_cuda:
        found["peak memory"] = torch.cuda.max_memory_allocated()
        datasheet = datasheet_rate()
        found["of the datasheet's rate"] = rate / datasheet if datasheet else None
    return found


def counters() -> dict[str, Any]:
    """What the compiler has done so far in this process."""
    counted = torch._dynamo.utils.counters
    reasons = Counter[str]()
    for why, count in counted["graph_break"].items():
        reasons[re.sub("0x[0-9a-f]+", "0x...", scrubbed(str(why)))[:REASON]] += count
    return {
        "graphs": counted["stats"]["unique_graphs"],
        "frames": dict(counted["frames"]),
        "graph breaks": dict(reasons),
        "recompilations": recompilations(),
    }


def recompilations() -> list[dict[str, str]]:
    """Functions that were compiled again, and why."""
    again = [one for one in torch._dynamo.utils.get_compilation_metrics() if one.cache_size]
    return [
        {"function": str(one.co_name), "why": scrubbed(str(one.recompile_reason))[:REASON]}
        for one in again
    ]


def _num_buckets(config: Config) -> int | None:
    return config.hash_embeddings.num_buckets if isinstance(config, BLTConfig) else None


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
