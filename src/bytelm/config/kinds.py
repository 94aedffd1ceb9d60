"""Configuration nodes, and fields that hold one of several kinds of node.

A field such as ``patching`` holds a node whose ``kind`` says which. The kinds of such a field are a
:class:`Kinds`: those that ship with bytelm are added where they are defined, others by the packages
that define them (docs/extending.md).
"""

from importlib.metadata import entry_points
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from bytelm.errors import ConfigError

NodeT = TypeVar("NodeT", bound="Node")
AnyNodeT = TypeVar("AnyNodeT", bound="Node")
ENTRY_POINTS = "bytelm.kinds"
"""Entry points of this group are modules that add kinds when they are imported."""


class Node(BaseModel):
    """Base of every configuration node: immutable, strict about names and types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Kinds(Generic[NodeT]):
    """The kinds of node that a field may hold, by name; open to other packages.

    ``Annotated[Base, kinds]`` is a field that holds one of them, chosen by its ``kind``.

    Args:
        what: they are, for messages.
        others: kinds that the field may hold as well.
    """

    _users: ClassVar[list[type[BaseModel]]] = []

    def __init__(self, what: str, *others: "Kinds[Any]") -> None:
        self.what = what
        self._nodes: dict[str, type[Any]] = {}
        self._others = others

    @property
    def nodes(self) -> dict[str, type[Any]]:
        """The node of each kind."""
        inherited = {kind: node for other in self._others for kind, node in other.nodes.items()}
        return {**inherited, **self._nodes}

    def add(self, node: type[AnyNodeT]) -> type[AnyNodeT]:
        """Add a kind; usable as a class decorator.

        Raises:
            ConfigError: another node has its name.
        """
        kind = kind_of(node)
        if kind is None:
            raise ConfigError(
                f'{node.__name__} has no kind: declare `kind: Literal["name"] = "name"`'
            )
        known = self.nodes.get(kind)
        if known is not None and known.__qualname__ != node.__qualname__:
            raise ConfigError(f"the {self.what} {kind!r} exists already, as {known.__name__}")
        self._nodes[kind] = node
        for user in Kinds._users:
            user.model_rebuild(force=True)
        return node

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        choices = {kind: handler(node) for kind, node in self.nodes.items()}
        return core_schema.tagged_union_schema(choices, discriminator="kind")


def open_node(node: type[AnyNodeT]) -> type[AnyNodeT]:
    """Let a node's fields hold kinds that are added later: decorates nodes with open fields."""
    Kinds._users.append(node)
    return node


def kind_of(node: type[BaseModel]) -> str | None:
    """Return the kind of a node; ``None`` for nodes that are of no kind."""
    field = node.model_fields.get("kind")
    return None if field is None else field.default


def import_kinds() -> bool:
    """Import what other installed packages add; whether there was anything."""
    found = entry_points(group=ENTRY_POINTS)
    for entry in found:
        entry.load()
    return bool(found)
