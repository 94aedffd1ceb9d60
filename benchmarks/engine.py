"""Suite `engine`: requests that share an engine, against sessions one after another.

Every subject reads its prompts, and then makes so many bytes of each of them: the times of the two
are taken apart. The end of the document is never sampled, so nothing ends before it is measured.
The first byte of a short prompt is timed while all other slots are busy, in units of the time
between two bytes of the others.
"""

import gc
import math
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.generation import QUANTILES
from benchmarks.settings import Settings
from benchmarks.subjects import (
    PATCH_SIZE,
    autocast,
    build_pair,
    random_words,
    shape_of,
)
from benchmarks.timing import Sample, time_once
from bytelm import codec
from bytelm.inference import Engine, Request, Sampling, Session, continue_from
from bytelm.lm import PatchedLM
from bytelm.patching import EntropyRule, Patcher

AT_ONCE, QUICK_AT_ONCE = (1, 4, 16, 32), (1, 3)
ONE_BY_ONE, QUICK_ONE_BY_ONE = 4, 2
"""Prompts of the sessions, which take turns."""
PROMPT_BYTES, QUICK_PROMPT_BYTES = 128, 16
NEW_BYTES, QUICK_NEW_BYTES = 64, 8
SHORT_BYTES = 16
"""The prompt whose first byte is timed."""
LONG_BYTES, QUICK_LONG_BYTES = 2048, 64
"""A prompt that is being read when the short one comes."""
Phases = dict[str, Sample]


class Load:
    """Prompts, how many bytes to make of each, and the model.

    Args:
        settings: options of all suites.
    """

    def __init__(self, settings: Settings) -> None:
        quick = settings.quick
        pair = build_pair(shape_of(quick), settings.device)
        self.settings, self.model = settings, pair.ours.eval()
        self.at_once = QUICK_AT_ONCE if quick else AT_ONCE
        self.one_by_one = QUICK_ONE_BY_ONE if quick else ONE_BY_ONE
        self.prompt_bytes = QUICK_PROMPT_BYTES if quick else PROMPT_BYTES
        self.new_bytes = QUICK_NEW_BYTES if quick else NEW_BYTES
        self.long_bytes = QUICK_LONG_BYTES if quick else LONG_BYTES
        # Logits are around 0, so the end is not among the most probable ids.
        pair.ours.blt.decoder.output.weight.data[codec.EOS] = 0.0

    def request(self, number: int, prompt_bytes: int | None = None) -> Request:
        """One of any number of requests, which goes on for longer than is measured."""
        prompt = random_words(prompt_bytes or self.prompt_bytes, seed=number)
        return Request(prompt, self.long_bytes, sampling(number))

    def engine(self, num_slots: int) -> Engine:
        """An engine with memory for the longest document in every slot."""
        longest = 2 * self.long_bytes
        return Engine(
            self.model,
            num_slots,
            max_document_bytes=longest,
            num_positions=(num_slots + 1) * (longest + 64),
        )

    def time(self, run: Callable[[], object]) -> Sample:
        """Time a function, in the precision of the settings."""
        with autocast(self.settings.device, self.settings.precision):
            return time_once(run, self.settings.device)


def sampling(seed: int) -> Sampling:
    """A sampling that keeps away from the end of the document."""
    return Sampling(temperature=1.0, top_k=40, seed=seed)


@torch.no_grad()
def run(settings: Settings, report: Callable[[str], None]) -> dict[str, Any]:
    """Time sessions and engines in turn, and then first bytes."""
    load = Load(settings)
    report("engine: the patch size")
    patch_size = _calibrate(load)
    subjects: dict[str, Callable[[], tuple[Phases, list[bytes]]]] = {
        "sessions": lambda: _sessions(load)
    }
    for count in load.at_once:
        subjects[str(count)] = lambda count=count: _together(load, count)
    samples: dict[str, dict[str, list[Sample]]] = {
        name: {"prompts": [], "steps": []} for name in subjects
    }
    texts: dict[str, list[bytes]] = {}
    for repeat in range(settings.repeats):
        report(f"engine: {repeat + 1} of {settings.repeats}")
        for name, subject in subjects.items():
            gc.collect()
            phases, texts[name] = subject()
            for phase, sample in phases.items():
                samples[name][phase].append(sample)
    measurements = []
    for name, of_subject in samples.items():
        count = load.one_by_one if name == "sessions" else int(name)
        both = list(zip(texts["sessions"], texts[name], strict=False))
        same = sum(one[: load.new_bytes] == other[: load.new_bytes] for one, other in both)
        if settings.precision == "float32":
            assert 2 * same > len(both), f"{same} of {len(both)} texts of {name} are the same"
        measurement = {"subject": name, "requests": count, "same": [same, len(both)]}
        # While prompts are read, requests whose prompts have been read go on.
        measurement["bytes"] = sum(map(len, texts[name]))
        measurements.append({**measurement, "samples": of_subject})
    report("engine: first bytes")
    return {
        "prompt_bytes": load.prompt_bytes,
        "new_bytes": load.new_bytes,
        "patch_size": patch_size,
        "measurements": measurements,
        "first_bytes": [
            _first_bytes(load, load.at_once[-1], long) for long in (0, load.long_bytes)
        ],
    }


