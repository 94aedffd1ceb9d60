"""Reading another project's configuration: every option is used, or refused by name."""

from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel

from bytelm.config import parse
from bytelm.errors import CheckpointError, ConfigError

_REQUIRED = object()
NodeT = TypeVar("NodeT", bound=BaseModel)


class Options:
    """The options of one section of a foreign configuration, each to be read once.

    Args:
        values: names and values.
        where: file and section, for messages.
    """

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise CheckpointError(f"{where} must hold named options, not {values!r}")
        self._values = dict(values)
        self.where = where

    def take(self, name: str, kind: type | tuple[type, ...], default: Any = _REQUIRED) -> Any:
        """The value of an option.

        Args:
            name: the option's name.
            kind: type or types it may have; ``float`` admits ``int``.
            default: what it is where it is absent or null; without one it is required.

        Raises:
            CheckpointError: it is absent though required, or of another type.
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
        """The value of an option for which null means something else than its absence.

        Raises:
            CheckpointError: it is of another type.
        """
        return self.take(name, kind, None if name in self._values else absent)

    def section(self, name: str) -> "Options":
        """A section within this one; empty if absent."""
        return Options(self._values.pop(name, None) or {}, f"{self.where}: {name}")

    def expect(self, name: str, *allowed: Any, remedy: str = "") -> None:
        """Refuse an option unless it is absent, null or one of the values that change nothing.

        Raises:
            CheckpointError: it has another value.
        """
        value = self._values.pop(name, None)
        if value is not None and value not in allowed:
            wanted = " or ".join(repr(v) for v in allowed) or "null"
            raise CheckpointError(
                f"{self.where}: {name} is {value!r}, where bytelm supports only {wanted}"
                + (f": {remedy}" if remedy else "")
            )

    def ignore(self, names: Sequence[str]) -> None:
        """Drop options that have no part in what the model computes."""
        for name in names:
            self._values.pop(name, None)

    def finish(self) -> None:
        """Refuse what has not been read, but for options that are off.

        Raises:
            CheckpointError: an option is set that bytelm does not know.
        """
        for name, value in self._values.items():
            if value not in (None, False, ""):
                raise CheckpointError(
                    f"{self.where}: {name} is {value!r}, an option that bytelm does not know and "
                    "will not guess at: if the weights do not depend on it, remove it there"
                )


def build(node: type[NodeT], data: dict[str, Any], where: str) -> NodeT:
    """A node of our configuration from foreign values.

    Raises:
        CheckpointError: a value is out of range.
    """
    try:
        return parse(node, data, where)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
