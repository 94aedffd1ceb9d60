"""Reading recipes: YAML files and overrides into nodes, and mistakes into errors.

An error names the path, the bad value and, for a misspelt key, the nearest valid one. A recipe is
one of those shipped with the package (named by its file name) or a path; ``key.path=value``
overrides change single values, read as YAML.
"""

import difflib
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from bytelm.config.nodes import Recipe, TableRecipe
from bytelm.errors import ConfigError

NodeT = TypeVar("NodeT", bound=BaseModel)


class _YamlLoader(yaml.SafeLoader):
    """Safe YAML that reads ``1e-3`` as a number, as people mean it, and refuses repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


# Nothing in a recipe is a date, but a folder may be named like one.
_YamlLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag != "tag:yaml.org,2002:timestamp"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse(node: type[NodeT], data: Any, where: str) -> NodeT:
    """Build ``node`` from plain data.

    Raises:
        ConfigError: naming ``where``, the path, the value and the remedy for the first mistake.
    """
    try:
        return node.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explain(node, error)}") from None


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return shipped_names("recipes")


def recipe_text(name: str) -> str:
    """Text of a recipe, shipped or on disk.

    Raises:
        ConfigError: there is no such recipe.
    """
    return shipped_text("recipes", name)


def shipped_names(kind: str) -> list[str]:
    """Names of the YAML files that ship in a package of ``bytelm``: ``recipes`` or ``plans``."""
    files = resources.files(f"bytelm.{kind}").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def shipped_text(kind: str, name: str) -> str:
    """Text of a YAML file of a kind, shipped or on disk.

    Raises:
        ConfigError: there is no such file.
    """
    names, what = shipped_names(kind), kind.removesuffix("s")
    if name in names:
        return (resources.files(f"bytelm.{kind}") / f"{name}.yaml").read_text("utf-8")
    try:
        return Path(name).read_text("utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"no {what} {name!r}: not a file, and not among the shipped ones"
            f"{nearest(name, names)} ({', '.join(names)})"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {what} {name!r}: {error}") from None


def load_recipe(name: str, overrides: Iterable[str] = ()) -> Recipe | TableRecipe:
    """A recipe with overrides applied: of a table if its model is of kind ``ngram``.

    Args:
        name: a shipped recipe or a path to a YAML file.
        overrides: ``key.path=value`` strings, applied in order.

    Raises:
        ConfigError: the recipe or an override cannot be used.
    """
    data = read_mapping(recipe_text(name), f"recipe {name!r}", overrides)
    model = data.get("model")
    is_table = isinstance(model, dict) and model.get("kind") == "ngram"
    return parse(TableRecipe if is_table else Recipe, data, f"recipe {name!r}")


def read_mapping(text: str, where: str, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The mapping that a YAML text holds, with ``key.path=value`` overrides applied in order.

    Raises:
        ConfigError: the text is no YAML, holds something else, or an override cannot be used.
    """
    try:
        data = yaml.load(text, _YamlLoader)
    except yaml.YAMLError as error:
        what = " ".join(str(error).split())
        raise ConfigError(f"{where} is not valid YAML: {what}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{where} must hold a mapping, not {type(data).__name__}")
    for override in overrides:
        _override(data, override)
    return data


def dump_yaml(node: BaseModel) -> str:
    """The node as YAML that :func:`parse` reads back."""
    return yaml.safe_dump(node.model_dump(mode="json"), sort_keys=False)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines ``path: old -> new`` for every value in which two plain trees differ."""
    lines = []
    for key in [*old, *(k for k in new if k not in old)]:
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines


def _override(data: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise ConfigError(f"override {override!r} must have the form key.path=value")
    try:
        value = yaml.load(text, _YamlLoader)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: {text!r} is not a YAML value") from None
    *parents, last = path.split(".")
    for parent in parents:
        section = data.get(parent)
        if section is not None and not isinstance(section, dict):
            raise ConfigError(f"override {override!r}: {parent!r} holds a value, not a section")
        # A copy: with YAML's aliases other sections may hold the same object.
        data[parent] = dict(section or {})
        data = data[parent]
    data[last] = value


def _explain(node: type[BaseModel], error: ValidationError) -> str:
    first = error.errors()[0]
    location = first["loc"]
    path = ".".join(_path(node, location)) or "the whole"
    if first["type"] == "extra_forbidden":
        *_, candidates = _walk(node, location[:-1])
        valid = [name for candidate in candidates for name in candidate.model_fields]
        hint = nearest(str(location[-1]), valid)
        return f"unknown key {path!r}{hint}; valid here: {', '.join(valid)}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{path!r} is missing"
    if first["type"] == "union_tag_not_found":
        *_, candidates = _walk(node, location)
        return f"'{path}.kind' is missing: one of {', '.join(str(_tag(c)) for c in candidates)}"
    if first["type"] == "string_type" and not isinstance(first["input"], dict | list):
        return f"{path}: {message}, not {first['input']!r}: write it in quotes, '\"...\"'"
    if isinstance(first["input"], dict | list):
        return f"{path}: {message}"
    return f"{path}: {message}, not {first['input']!r}"


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint at the valid name most like ``name``, if one is."""
    matches = difflib.get_close_matches(name, list(valid), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _walk(
    node: type[BaseModel], location: tuple[int | str, ...]
) -> Iterator[list[type[BaseModel]]]:
    """The nodes that may be meant at the beginning of a location and after each of its parts."""
    candidates: list[type[BaseModel]] = [node]
    yield candidates
    for part in location:
        tagged = [c for c in candidates if _tag(c) == part]
        fields = [c.model_fields[str(part)] for c in candidates if str(part) in c.model_fields]
        candidates = tagged or [m for field in fields for m in _nodes_in(field.annotation)]
        yield candidates


def _path(node: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The location as a user writes it: without the tags that choose between kinds."""
    steps = zip(location, _walk(node, location), strict=False)
    return [str(part) for part, before in steps if part not in [_tag(c) for c in before]]


def _tag(node: type[BaseModel]) -> Any:
    field = node.model_fields.get("kind")
    return field.default if field else None


def _nodes_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return [node for part in get_args(annotation) for node in _nodes_in(part)]
    return []
