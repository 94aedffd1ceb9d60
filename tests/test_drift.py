"""Patch sizes by position, and other thresholds at inference."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import blt_config, random_byte_lm, random_patched, random_scorer, threshold_between
from bytelm.accounting import forward_flops
from bytelm.checkpoint import CheckpointConfig
from bytelm.config import EntropyPatching, ScorerConfig, SpacePatching, TransformerConfig
from bytelm.errors import ConfigError, DataError
from bytelm.evaluation.drift import measure_drift, position_edges, repetitive, scorers
from bytelm.evaluation.drift_sections import drift_section, thresholds_section
from bytelm.evaluation.thresholds import measure_thresholds, with_threshold
from bytelm.language_model import LanguageModel
from bytelm.lm import ScorerLM
from bytelm.patching import EntropyRule, SpaceRule, row_positions
from bytelm.storage import to_json
from test_log_probs import language_model

LINES = b"".join(b"line %d of the text, and more\n" % n for n in range(40))


def test_ranges_double_up_to_the_median_length():
    assert position_edges([256]) == [0, 64, 128, 256]
    assert position_edges([10, 1023, 5000]) == [0, 64, 128, 256, 512]
    assert position_edges([10, 1024, 5000]) == [0, 64, 128, 256, 512, 1024]
    for lengths in ([], [255], [1000, 10, 10]):
        with pytest.raises(DataError, match="too short to drift"):
            position_edges(lengths)


@given(st.binary(min_size=1, max_size=600), st.integers(1, 2000))
def test_repetitive_text_is_one_line_repeated(data, length):
    found = repetitive(data, length)
    period = min(len(data), 255) + 1
    assert len(found) == length
    assert found[period:] == found[:-period]
    assert found[: period - 1].count(b"\n") == 0
    assert found[period - 1 : period] in (b"\n", b"")


class FallingScorer(torch.nn.Module):
    """Sure of all but every second byte, and after 256 bytes of all but every eighth."""

    def entropies(self, ids, documents=None):
        positions = row_positions(torch.zeros_like(ids) if documents is None else documents)
        return torch.where(positions < 256, positions % 2 == 0, positions % 8 == 0).float()

    def new_state(self, num_slots=1, strategy="auto", memory=None):
        raise NotImplementedError


def test_sizes_are_those_of_a_scorer_that_grows_sure():
    lm = language_model(ScorerLM(FallingScorer()))
    found = measure_drift(lm, [LINES[:512], LINES[100:700], b"short"], patch_size=3.2)
    assert found.edges == (0, 64, 128, 256, 512)
    assert found.num_documents == 2
    assert not found.left_out
    by_rule = {(one.rule.kind, one.text): one for one in found.curves}
    for rule in ("entropy", "monotonic", "combined"):
        for text in ("as it is", "repeated"):
            one = by_rule[rule, text]
            assert one.reset is False
            assert [size.value for size in one.sizes] == [2, 2, 2, 8]
            assert [size.low for size in one.sizes] == [2, 2, 2, 8]
    space = by_rule["space", "as it is"]
    assert space.reset is None
    assert space.sizes[0].value == pytest.approx(5, abs=2)
    # A rule whose mean is out of reach is left out, and named.
    found = measure_drift(lm, [LINES[:512]], patch_size=2.5)
    assert {one.rule.kind for one in found.curves} == {"space"}
    assert [one.partition(":")[0] for one in found.left_out] == ["entropy", "monotonic", "combined"]


def test_the_sizes_of_a_model_are_those_of_its_patches():
    lm = language_model(random_byte_lm(window=None))
    documents = [LINES[:300], LINES[200:600]]
    done = []
    found = measure_drift(lm, documents, patch_size=3.0, report=done.append)
    assert len(found.curves) > 8
    assert done == sorted(done)
    assert {one.reset for one in found.curves} == {None, False, True}
    for curve in found.curves:
        scorer = scorers(lm.module)[bool(curve.reset)]
        counts = np.zeros(3)
        for data in documents:
            text = data[:256] if curve.text == "as it is" else repetitive(data, 256)
            starts = lm.patch(text, curve.rule, scorer=scorer).boundaries
            counts += np.histogram(starts, found.edges)[0]
        expected = 2 * np.diff(found.edges) / np.maximum(counts, 1)
        assert [one.value for one in curve.sizes] == pytest.approx(expected.tolist())


def test_scorers_with_and_without_resets_share_their_weights():
    for reset in (False, True):
        scorer = random_scorer(reset_at_newline=reset)
        found = scorers(ScorerLM(scorer))
        assert [one.reset_at_newline for one in found.values()] == [False, True]
        assert all(one.transformer is scorer.transformer for one in found.values())
        assert scorer.reset_at_newline is reset
    assert list(scorers(random_patched())) == [False, True]
    assert list(scorers(ScorerLM(FallingScorer()))) == [False]


def patched(threshold=None):
    if threshold is None:
        with torch.no_grad():
            entropies = random_scorer(1).entropies(torch.arange(4, 260)[None])
        threshold = threshold_between(entropies, 0.6)
    scorer = TransformerConfig(
        dim=32, num_layers=1, num_heads=2, ffn_dim=48, window=6
    )  # that of random_patched
    config = CheckpointConfig(
        model=blt_config(),
        patching=EntropyPatching(threshold=threshold),
        scorer=ScorerConfig(model=scorer),
        context_bytes=200,
    )
    return LanguageModel(random_patched(rule=EntropyRule(threshold=threshold)), config)


def test_a_model_is_calibrated_to_its_own_patches():
    lm = patched()
    found = measure_drift(lm, [LINES[:256]])
    size = 257 / (1 + len(lm.patch(LINES[:256]).boundaries))
    assert found.patch_size == pytest.approx(size)
    sizes = next(one for one in found.curves if one.rule.kind == "entropy").sizes
    assert all(math.isnan(one.low) for one in sizes)  # of one document


def test_thresholds_change_patches_and_nothing_else():
    lm = patched()
    own = lm.config.patching.threshold
    documents = [LINES[:150], b"", LINES[150:400], b"\xff a"]
    done = []
    points = measure_thresholds(lm, documents, [own + 0.05, -1.0, 99.0], done.append)
    assert [one.threshold for one in points] == [-1.0, own, own + 0.05, 99.0]
    assert [one.is_own for one in points] == [False, True, False, False]
    assert done[-1] == 4 * sum(map(len, documents))
    sizes = [one.patch_size.value for one in points]
    assert sizes == sorted(sizes)
    assert sizes[0] == 1
    for one in points:
        model = patched(one.threshold)
        assert one.bits_per_byte.value == pytest.approx(model.bits_per_byte(documents), abs=1e-5)
        expected = one.bits_per_byte.value - lm.bits_per_byte(documents)
        assert one.change.value == pytest.approx(expected, abs=1e-5)
        patches = round(200 / one.patch_size.value)
        parts = [*forward_flops(lm.config.model, 200, patches).values()]
        parts += forward_flops(lm.config.scorer.model, 200).values()
        assert one.flops == sum(part.total for part in parts) / 200
    assert points[1].change == (0, 0, 0)


def test_a_model_with_another_threshold_shares_its_weights():
    lm = patched()
    other = with_threshold(lm, 1.0)
    assert other.module.blt is lm.module.blt
    assert other.config.patching.threshold == 1.0
    assert lm.config.patching.threshold != 1.0
    assert other.patch(LINES).boundaries == lm.patch(LINES, threshold=1.0).boundaries


def test_models_without_a_threshold_are_refused():
    space = CheckpointConfig(model=blt_config(), patching=SpacePatching(), context_bytes=200)
    lm = LanguageModel(random_patched(rule=SpaceRule()), space)
    with pytest.raises(ConfigError, match="space patches, and no threshold"):
        measure_thresholds(lm, [LINES], [1.0])
    with pytest.raises(ConfigError, match="no patches, and no threshold"):
        measure_thresholds(language_model(random_byte_lm()), [LINES], [1.0])
    with pytest.raises(DataError, match="no text"):
        measure_thresholds(patched(), [b""], [1.0])


def test_sections_are_strict_json_and_draw_figures(tmp_path):
    lm = patched()
    sections = [
        drift_section(measure_drift(lm, [LINES[:256], LINES[300:600]])),
        thresholds_section(measure_thresholds(lm, [LINES], [1.0]), lm.context_bytes),
    ]
    for section in sections:
        assert all(len(row) == len(section.columns) for row in section.rows)
        to_json(section.record)
        for name, draw in section.figures.items():
            draw(tmp_path / f"{name}.svg")
            assert (tmp_path / f"{name}.svg").read_text().rstrip().endswith("</svg>")
