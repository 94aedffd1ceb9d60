"""Fits of a study: power laws, intervals and crossovers."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bytelm.errors import DataError
from bytelm.study import load_plan, words
from bytelm.study.bootstrap import Bootstrap, Difference, seed_noise
from bytelm.study.drawing import frontier
from bytelm.study.fit import (
    PowerLaw,
    SlopeDifference,
    compare_slopes,
    find_crossover,
    fit_power_law,
    through,
)
from bytelm.study.palette import looks
from bytelm.study.table import Results


def made_up(laws, budgets, seeds=1, noise=0.0, documents=200, seed=0, shared=0.0):
    """A table whose families follow known laws, with documents of uneven length and difficulty.

    Runs of one budget and seed have noise ``shared`` in common, besides ``noise`` of their own.
    """
    rng = np.random.default_rng(seed)
    num_bytes = rng.integers(200, 2000, documents).astype(float)
    hardness = rng.normal(1, 0.2, documents)
    hardness *= num_bytes.sum() / (hardness * num_bytes).sum()
    rows, nats = [], []
    common = {(b, s): rng.normal(0, shared) if shared else 0.0 for b in budgets for s in range(9)}
    for family, law in laws.items():
        for budget in budgets:
            for number in range(seeds):
                bpb = float(law(np.array([budget]))[0]) + rng.normal(0, noise)
                bpb += common[budget, number]
                rows.append(
                    {
                        "family": family,
                        "size": "s",
                        "label": family,
                        "seed": number,
                        "flops": budget,
                        "budget_flops": budget,
                        "budget_bytes": None,
                        "settings": "{}",
                        "run": f"{family}{budget}{number}",
                    }
                )
                nats.append(bpb * np.log(2) * num_bytes * hardness)
    return Results(rows, np.array(nats), num_bytes, ("a",) * documents)


def curves_of(results, families):
    bootstrap = Bootstrap(results, replicates=300)
    curves = []
    for family in families:
        rows = [n for n, row in enumerate(results.rows) if row["family"] == family]
        budgets = sorted({results.rows[n]["flops"] for n in rows})
        groups = [[[n for n in rows if results.rows[n]["flops"] == b]] for b in budgets]
        curves.append(bootstrap.curve(family, groups, "flops"))
    return curves


@given(st.floats(0.02, 0.4), st.floats(0.5, 3))
def test_a_law_is_recovered(exponent, scale):
    law = PowerLaw(0.0, float(np.log(scale) + exponent * np.log(1e12)), exponent)
    x = np.geomspace(1e12, 3e13, 3)
    found = fit_power_law(x, law(x))
    assert found.exponent == pytest.approx(exponent, rel=1e-6)
    assert found(x) == pytest.approx(law(x))


def test_a_floor_is_found_where_there_are_budgets_enough():
    law = PowerLaw(0.8, float(np.log(2) + 0.3 * np.log(1e12)), 0.3)
    x = np.geomspace(1e12, 1e15, 7)
    found = fit_power_law(x, law(x))
    assert found.floor == pytest.approx(0.8, abs=0.1)
    assert found(x) == pytest.approx(law(x), rel=0.01)


def test_intervals_hold_the_truth_and_the_noise_of_seeds():
    law = PowerLaw(0.0, float(np.log(2.5) + 0.08 * np.log(1e12)), 0.08)
    results = made_up({"a": law}, [1e12, 5e12, 3e13], seeds=3, noise=0.02)
    noise = seed_noise(results.rows, results.bits_per_byte(np.ones(200)))
    assert 0.003 < noise.total < 0.02  # of about 2.2 bits
    assert noise.freedom == 6
    assert (noise.own, noise.own_freedom) == (noise.total, 0)  # one family: nothing to pair with
    (curve,) = curves_of(results, ["a"])
    low, high = curve.exponent_interval()
    assert low < 0.08 < high
    assert all(curve.low < curve.bpb)
    assert all(curve.bpb < curve.high)


def crossing_laws():
    one = PowerLaw(0.0, float(np.log(3.0) + 0.10 * np.log(1e12)), 0.10)
    # Worse at first and steeper: equal at 1e13.
    other = PowerLaw(0.0, float(np.log(one(np.array([1e13]))[0]) + 0.16 * np.log(1e13)), 0.16)
    return {"base": one, "new": other}


def test_a_crossover_is_found_with_its_interval():
    results = made_up(crossing_laws(), [1e12, 5e12, 3e13], seeds=2, noise=0.003)
    base, new = curves_of(results, ["base", "new"])
    found = find_crossover(new, base)
    assert found.verdict == "below from there on"
    assert found.low < found.x < found.high
    assert found.x == pytest.approx(1e13, rel=0.3)
    other = find_crossover(base, new)
    assert other.verdict == "below up to there"
    assert other.x == pytest.approx(found.x)


def test_only_budgets_that_both_were_run_at_are_compared():
    laws = crossing_laws()
    (low,) = curves_of(made_up({"a": laws["base"]}, [1e11, 2e11]), ["a"])
    (high,) = curves_of(made_up({"b": laws["new"]}, [2e11, 5e12]), ["b"])
    for one, other in ((low, high), (high, low)):
        assert "share fewer than two" in find_crossover(one, other).verdict
    far = through("far", low.budgets, low.x * 100, low.bpb, low.drawn)
    assert "does not overlap" in find_crossover(far, low).verdict
    # A budget that only one of them has changes nothing.
    (base,) = curves_of(made_up({"base": laws["base"]}, [1e12, 5e12, 3e13], noise=0.001), ["base"])
    (short,) = curves_of(made_up({"new": laws["new"]}, [1e12, 5e12], noise=0.001), ["new"])
    strange = replace(base, bpb=base.bpb * [1, 1, 2], drawn=base.drawn * [1, 1, 2])
    assert find_crossover(short, base) == find_crossover(short, strange)


def test_laws_alone_do_not_put_a_curve_below_another():
    """Three budgets in a line, of which one lies on the other side."""
    laws = {"base": crossing_laws()["base"]}
    (base,) = curves_of(made_up(laws, [1e12, 5e12, 3e13]), ["base"])
    lower = through("lower", base.budgets, base.x, base.bpb - 0.1, base.drawn - 0.1)
    assert "below at all budgets" in find_crossover(lower, base).verdict
    bump = np.array([-0.1, 0.01, -0.1])
    bumped = through("bumped", base.budgets, base.x, base.bpb + bump, base.drawn + bump)
    grid = np.geomspace(1e12, 3e13)
    assert (bumped.law(grid) < base.law(grid)).all()
    assert "cannot be bounded" in find_crossover(bumped, base).verdict


def test_an_open_verdict_lists_the_shares_of_replicates():
    laws = {"base": crossing_laws()["base"]}
    (base,) = curves_of(made_up(laws, [1e12, 5e12]), ["base"])
    noise = np.random.default_rng(0).normal(0, 0.05, base.drawn.shape)
    near = through("near", base.budgets, base.x, base.bpb - 0.02, base.drawn - 0.02 + noise)
    verdict = find_crossover(near, base).verdict
    assert "cannot be bounded by the runs" in verdict
    shares = [float(share) for share in re.findall(r"([\d.]+)% at", verdict)]
    assert shares == pytest.approx([65.5, 65.5], abs=10)  # of a normal above -0.4 deviations


def test_a_table_without_runs_is_refused():
    empty = Results([], np.zeros((0, 3)), np.ones(3), ("a",) * 3)
    with pytest.raises(DataError, match="no run"):
        Bootstrap(empty)


def test_a_crossover_far_beyond_the_budgets_is_refused():
    results = made_up(crossing_laws(), [1e10, 2e10, 4e10], seeds=2, noise=0.003)
    base, new = curves_of(results, ["base", "new"])
    found = find_crossover(new, base)
    assert found.x is None
    assert "above at all budgets" in found.verdict


def test_a_crossover_that_only_the_laws_have_is_refused():
    """Runs that approach each other and bend apart again: lines through them cross in between."""
    laws = {"base": crossing_laws()["base"]}
    (base,) = curves_of(made_up(laws, [1e12, 5e12, 3e13]), ["base"])
    ahead = np.array([0.3, -0.2, 0.02])
    bent = through("bent", base.budgets, base.x, base.bpb + ahead, base.drawn + ahead)
    ends = np.array([1e12, 3e13])
    assert list(bent.law(ends) > base.law(ends)) == [True, False]
    assert find_crossover(bent, base).x is None


def test_a_crossover_in_noise_is_refused():
    results = made_up(crossing_laws(), [5e12, 1e13, 2e13], seeds=2, noise=0.1)
    base, new = curves_of(results, ["base", "new"])
    found = find_crossover(new, base)
    assert found.x is None
    assert "cannot be bounded" in found.verdict


def test_one_budget_is_not_fitted():
    law = crossing_laws()["base"]
    results = made_up({"a": law, "b": law}, [1e12])
    a, b = curves_of(results, ["a", "b"])
    assert a.law is None
    assert "not fitted" in find_crossover(a, b).verdict


def test_every_replicate_chooses_the_best_size_of_each_budget():
    law = crossing_laws()["base"]
    results = made_up({"a": law}, [1e12], seeds=2, noise=0.05, seed=4)
    bootstrap = Bootstrap(results, replicates=50)
    curve = bootstrap.curve("a", [[[0], [1]]], "flops")
    assert curve.bpb[0] == min(bootstrap.bpb)
    best = bootstrap.replicates.min(1)
    assert curve.low[0] == pytest.approx(np.quantile(best, 0.025))
    assert curve.high[0] == pytest.approx(np.quantile(best, 0.975))


def test_the_same_draw_of_documents_serves_all_runs():
    """Two runs whose documents are equally hard differ by the same amount in every replicate."""
    laws = {"a": crossing_laws()["base"], "b": crossing_laws()["base"]}
    results = made_up(laws, [1e12])
    bootstrap = Bootstrap(results, replicates=50)
    assert bootstrap.replicates[:, 0] == pytest.approx(bootstrap.replicates[:, 1])
    assert np.ptp(bootstrap.replicates[:, 0]) > 0
    one = bootstrap.difference([[0]], [[1]])
    assert (one.value, one.low, one.high) == pytest.approx((0, 0, 0), abs=1e-9)
    low, high = bootstrap.interval(0)
    assert low < high


def test_the_mix_of_sources_is_not_drawn():
    """Sources whose documents are equal within each source leave no spread."""
    results = made_up({"a": crossing_laws()["base"]}, [1e12], documents=40)
    sources = np.array(["easy"] * 10 + ["hard"] * 30)
    nats = results.num_bytes * np.where(sources == "easy", 1.0, 3.0)
    alike = replace(results, nats=nats[None], sources=tuple(sources))
    drawn = Bootstrap(alike, replicates=50)
    assert drawn.replicates == pytest.approx(drawn.bpb[0])
    assert np.ptp(Bootstrap(replace(alike, sources=("one",) * 40), replicates=50).replicates) > 0


# Seeds in pairs -----------------------------------------------------------------------------------


def test_noise_that_runs_of_one_seed_share_is_told_from_their_own():
    law = crossing_laws()["base"]
    laws = dict.fromkeys("abcdef", law)
    results = made_up(laws, [1e12, 5e12], seeds=4, noise=0.004, shared=0.05)
    noise = seed_noise(results.rows, results.bits_per_byte(np.ones(200)))
    values = law(np.array([1e12, 5e12]))
    assert noise.own == pytest.approx(0.004 / values.mean(), rel=0.4)
    assert noise.shared > 4 * noise.own
    assert noise.own_freedom == 2 * 5 * 3
    assert noise.freedom == 2 * 6 * 3


def test_noise_that_is_shared_cancels_in_differences_of_one_seed():
    """Two families 0.01 apart, under noise five times as large that both have in common."""
    base = crossing_laws()["base"]
    better = replace(base, floor=-0.01)
    laws = {**dict.fromkeys("abcd", base), "better": better}
    results = made_up(laws, [1e12], seeds=2, noise=0.0002, shared=0.05)
    bootstrap = Bootstrap(results, replicates=300)
    rows = {
        family: [n for n, row in enumerate(results.rows) if row["family"] == family]
        for family in ("a", "better")
    }
    paired = bootstrap.difference([rows["better"]], [rows["a"]], ("better", "a"))
    assert paired.seeds == 2
    assert paired.value == pytest.approx(-0.01, abs=0.001)
    assert words.side(paired) == "ahead"
    assert bootstrap.difference([rows["better"][:1]], [rows["a"]]).seeds == 1
    # Different seeds: the noise stays.
    apart = bootstrap.difference([rows["better"][:1]], [rows["a"][1:]])
    assert apart.seeds == 0
    assert apart.high - apart.low > 5 * (paired.high - paired.low)
    # The interval of a value includes it too.
    low, high = bootstrap.interval(rows["a"][0])
    assert high - low > 5 * (paired.high - paired.low)


def test_a_pair_is_of_the_seeds_that_both_have():
    law = crossing_laws()["base"]
    results = made_up({"a": law, "b": law}, [1e12], seeds=3, noise=0.05)
    bootstrap = Bootstrap(results, replicates=20)
    bpb = bootstrap.bpb
    for mine, base, wanted in [
        ([0, 1, 2], [4, 5], (bpb[1] + bpb[2] - bpb[4] - bpb[5]) / 2),
        ([0], [3, 4, 5], bpb[0] - bpb[3]),
        ([0], [4, 5], bpb[0] - (bpb[4] + bpb[5]) / 2),
    ]:
        assert bootstrap.difference([mine], [base]).value == pytest.approx(wanted)


def test_noise_is_that_of_the_runs_compared_if_they_are_enough():
    law = crossing_laws()["base"]
    calm = made_up(dict.fromkeys("abcdef", law), [1e12], seeds=2, noise=0.001)
    wild = made_up(dict.fromkeys("ghijkl", law), [1e12], seeds=2, noise=0.1, seed=1)
    both = replace(calm, rows=[*calm.rows, *wild.rows], nats=np.vstack([calm.nats, wild.nats]))
    bootstrap = Bootstrap(both, replicates=20)
    assert bootstrap.among(range(12)).noise.own < bootstrap.noise.own / 10
    assert bootstrap.among(range(4)) is bootstrap


# Words --------------------------------------------------------------------------------------------


@given(st.floats(-1, 1), st.floats(0, 1), st.floats(0, 1))
def test_no_sentence_says_more_than_its_interval(value, below, above):
    low, high = value - below, value + above
    one = Difference("new", "base", 1e12, value, low, high, 1)
    law = SlopeDifference("new", "base", value, low, high)
    if low <= 0 <= high:
        said = ("cannot be told apart", "the slopes of the two laws cannot be told apart")
    else:
        said = ("behind", "its law is steeper") if low > 0 else ("ahead", "its law is flatter")
    assert (words.side(one), words.slope(law)) == said
    assert words.position([one]) == f"{said[0]} at 1e+12"
    assert words.groups([one]) == [f"{said[0]}: new"]


def test_sentences_about_several_budgets_and_members():
    def made(name, budget, low):
        return Difference(name, "base", budget, low + 0.01, low, low + 0.02, 1)

    a = [made("a", 1e12, 0.1), made("a", 5e12, -0.01), made("a", 3e13, 0.2)]
    b = [made("b", 1e12, -0.2), made("b", 5e12, -0.01)]
    assert words.position(a) == "behind at 1e+12 and 3e+13; cannot be told apart at 5e+12"
    assert words.groups([*a, *b]) == [
        "ahead: b at 1e+12",
        "behind: a at 1e+12 and 3e+13",
        "cannot be told apart: a at 5e+12; b at 5e+12",
    ]


def test_a_family_looks_the_same_in_all_figures():
    """In any plan that has it; variants have the colour of what they are like, and other marks."""
    found = {name: looks(load_plan(name)) for name in ("cpu-study", "cpu-inference", "gpu-study")}
    study = found["cpu-study"]
    tokens = "BPE transformer, 4,096 tokens"
    for others in found.values():
        for label in study.keys() & others.keys():
            assert study[label].colour == others[label].colour
        assert len(set(others.values())) == len(others)
    assert study[tokens].colour == study[f"{tokens}, 65,536 buckets"].colour
    plain = [
        study[label].colour
        for label in (tokens, "byte transformer", "BLT, entropy patches", "SpaceByte-style")
    ]
    assert len(set(plain)) == 4


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1))
def test_the_frontier_is_what_no_other_beats_in_both(points):
    points = sorted({(float(a), float(b)) for a, b in points})
    best = [p for p in points if not any(o != p and o[0] <= p[0] and o[1] <= p[1] for o in points)]
    assert frontier(points) == best


def test_laws_are_compared_in_pairs():
    """Equal laws under noise of documents that both have: the difference of exponents is exact."""
    base = crossing_laws()["base"]
    results = made_up({"a": base, "b": base, "c": crossing_laws()["new"]}, [1e12, 5e12, 3e13])
    a, b, c = curves_of(results, ["a", "b", "c"])
    same = compare_slopes(a, b)
    assert (same.value, same.low, same.high) == pytest.approx((0, 0, 0), abs=1e-9)
    steeper = compare_slopes(c, b)
    assert steeper.value == pytest.approx(0.06, abs=1e-6)
    assert words.slope(steeper) == "its law is steeper"
    assert compare_slopes(a.at(np.array([1e12])), b) is None
