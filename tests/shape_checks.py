"""Checks of types and shapes in tests: once for each kind of arguments, not at every call.

pytest's option ``--jaxtyping-packages`` decorates every function of the package with
``jaxtyping.jaxtyped``, which binds and compares at every call: more than half of the time of the
tests that decode byte by byte. But a check depends on nothing but types, dtypes and shapes, so what
has passed once passes again. Checks are made when they are first needed: to make all of them takes
several times as long as to import the package.
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
        return _checked_always(function, typechecker)  # quick, and there are no axes to compare
    passed, local = {}, threading.local()

    @functools.cache
    def check():
        return jaxtyped(function, typechecker=typechecker)

    @functools.cache
    def check_result():
        """Check what the function has returned, once its arguments have passed before."""
        again = functools.wraps(function)(lambda *args, **kwargs: local.result)
        return jaxtyped(again, typechecker=typechecker)

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        arguments = tuple(map(kind, args)), kind(kwargs) if kwargs else None
        results = passed.get(arguments)
        if results is None:
            result = check()(*args, **kwargs)
            passed[arguments] = {kind(result)}
            return result
        result = function(*args, **kwargs)
        if kind(result) not in results:
            local.result = result
            check_result()(*args, **kwargs)
            results.add(kind(result))
        return result

    return wrapped


def _checked_always(function, typechecker):
    if not function.__annotations__ or inspect.isgeneratorfunction(function):
        return typechecker(function)
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        return typechecker(function)
    check = None

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        nonlocal check
        if check is None:
            check = typechecker(function)
        return check(*args, **kwargs)

    return wrapped


def _has_arrays(annotation):
    if inspect.isclass(annotation) and issubclass(annotation, AbstractArray):
        return True
    return isinstance(annotation, str) or any(map(_has_arrays, get_args(annotation)))


def kind(value):
    """All that a check depends on. Strings may have to be some of a few."""
    return _KINDS[type(value)](value)


class _Kinds(dict):
    """What describes the values of a type; for most, their type does."""

    def __missing__(self, own):
        is_array = issubclass(own, torch.Tensor | np.ndarray)
        self[own] = (lambda value: (own, value.dtype, value.shape)) if is_array else type
        return self[own]


_KINDS = _Kinds(
    {
        str: lambda value: value,
        tuple: lambda value: (tuple, *map(kind, value)),
        list: lambda value: (list, frozenset(map(kind, value))),
        dict: lambda value: (dict, frozenset((key, kind(one)) for key, one in value.items())),
    }
)
