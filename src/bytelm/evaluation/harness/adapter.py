"""The model type ``bytelm`` of the evaluation harness.

Requests are text; likelihoods are of bytes, so a continuation may begin anywhere, and no request is
truncated: a document longer than the context is measured in overlapping spans.
"""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from bytelm.codec import to_bytes
from bytelm.errors import ConfigError
from bytelm.inference import GREEDY, Request, Sampling, answer
from bytelm.language_model import DEFAULT_SLOTS, LanguageModel, load
from bytelm.likelihood import score_continuations
from bytelm.threads import use_threads
from bytelm.version import __version__

__all__ = ["BYTES_PER_TOKEN", "HarnessLM"]

BYTES_PER_TOKEN = 4
"""Bytes generated for each token of a limit: limits are written for token models of English."""
DEFAULT_MAX_TOKENS = 256
"""Limit of tasks that give none, which is that of the harness's own models."""


class HarnessLM(LM):
    """A checkpoint as a model of the evaluation harness.

    Likelihoods are measured in packed rows of many requests, so there is no batch size to choose.

    Args:
        checkpoint: folder of a checkpoint or a run, or a loaded model.
        device: as in :func:`bytelm.load`.
        precision: as in :func:`bytelm.load`.
        threads: threads to compute with; ``None`` for the fastest number.
        slots: largest number of prompts that are continued at once.
        bytes_per_token: bytes generated for each token of ``max_gen_toks``.
        show_progress: show progress bars.
        ignored: options of the harness that change nothing here: ``batch_size``,
            ``max_batch_size``.

    Raises:
        CheckpointError: as :func:`bytelm.load`.
        ConfigError: an option is unknown; or the model is an n-gram scorer.
    """

    def __init__(
        self,
        checkpoint: str | PathLike[str] | LanguageModel,
        device: str | None = None,
        precision: Any = "auto",
        threads: int | None = None,
        slots: int = DEFAULT_SLOTS,
        bytes_per_token: int = BYTES_PER_TOKEN,
        show_progress: bool = True,
        **ignored: Any,
    ) -> None:
        super().__init__()
        if unknown := [name for name in ignored if not name.endswith("batch_size")]:
            raise ConfigError(
                f"the model type bytelm has no option {unknown[0]!r}: checkpoint, device, "
                "precision, threads, slots, bytes_per_token"
            )
        if isinstance(checkpoint, LanguageModel):
            self.lm = checkpoint
        else:
            # The harness asks for "cuda:0" unless it is told otherwise, also where there is none.
            if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
                device = "auto"
            self.lm = load(checkpoint, device, precision)
            use_threads(threads, str(self.lm.device))
        self._name = "" if isinstance(checkpoint, LanguageModel) else str(checkpoint)
        self._slots, self.bytes_per_token = slots, bytes_per_token
        self._show_progress = show_progress

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness's results record of the model."""
        return {"checkpoint": self._name, "description": repr(self.lm), "bytelm": __version__}

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether it is the greedy one.

        Args:
            requests: instances whose ``args`` are (context, continuation), ``str`` or ``bytes``. An
                empty context is the beginning of a document.
            disable_tqdm: show no progress.
        """
        return self._score([one.args[:2] for one in requests], "loglikelihood", disable_tqdm)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of each document.

        In a document longer than the context, every byte after the first context is predicted from
        at least half a context.

        Args:
            requests: instances whose ``args`` are (document,), ``str`` or ``bytes``.
            disable_tqdm: show no progress.
        """
        attribute = "loglikelihood_rolling"
        scored = self._score([("", *one.args[:1]) for one in requests], attribute, disable_tqdm)
        return [log_likelihood for log_likelihood, _ in scored]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each prompt, without the stop string that ended it.

        ``max_gen_toks`` tokens (256 if there is no limit) are ``bytes_per_token`` times as many
        bytes. Bytes that are no UTF-8 become U+FFFD.

        Args:
            requests: instances whose ``args`` are (prompt, options).
            disable_tqdm: show no progress.
        """
        wanted = [
            _to_request(one.args[0], one.args[1], self.bytes_per_token, seed)
            for seed, one in enumerate(requests)
        ]
        found = [b""] * len(wanted)
        with self._progress(len(wanted), "generate_until", disable_tqdm) as bar:
            for event in answer(self.lm.module, wanted, num_slots=self._slots):
                if event.error is not None:
                    raise event.error
                assert event.part is not None
                found[event.ticket] += event.part.data
                if event.part.finish is not None:
                    text = found[event.ticket].decode(errors="replace")
                    self.cache_hook.add_partial("generate_until", requests[event.ticket].args, text)
                    bar.update()
        return [data.decode(errors="replace") for data in found]

    def _score(
        self, pairs: Sequence[tuple[Any, Any]], attribute: str, disable_tqdm: bool
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood, greedy) of (context, continuation) pairs, each scored once."""
        given = list(dict.fromkeys(pairs))
        context_bytes = self.lm.context_bytes
        scored = score_continuations(
            self.lm.module,
            [(to_bytes(context), to_bytes(rest)) for context, rest in given],
            context_bytes=context_bytes,
            stride=max(context_bytes // 2, 1),
        )
        found: dict[tuple[Any, Any], tuple[float, bool]] = {}
        with self._progress(len(given), attribute, disable_tqdm) as bar:
            for pair, one in zip(given, scored, strict=True):
                found[pair] = (one.log_likelihood, one.is_greedy)
                is_rolling = attribute == "loglikelihood_rolling"
                key, value = (pair[1:], found[pair][0]) if is_rolling else (pair, found[pair])
                self.cache_hook.add_partial(attribute, key, value)
                bar.update()
        return [found[pair] for pair in pairs]

    def _progress(self, total: int, title: str, disable: bool) -> tqdm:
        return tqdm(total=total, desc=title, disable=disable or not self._show_progress)


register_model("bytelm")(HarnessLM)


def _to_request(
    prompt: str | bytes, options: Mapping[str, Any], bytes_per_token: int, seed: int
) -> Request:
    """Return the request of a prompt with the harness's options of generation."""
    until = options.get("until") or ()
    stop = [to_bytes(one) for one in ([until] if isinstance(until, str) else until) if one]
    max_tokens = int(options.get("max_gen_toks", DEFAULT_MAX_TOKENS))
    return Request(to_bytes(prompt), max_tokens * bytes_per_token, _sampling(options, seed), stop)


def _sampling(options: Mapping[str, Any], seed: int) -> Sampling:
    """Return the sampling that the harness's options ask for: greedy unless a temperature is set.

    Options that are not known here are left alone, as tasks have some of other libraries.
    """
    temperature = float(options.get("temperature") or 0.0)
    if options.get("do_sample") and "temperature" not in options:
        temperature = 1.0
    if not options.get("do_sample", temperature > 0) or temperature == 0:
        return GREEDY
    top_k = options.get("top_k")
    return Sampling(
        temperature=temperature,
        top_k=int(top_k) if top_k else None,
        top_p=options.get("top_p"),
        min_p=options.get("min_p") or None,
        seed=seed,
    )
