"""Training in turns against the clock, on simulated computers of any speed."""

from itertools import chain, cycle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bytelm.config import Cooldown, OptimizerConfig
from bytelm.training import learning_rate
from bytelm.training.pace import Budget, Speed, next_turn, reachable_flops


class Simulation:
    """Two models that train until a deadline, with the times that their steps take."""

    def __init__(self, budget, seconds, step_seconds):
        self.budget, self.elapsed, self.longest = budget, 0.0, 0.0
        self.steps, self.cooldowns = [0, 0], [[], []]
        last, speed = None, Speed()
        speed.add(0.0, 0.0)
        for factor in cycle(step_seconds):
            left = seconds - self.elapsed
            turn = next_turn(budget, self.steps, last, left, speed.over(left))
            if turn.last != last:
                for model, end in enumerate(turn.last):
                    self.cooldowns[model].append(Cooldown(start=self.steps[model], end=end))
            last = turn.last
            if turn.model is None:
                self.last = last
                return
            # A step takes its time in proportion to its FLOPs.
            took = factor * budget.step_flops[turn.model]
            self.longest = max(self.longest, took)
            self.steps[turn.model] += 1
            self.elapsed += took
            speed.add(self.elapsed, sum(budget.spent(self.steps)))

    @property
    def spent(self):
        return self.budget.spent(self.steps)

    def last_rate(self, model):
        """Learning rate of the last step, of a peak of 1."""
        decided, kept = self.cooldowns[model], []
        for cooldown in decided:
            kept = [c for c in kept if c.start < cooldown.start] + [cooldown]
        config = OptimizerConfig(
            schedule="wsd", learning_rate=1.0, warmup_steps=0, final_ratio=0, cooldowns=kept
        )
        steps = self.steps[model]
        return learning_rate(steps - 1, steps, config)


step_flops = st.tuples(st.floats(0.5, 2.0), st.floats(0.5, 2.0))
most_flops = st.floats(1.0, 1500.0)
# Quiet, slow, and in bursts: some steps are up to a hundred times as slow as others.
times = st.lists(
    st.tuples(st.floats(0.02, 2.0), st.integers(1, 60)).map(lambda burst: [burst[0]] * burst[1]),
    min_size=1,
    max_size=8,
).map(lambda bursts: list(chain.from_iterable(bursts)))


@given(step_flops, most_flops, st.floats(0.05, 0.9), st.floats(-5.0, 120.0), times)
def test_training_ends_on_time_with_the_same_flops_and_a_cooldown(
    step_flops, flops, cooldown, seconds, step_seconds
):
    budget = Budget(step_flops, flops, cooldown)
    done = Simulation(budget, seconds, step_seconds)
    assert tuple(done.steps) == done.last
    # The steps that complete equal FLOPs after the deadline: a handful.
    most = 2 * sum(max(budget.step_flops) / f for f in budget.step_flops) + 2
    assert done.elapsed <= max(seconds, 0.0) + most * done.longest
    largest = max(budget.step_flops)
    assert max(done.spent) <= budget.flops + 2 * largest
    assert abs(done.spent[0] - done.spent[1]) <= sum(budget.step_flops) / 2 + 1e-9
    if min(done.steps) >= 200:
        assert done.spent[0] == pytest.approx(done.spent[1], rel=0.01)
    for cooldowns in done.cooldowns:
        assert all(c.end > c.start for c in cooldowns)
        # It is only ever shortened.
        assert [c.end for c in cooldowns] == sorted((c.end for c in cooldowns), reverse=True)


@given(step_flops, most_flops, st.floats(60.0, 120.0), times)
def test_the_learning_rate_has_decayed_at_the_last_step(step_flops, flops, seconds, step_seconds):
    done = Simulation(Budget(step_flops, flops, 0.4), seconds, step_seconds)
    if min(done.steps) >= 50:
        assert all(done.last_rate(model) < 0.4 for model in (0, 1))


@given(st.floats(0.01, 0.3), st.floats(1e2, 1e4), st.floats(0.1, 0.6))
def test_at_a_constant_speed_all_the_time_is_used_and_the_cooldown_has_its_share(
    step_seconds, flops, cooldown
):
    budget, seconds = Budget((1.0, 1.5), flops, cooldown), 100.0
    done = Simulation(budget, seconds, [step_seconds])
    possible = min(flops, seconds / step_seconds / 2)
    assert done.spent[0] == pytest.approx(possible, rel=0.05, abs=3)
    if possible > 100:
        start = done.cooldowns[0][0].start * budget.step_flops[0]
        assert start / done.spent[0] == pytest.approx(1 - cooldown, abs=0.06)


def test_a_pause_before_the_cooldown_does_not_cut_the_training_short():
    # 5 of 60 seconds are ten times as slow.
    done = Simulation(Budget((1.0, 1.0), 1e9, 0.4), 60.0, [0.1] * 200 + [1.0] * 5 + [0.1] * 9999)
    assert sum(done.spent) >= 0.9 * 555


def test_the_end_is_moved_when_the_computer_becomes_slow_in_the_cooldown():
    budget = Budget((1.0, 1.0), 100.0, 0.4)
    assert next_turn(budget, (60, 60), None, 80.0, 1.0).last == (100, 100)
    assert next_turn(budget, (70, 70), (100, 100), 60.0, 1.0).last == (100, 100)
    assert next_turn(budget, (70, 70), (100, 100), 60.0, 0.5).last == (84, 84)
    assert next_turn(budget, (70, 71), (100, 100), -1.0, 0.5) == (0, (72, 72))
    assert next_turn(budget, (100, 100), (100, 100), -1.0, 0.5) == (None, (100, 100))


def test_flops_that_can_be_reached():
    budget = Budget((1.0, 2.0), 50.0, 0.4)
    assert reachable_flops(budget, (10, 5), 20.0, 4.0) == 50.0
    assert reachable_flops(budget, (10, 5), 20.0, 3.0) == 40.0
    assert reachable_flops(budget, (10, 5), -1.0, 3.0) == 10.0
    assert reachable_flops(budget, (10, 5), 1.0, float("inf")) == 50.0


def test_speed_is_that_of_the_time_to_predict():
    speed = Speed()
    assert speed.over(9.0) == float("inf")
    for second in range(11):
        speed.add(float(second), 5.0 * second)
    speed.add(12.0, 52.0)
    assert speed.over(2.0) == 1.0
    assert speed.over(4.0) == 3.0
    assert speed.over(100.0) == pytest.approx(52 / 12)
    assert speed.over(-3.0) == speed.over(0.1) == 1.0
