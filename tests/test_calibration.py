import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import random_ids
from bytelm.config import (
    CombinedPatching,
    EntropyPatching,
    MonotonicPatching,
    SpacePatching,
    StaticPatching,
)
from bytelm.errors import PatchingError
from bytelm.patching import PatchSample, build_patcher, calibrate
from bytelm.patching import patch_statistics as statistics_of
from bytelm.patching.calibration import TOLERANCE


def sample_of(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pairs = [
        (random_ids(n, seed=seed + i), torch.rand(n, generator=generator) * 5)
        for i, n in enumerate(sizes)
    ]
    return PatchSample.join(pairs)


SAMPLE = sample_of([4000, 300, 1, 2000])


def patch_statistics(rule, sample):
    return statistics_of(build_patcher(rule), sample)


@pytest.mark.parametrize(
    "rule",
    [
        EntropyPatching(),
        EntropyPatching(max_length=9),
        EntropyPatching(threshold=1.0),
        MonotonicPatching(),
        MonotonicPatching(max_length=6),
        CombinedPatching(increase=0.2),
    ],
)
@pytest.mark.parametrize("size", [2.5, 3.0, 4.5])
def test_the_wanted_patch_size_is_reached(rule, size):
    calibrated = calibrate(rule, SAMPLE, size)
    assert type(calibrated) is type(rule)
    assert patch_statistics(calibrated, SAMPLE).mean_size == pytest.approx(size, rel=0.005)


@given(st.floats(1.1, 30.0))
def test_a_larger_patch_size_needs_a_higher_threshold(size):
    lower = calibrate(EntropyPatching(), SAMPLE, size)
    higher = calibrate(EntropyPatching(), SAMPLE, size * 1.2)
    assert isinstance(lower, EntropyPatching)
    assert isinstance(higher, EntropyPatching)
    assert lower.threshold is not None
    assert higher.threshold is not None
    assert lower.threshold < higher.threshold


def test_the_threshold_lies_in_a_gap_that_rounding_cannot_cross():
    assert SAMPLE.entropies is not None
    for size in (2.0, 4.5, 8.0):
        calibrated = calibrate(EntropyPatching(), SAMPLE, size)
        assert isinstance(calibrated, EntropyPatching)
        distance = (SAMPLE.entropies - calibrated.threshold).abs().min()
        assert distance > 1e-4


@pytest.mark.parametrize(
    ("rule", "size", "message"),
    [
        (EntropyPatching(), 0.5, r"patch size of 0\.5 cannot be reached.*gives 1\.00 to"),
        (EntropyPatching(max_length=6), 6.5, r"rule with max_length 6 gives 1\.00 to 5\.\d+ bytes"),
        (CombinedPatching(increase=4.0), 1.5, r"the combined rule gives \d+\.\d+ to"),
        (SpacePatching(), 4.0, "the space rule has no threshold to calibrate"),
        (StaticPatching(length=4), 4.0, "the static rule has no threshold to calibrate"),
    ],
)
def test_what_cannot_be_reached_is_named_with_what_can(rule, size, message):
    with pytest.raises(PatchingError, match=message):
        calibrate(rule, SAMPLE, size)


@pytest.mark.parametrize("size", [2.4, 3.59, 5.46, 5.88])
def test_frequent_values_do_not_carry_the_threshold_away(size):
    """N-gram scorers give every occurrence of a context the same entropy."""
    generator = torch.Generator().manual_seed(0)
    common = torch.rand(60, generator=generator).repeat_interleave(60)
    entropies = torch.cat((torch.rand(20_000, generator=generator), common))
    entropies = entropies[torch.randperm(len(entropies), generator=generator)]
    sample = PatchSample.join([(random_ids(len(entropies)), entropies)])
    calibrated = calibrate(EntropyPatching(), sample, size)
    assert patch_statistics(calibrated, sample).mean_size == pytest.approx(size, rel=TOLERANCE)


@pytest.mark.parametrize("size", [1.0003, 2000.0, 8000.0])
def test_extreme_sizes_are_reached_too(size):
    sample = sample_of([40_000])
    calibrated = calibrate(EntropyPatching(), sample, size)
    assert patch_statistics(calibrated, sample).mean_size == pytest.approx(size, rel=TOLERANCE)


def test_equal_entropies_leave_no_threshold_between():
    flat = PatchSample.join([(random_ids(100), torch.ones(100))])
    with pytest.raises(PatchingError, match=r"it jumps from 1\.00 to 50\.00"):
        calibrate(EntropyPatching(), flat, 4.5)


def test_no_text_is_an_error():
    with pytest.raises(PatchingError, match="no text to calibrate on"):
        PatchSample.join([])


def test_statistics():
    ids = torch.arange(10) + 70
    entropies = torch.tensor([0.0, 9, 0, 0, 0, 9, 0, 0, 0, 9])
    statistics = patch_statistics(
        EntropyPatching(threshold=1.0), PatchSample.join([(ids, entropies)])
    )
    # Patches begin at 0, 1, 2 and 6; what comes after the last byte does not count.
    assert (statistics.num_positions, statistics.num_patches, statistics.longest) == (10, 4, 4)
    assert statistics.mean_size == 2.5