def _calibrate(load: Load) -> float:
    """Set the threshold; mean bytes per patch of what is generated under it."""
    model = load.model
    assert model.scorer is not None
    prompts = [load.request(n) for n in range(load.one_by_one)]
    ids = [_ids(request.prompt, model) for request in prompts]
    values = torch.cat([model.scorer.entropies(one[None])[0] for one in ids]).double()
    tried = {}
    for quantile in QUANTILES[:1] if load.settings.quick else QUANTILES:
        threshold = float(values.quantile(quantile))
        model.patcher = Patcher(EntropyRule(threshold=threshold))
        texts = _together(load, len(prompts))[1]
        patches = 0
        for request, text in zip(prompts, texts, strict=True):
            whole = _ids(request.prompt + text, model)
            before = _ids(request.prompt, model)
            patches += int(model.segment(whole[None]).patches.num_patches)
            patches -= int(model.segment(before[None]).patches.num_patches)
        tried[threshold] = sum(map(len, texts)) / max(patches, 1)
    threshold = min(tried, key=lambda t: abs(math.log(tried[t] / PATCH_SIZE)))
    model.patcher = Patcher(EntropyRule(threshold=threshold))
    return tried[threshold]


def _ids(text: bytes, model: PatchedLM) -> torch.Tensor:
    return torch.from_numpy(codec.encode(text)).to(model.device)


def _sessions(load: Load) -> tuple[Phases, list[bytes]]:
    """Continue the first prompts, one after another; the times of all together."""
    prompts: Sample = {}
    steps: Sample = {}
    texts = []
    for number in range(load.one_by_one):
        request = load.request(number)
        ids = _ids(request.prompt, load.model)
        parts = continue_from(
            Session(load.model), ids, max_bytes=request.max_bytes, sampling=request.sampling
        )
        text: list[bytes] = []

        def make(count: int, parts: Any = parts, text: list[bytes] = text) -> None:
            for _ in range(count):
                text.append(next(parts).data)

        _add(prompts, load.time(lambda make=make: make(1)))
        _add(steps, load.time(lambda make=make: make(load.new_bytes)))
        texts.append(b"".join(text))
    return {"prompts": prompts, "steps": steps}, texts


def _together(load: Load, count: int) -> tuple[Phases, list[bytes]]:
    """Read ``count`` prompts in an engine, and then step until each has its bytes."""
    engine = load.engine(count)
    texts = {engine.submit(load.request(n)): b"" for n in range(count)}

    def step() -> None:
        for event in engine.step():
            assert event.part is not None, event.error
            texts[event.ticket] += event.part.data

    prompts = load.time(lambda: _read_all(engine, count, step))

    def steps() -> None:
        for _ in range(load.new_bytes):
            step()

    phases = {"prompts": prompts, "steps": load.time(steps)}
    assert engine.stats().num_decoding == count
    return phases, list(texts.values())


def _read_all(engine: Engine, count: int, step: Callable[[], object]) -> None:
    while engine.stats().num_decoding < count:
        step()


def _first_bytes(load: Load, count: int, long_bytes: int) -> dict[str, Any]:
    """Time the first byte of a short prompt while all but one slot, or two, are busy."""
    num_steps: list[int] = []
    samples: dict[str, list[Sample]] = {"step": [], "first": []}
    engine = load.engine(count + 1 + bool(long_bytes))
    for number in range(count):
        engine.submit(load.request(number))
    load.time(lambda: _read_all(engine, count, engine.step))
    # Later prompts are new to the engine.
    for number in range(count, count + load.settings.repeats):
        gc.collect()
        samples["step"].append(load.time(engine.step))
        long = engine.submit(load.request(1000 + number, long_bytes)) if long_bytes else None
        short = engine.submit(load.request(number, SHORT_BYTES))
        taken = 0

        def until_first(short: int = short) -> None:
            nonlocal taken
            has_come = False
            while not has_come:
                taken += 1
                has_come = any(event.ticket == short for event in engine.step())

        samples["first"].append(load.time(until_first))
        num_steps.append(taken)
        for ticket in (short, long):
            if ticket is not None:
                engine.cancel(ticket)
    return {
        "busy": count,
        "prompt_bytes": SHORT_BYTES,
        "long_bytes": long_bytes,
        "num_steps": num_steps,
        "samples": samples,
    }


def _add(sums: Sample, sample: Sample) -> None:
    for clock, value in sample.items():
        sums[clock] = sums.get(clock, 0.0) + value
