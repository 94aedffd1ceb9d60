"""Suite `engine`: requests that share an engine, against sessions one after another.

Every subject reads its prompts, and then makes so many bytes of each of them: the times of the two
are taken apart. The end of the document is never sampled, so nothing ends before it is measured.
A lone request is also timed with weights of 8 bits and with drafts. The first byte of a short
prompt is timed while all other slots are busy, in units of the time between two bytes of the
others.
"""

import copy
import gc
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
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
from bytelm import codec, cpu
from bytelm.inference import Engine, Request, Sampling, Session, Stats, continue_from
from bytelm.lm import PatchedLM
from bytelm.patching import EntropyRule, Patcher

AT_ONCE, QUICK_AT_ONCE = (1, 4, 16, 32), (1, 3)
ONE_BY_ONE, QUICK_ONE_BY_ONE = 4, 2
"""Prompts of the sessions, which take turns."""
PROMPT_BYTES, QUICK_PROMPT_BYTES = 128, 16
NEW_BYTES, QUICK_NEW_BYTES = 64, 8
DRAFTED = 4
"""How many times the bytes are made with drafts, whose length is found out at first, and beside
them."""
SHORT_BYTES = 16
"""The prompt whose first byte is timed."""
LONG_BYTES, QUICK_LONG_BYTES = 2048, 64
"""A prompt that is being read when the short one comes."""
Phases = dict[str, Sample]
KINDS = ("", "int8", "drafts", "undrafted")
"""As users get an engine, with weights of 8 bits, with drafts of the decoder, and as many bytes as
with these without them: patches become shorter as a text of random weights goes on."""


@dataclass
class Timed:
    """What one subject did in its phases, prompts and steps."""

    phases: Phases
    texts: list[bytes]
    made: int
    """Bytes made in the steps."""
    stats: Stats | None = None


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
        self.int8: PatchedLM | None = None
        if settings.device == "cpu":
            self.int8 = cpu.unfuse(copy.deepcopy(self.model))
            cpu.quantize(self.int8.trained)
            cpu.fuse(self.int8)

    def request(self, number: int, prompt_bytes: int | None = None) -> Request:
        """One of any number of requests, which goes on for longer than is measured."""
        prompt = random_words(prompt_bytes or self.prompt_bytes, seed=number)
        return Request(prompt, self.long_bytes, sampling(number))

    def engine(self, num_slots: int, kind: str = "") -> Engine:
        """An engine with memory for the longest document in every slot; see :data:`KINDS`."""
        longest = 2 * self.long_bytes
        model = self.int8 if kind == "int8" else self.model
        assert model is not None
        return Engine(
            model,
            num_slots,
            max_document_bytes=longest,
            num_positions=(num_slots + 1) * (longest + 64),
            speculate=kind == "drafts",
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
    if load.int8 is not None:
        load.int8.patcher = load.model.patcher
    subjects = [("sessions", load.one_by_one, "")]
    subjects += [("engine", count, "") for count in load.at_once]
    subjects += [("engine", 1, kind) for kind in KINDS[1:] if kind != "int8" or load.int8]
    samples = [{"prompts": [], "steps": []} for _ in subjects]
    timed: list[Timed] = []
    for repeat in range(settings.repeats):
        report(f"engine: {repeat + 1} of {settings.repeats}")
        timed = []
        for number, (name, count, kind) in enumerate(subjects):
            gc.collect()
            of_subject = _sessions(load) if name == "sessions" else _together(load, count, kind)
            timed.append(of_subject)
            for phase, sample in of_subject.phases.items():
                samples[number][phase].append(sample)
    measurements = []
    for (name, count, kind), of_subject, sample in zip(subjects, timed, samples, strict=True):
        both = list(zip(timed[0].texts, of_subject.texts, strict=False))
        same = sum(one[: load.new_bytes] == other[: load.new_bytes] for one, other in both)
        if settings.precision == "float32" and kind != "int8":
            assert 2 * same > len(both), f"{same} of {len(both)} texts of {count} are the same"
        measurement = {"subject": name, "requests": count, "kind": kind, "same": [same, len(both)]}
        # While prompts are read, requests whose prompts have been read go on.
        measurement["bytes"] = sum(map(len, of_subject.texts))
        measurement["made"] = of_subject.made
        if of_subject.stats is not None and kind == "drafts":
            measurement["stats"] = asdict(of_subject.stats)
        measurements.append({**measurement, "samples": sample})
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
        texts = _together(load, len(prompts)).texts
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


def _sessions(load: Load) -> Timed:
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
    made = load.one_by_one * load.new_bytes
    return Timed({"prompts": prompts, "steps": steps}, texts, made)


def _together(load: Load, count: int, kind: str = "") -> Timed:
    """Read ``count`` prompts in an engine, and then step until each has its bytes."""
    engine = load.engine(count, kind)
    texts = {engine.submit(load.request(n)): b"" for n in range(count)}

    def step() -> None:
        for event in engine.step():
            assert event.part is not None, event.error
            texts[event.ticket] += event.part.data

    prompts = load.time(lambda: _read_all(engine, count, step))
    before = sum(map(len, texts.values()))
    # A step makes a byte of each request, or several that were drafted.
    enough = before + count * load.new_bytes * (DRAFTED if kind in ("drafts", "undrafted") else 1)

    def steps() -> None:
        while sum(map(len, texts.values())) < enough:
            step()

    phases = {"prompts": prompts, "steps": load.time(steps)}
    stats = engine.stats()
    assert stats.num_decoding == count
    made = sum(map(len, texts.values())) - before
    return Timed(phases, list(texts.values()), made, stats)


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
