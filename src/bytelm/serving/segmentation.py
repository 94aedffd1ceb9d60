"""The patches of a text, with what they cost, for ``POST /v1/patches``."""

import json
from collections.abc import Callable
from typing import Any

from bytelm.accounting import break_down
from bytelm.config import RULES, CalibratedPatching
from bytelm.errors import ConfigError
from bytelm.language_model import LanguageModel, PatchedText
from bytelm.progress import ignore
from bytelm.serving.errors import ApiError
from bytelm.serving.schemas import PatchesRequest


def check_length(text: bytes, max_bytes: int) -> None:
    """Check that a text is short enough.

    Raises:
        ApiError: it is too long.
    """
    if len(text) > max_bytes:
        raise ApiError(
            400,
            f"a text of {len(text):,} bytes is over the limit of {max_bytes:,}: send it in parts",
            param="text",
            code="context_length_exceeded",
        )


def patches_response(
    lm: LanguageModel, name: str, body: PatchesRequest, report: Callable[[int], None] = ignore
) -> bytes:
    """Return the response to a request for patches, as JSON.

    Args:
        lm: the model.
        name: its name.
        body: the request.
        report: called with the number of bytes scored so far.

    Raises:
        ConfigError: the rule does not exist, or needs what the model lacks.
        PatchingError: the rule has no threshold.
    """
    report(0)
    names = ("threshold", "increase", "length", "max_length")
    options = {option: getattr(body, option) for option in names}
    given = {option: value for option, value in options.items() if value is not None}
    patched = lm.patch(body.text, body.rule, report=report, **given)
    return json.dumps(describe(lm, name, patched), allow_nan=False).encode()


def applicable_rules(lm: LanguageModel) -> list[str]:
    """Return the kinds of the rules that a model can apply: those with entropies need a scorer."""
    try:
        lm.module.get_scorer()
    except ConfigError:
        own = None if lm.config.patching is None else lm.config.patching.kind
        return [
            kind
            for kind, node in RULES.nodes.items()
            if kind == own or not issubclass(node, CalibratedPatching)
        ]
    return list(RULES.nodes)


def describe(lm: LanguageModel, name: str, patched: PatchedText) -> dict[str, Any]:
    """Return the patches of a text in the shape of the response."""
    rule = patched.rule.model_dump(mode="json", exclude_none=True)
    data, num_patches = patched.data, len(patched.boundaries)
    return {
        "object": "patches",
        "model": name,
        "rule": rule,
        "threshold": rule.get("threshold"),
        "bytes": list(data),
        "entropies": None if patched.entropies is None else patched.entropies.tolist(),
        "patches": [
            {"begin": begin, "end": end, "text": data[begin:end].decode("utf-8", "replace")}
            for begin, end in patched.spans
        ],
        "patch_size": patched.patch_size,
        # The patch of BOS is closed by the first byte, and the last patch of the text is open.
        "global_steps": num_patches if getattr(lm.config.model, "has_patches", False) else None,
        "flops_per_byte": _flops_per_byte(lm, patched),
    }


def _flops_per_byte(lm: LanguageModel, patched: PatchedText) -> float | None:
    """Return the forward FLOPs per byte, if the model's can be counted; with a scorer if used."""
    config, num_bytes = lm.config, len(patched.data)
    if not num_bytes:
        return None
    is_scored = isinstance(patched.rule, CalibratedPatching)
    try:
        parts = break_down(
            config.model,
            num_bytes,
            len(patched.boundaries),
            element_size=4,
            scorer=config.scorer.model if config.scorer is not None and is_scored else None,
        )
    except ConfigError:
        return None
    return sum(part.forward for part in parts.values())
