"""Strict reader of other projects' configurations: no option is silently ignored."""

from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel

from bytelm.config import parse
from bytelm.errors import CheckpointError, ConfigError

_REQUIRED = object()
NodeT = TypeVar("NodeT", bound=BaseModel)


class Options:
    """Options of one section of another project's configuration, each of which is read once.

    Args:
        values: values by name.
        where: file and section, for messages.

    Raises:
        CheckpointError: ``values`` is not a mapping.
    """

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise CheckpointError(f"{where} must hold named options, not {values!r}")
        self._values = dict(values)
        self.where = where

    def take(self, name: str, kind: type | tuple[type, ...], default: Any = _REQUIRED) -> Any:
        """Return the value of an option.

        Args:
            name: name of the option.
            kind: type or types it may have; ``float`` admits ``int``.
            default: value if it is absent or null; without a default the option is required.

        Raises:
            CheckpointError: the option is required but absent, or of another type.
        """
        value = self._values.pop(name, None)
        if value is None:
            if default is _REQUIRED:
                raise CheckpointError(
                    f"{self.where} lacks {name}: use the configuration that came with the weights"
                )
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if float in kinds and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        is_stray_bool = isinstance(value, bool) and bool not in kinds
        if is_stray_bool or not isinstance(value, kinds):
            wanted = " or ".join(k.__name__ for k in kinds)
            raise CheckpointError(f"{self.where}: {name} is {value!r}, where {wanted} is expected")
        return value

    def take_nullable(self, name: str, kind: type, absent: Any) -> Any:
        """Return the value of an option for which null differs from absence.

        Raises:
            CheckpointError: the option is of another type.
        """
        return self.take(name, kind, None if name in self._values else absent)

    def section(self, name: str) -> "Options":
        """Return a section within this one; empty if absent."""
        return Options(self._values.pop(name, None) or {}, f"{self.where}: {name}")

    def expect(self, name: str, *allowed: Any, remedy: str = "") -> None:
        """Check that an option is absent, null, or one of the supported values.

        Raises:
            CheckpointError: the option has another value.
        """
        value = self._values.pop(name, None)
        if value is not None and value not in allowed:
            wanted = " or ".join(repr(v) for v in allowed) or "null"
            raise CheckpointError(
                f"{self.where}: {name} is {value!r}, where bytelm supports only {wanted}"
                + (f": {remedy}" if remedy else "")
            )

    def ignore(self, names: Sequence[str]) -> None:
        """Discard options that do not affect the result of the model."""
        for name in names:
            self._values.pop(name, None)

    def finish(self) -> None:
        """Check that all options have been read, except those that are off.

        Raises:
            CheckpointError: an unknown option is set.
        """
        for name, value in self._values.items():
            if value not in (None, False, ""):
                raise CheckpointError(
                    f"{self.where}: {name} is {value!r}, an option that bytelm does not know: if "
                    "the weights do not depend on it, remove it there"
                )


def build(node: type[NodeT], data: dict[str, Any], where: str) -> NodeT:
    """Build a configuration node from another project's values.

    Raises:
        CheckpointError: a value is invalid.
    """
    try:
        return parse(node, data, where)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
