"""Checks of types and shapes in tests: once for each kind of arguments, not at every call.

pytest's option ``--jaxtyping-packages`` decorates every function of the package with
``jaxtyping.jaxtyped``, which binds and compares at every call: more than half of the time of the
tests that decode byte by byte. But a check depends on nothing but types, dtypes and shapes, so what
has passed once passes again.
"""

import dataclasses
import functools
import inspect
import threading
from types import FunctionType
from typing import get_args

import numpy as np
import torch
from jaxtyping import AbstractArray, jaxtyped


def checked(function=None, *, typechecker):
    """``jaxtyping.jaxtyped``, but equal kinds of arguments and results are checked once."""
    if function is None:
        return functools.partial(checked, typechecker=typechecker)
    if inspect.isclass(function):
        if dataclasses.is_dataclass(function) and "__init__" in vars(function):
            function.__init__ = checked(function.__init__, typechecker=typechecker)
        return function
    assert isinstance(function, FunctionType)
    if not any(map(_has_arrays, function.__annotations__.values())):
        return typechecker(function)  # quick, and there are no axes to compare
    passed, local = {}, threading.local()
    check = jaxtyped(function, typechecker=typechecker)
    # Checks what the function has returned, once its arguments have passed before.
    check_result = jaxtyped(
        functools.wraps(function)(lambda *args, **kwargs: local.result), typechecker=typechecker
    )

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        arguments = kind(args), kind(kwargs)
        results = passed.get(arguments)
        if results is None:
            result = check(*args, **kwargs)
            passed[arguments] = {kind(result)}
            return result
        result = function(*args, **kwargs)
        if kind(result) not in results:
            local.result = result
            check_result(*args, **kwargs)
            results.add(kind(result))
        return result

    return wrapped


def _has_arrays(annotation):
    if inspect.isclass(annotation) and issubclass(annotation, AbstractArray):
        return True
    return isinstance(annotation, str) or any(map(_has_arrays, get_args(annotation)))


def kind(value):
    """All that a check depends on. Strings may have to be some of a few."""
    own = type(value)
    if isinstance(value, torch.Tensor | np.ndarray):
        return own, value.dtype, value.shape
    if own is tuple:
        return own, *map(kind, value)
    if own is list:
        return own, frozenset(map(kind, value))
    if own is dict:
        return own, frozenset((key, kind(one)) for key, one in value.items())
    return value if own is str else own
