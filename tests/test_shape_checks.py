"""The checks of shapes in tests refuse what jaxtyping refuses, whatever was called before."""

from dataclasses import dataclass
from typing import Literal

import jaxtyping
import pytest
import torch
from beartype import beartype
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Float, Int
from torch import Tensor

import bytelm.kernels
from shape_checks import checked, jaxtyped

shapes = st.lists(st.integers(1, 2), min_size=1, max_size=2)
tensors = st.builds(torch.zeros, shapes, dtype=st.sampled_from([torch.float32, torch.int64]))
calls = st.fixed_dictionaries(
    {
        "x": tensors,
        "more": st.lists(tensors, max_size=1),  # of longer ones beartype checks a random item
        "pair": st.tuples(tensors, st.none() | tensors),
        "named": st.dictionaries(st.just("a"), tensors),
        "kind": st.sampled_from(["sum", "mean", "other", 3]),
    }
)
results = tensors | st.none()


@dataclass
class Returns:
    result: object

    def values(
        self,
        x: Float[Tensor, "rows dim"],
        more: list[Float[Tensor, " dim"]],
        *,
        pair: tuple[Tensor, Int[Tensor, " rows"] | None] | None = None,
        named: dict[str, Float[Tensor, " rows"]] | None = None,
        kind: Literal["sum", "mean"] = "sum",
    ) -> Float[Tensor, " rows"]:
        return self.result


def refuses(function, call, result):
    try:
        function(Returns(result), **call)
    except jaxtyping.TypeCheckError:
        return True
    return False


@given(st.lists(st.tuples(calls, results), max_size=3))
def test_a_call_is_refused_if_jaxtyping_refuses_it(history):
    always = jaxtyped(Returns.values, typechecker=beartype)
    once = checked(Returns.values, typechecker=beartype)
    good = {"x": torch.zeros(2, 1), "more": [torch.zeros(1)]}, torch.zeros(2)
    # Changes of a good call are refused for one reason, random calls for several.
    for call, result in list(history):
        history += [({**good[0], name: value}, good[1]) for name, value in call.items()]
        history.append((good[0], result))
    for call, result in [good, *history]:
        expected = refuses(always, call, result)
        assert [refuses(once, call, result) for _ in range(2)] == [expected] * 2


def test_fields_of_dataclasses_are_checked():
    @checked(typechecker=beartype)
    @dataclass
    class Pair:
        x: Float[Tensor, " bytes"]
        y: Float[Tensor, " bytes"]

    for _ in range(2):
        Pair(torch.zeros(2), torch.zeros(2))
        with pytest.raises(jaxtyping.TypeCheckError):
            Pair(torch.zeros(2), torch.zeros(3))


def test_the_package_is_checked():
    x = torch.zeros(1, 4, 2, 8)
    plan = bytelm.kernels.plan_attention(bytelm.kernels.Mask(torch.zeros(1, 4).long(), None))
    for _ in range(2):
        bytelm.kernels.attention(x, x, x, plan)
        with pytest.raises(jaxtyping.TypeCheckError):
            bytelm.kernels.attention(x, x[:, :3], x, plan)
