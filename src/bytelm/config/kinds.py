"""Configuration nodes, and fields that hold one of several kinds of node.

A field such as ``patching`` holds a node whose ``kind`` says which. The kinds of such a field are a
:class:`Kinds`: those that ship with bytelm are added where they are defined, others by the packages
that define them (docs/extending.md).
"""

from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from bytelm.errors import ConfigError

NodeT = TypeVar("NodeT", bound="Node")
AnyNodeT = TypeVar("AnyNodeT", bound="Node")
ENTRY_POINTS = "bytelm.kinds"
"""Group of the entry points whose modules add kinds when they are imported."""


def _whole(value: Any) -> Any:
    """Return a float that is a whole number, such as 1e3, as an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Int = Annotated[int, Field(lt=2**63), BeforeValidator(_whole)]
"""Integer that may be written as ``1e3``."""


class Node(BaseModel):
    """Base class of configuration nodes: immutable, strict about names and types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Kinds(Generic[NodeT]):
    """Registry of the kinds of node that a field may hold, open to other packages.

    ``Annotated[Base, kinds]`` is a field that holds one of them, chosen by its ``kind``.

    Args:
        what: name of the nodes in messages, such as "patching rule".
        others: registries whose kinds the field may hold as well.
    """

    _users: ClassVar[list[type[BaseModel]]] = []

    def __init__(self, what: str, *others: "Kinds[Any]") -> None:
        self.what = what
        self._nodes: dict[str, type[Any]] = {}
        self._others = others

    @property
    def nodes(self) -> dict[str, type[Any]]:
        """Node classes by kind."""
        inherited = {kind: node for other in self._others for kind, node in other.nodes.items()}
        return {**inherited, **self._nodes}

    def add(self, node: type[AnyNodeT]) -> type[AnyNodeT]:
        """Add a kind; usable as a class decorator.

        Raises:
            ConfigError: the node has no kind, or another node has the same one.
        """
        kind = kind_of(node)
        if kind is None:
            has = "a kind without a default" if "kind" in node.model_fields else "no kind"
            raise ConfigError(
                f'{node.__name__} has {has}: declare `kind: Literal["name"] = "name"`'
            )
        known = self.nodes.get(kind)
        # The same class may be added again: a module is reloaded, or a notebook's cell is rerun.
        if known is not None and _name(known) != _name(node):
            raise ConfigError(
                f"the {self.what} {kind!r} exists already, as {_name(known)}: choose another kind"
            )
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
    """Let a node's fields hold kinds that are registered later; a class decorator."""
    Kinds._users.append(node)
    return node


def kind_of(node: type[BaseModel]) -> str | None:
    """Return the kind of a node class, or ``None`` if it has none, or one without a default."""
    field = node.model_fields.get("kind")
    return field.default if field is not None and isinstance(field.default, str) else None


def import_kinds() -> None:
    """Import the modules of other packages that add kinds.

    Raises:
        ConfigError: a module cannot be imported; the others were.
    """
    failed: list[tuple[EntryPoint, Exception]] = []
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:  # A module may raise anything.
            failed.append((entry, error))
    for entry, error in failed:
        package = f"package {entry.dist.name!r}" if entry.dist else "a package"
        raise ConfigError(
            f"the entry point {entry.name!r} of {package}, {entry.value}, cannot be imported "
            f"({type(error).__name__}: {error}): repair or uninstall the package"
        ) from error


def _name(node: type[BaseModel]) -> str:
    return f"{node.__module__}.{node.__qualname__}"
