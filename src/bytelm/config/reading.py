"""Read recipes from YAML files and overrides, and explain mistakes in them.

An error names the path, the bad value and, for a misspelt key, the nearest valid one. A recipe is
one of those shipped with the package (named by its file name) or a path; ``key.path=value``
overrides change single values, read as YAML.
"""

import difflib
import io
import os
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import YAMLError
from ruamel.yaml.representer import SafeRepresenter

from bytelm.config.kinds import Kinds, import_kinds, kind_of
from bytelm.config.names import has_earlier_names, modern_path, modernise
from bytelm.config.recipe import NgramRecipe, Recipe
from bytelm.config.starting import complete
from bytelm.errors import ConfigError
from bytelm.layout import RECIPE
from bytelm.storage import at_home

NodeT = TypeVar("NodeT", bound=BaseModel)
MAX_SHOWN = 80
"""Longest value, in characters, that an error quotes."""
MAX_NAMED = 8
"""Most files that an error names."""


class _Constructor(SafeConstructor):
    """Constructor of plain data without dates: the name of a folder may look like one."""


_Constructor.add_constructor(
    "tag:yaml.org,2002:timestamp", lambda constructor, node: constructor.construct_scalar(node)
)


class _Representer(SafeRepresenter):
    """Representer that quotes strings with line breaks that only double quotes can escape."""

    def represent_str(self, data: str) -> Any:
        style = '"' if any(mark in data for mark in "\x85\u2028\u2029\ufeff") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Representer.add_representer(str, _Representer.represent_str)


def _yaml() -> YAML:
    """Return a reader and writer of YAML 1.2, in which ``010`` is ten and ``1e-3`` a number."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    return yaml


def _load(text: str) -> Any:
    """Return the value of YAML text.

    Raises:
        YAMLError: it is not valid.
    """
    try:
        return _yaml().load(text)
    except YAMLError:
        raise
    except Exception as error:
        # Numbers such as `-_` and values that do not fit their tag raise built-in exceptions.
        raise YAMLError(str(error)) from None


def parse(node: type[NodeT], data: Any, where: str) -> NodeT:
    """Build ``node`` from plain data, in which keys may have the names of earlier versions.

    Raises:
        ConfigError: naming ``where``, the path, the value and the remedy for the first mistake.
    """
    data = modernise(data)
    try:
        return node.model_validate(data)
    except ValidationError as error:
        mistake = error
    failure = None
    if _has_unknown_kind(mistake):
        try:
            import_kinds()
        except ConfigError as error:
            # The kind may be one of those that could be imported.
            failure = error
        try:
            return node.model_validate(data)
        except ValidationError as error:
            mistake = error
    explained = f"{where}: {_explain(node, mistake)}"
    if failure is not None and _has_unknown_kind(mistake):
        raise ConfigError(f"{explained}; {failure}") from failure
    raise ConfigError(explained) from None


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes."""
    return shipped_names("recipes")


def recipe_text(name: str) -> str:
    """Return the text of a recipe, shipped or on disk.

    Raises:
        ConfigError: no recipe has that name, or the file cannot be read.
    """
    return shipped_text("recipes", name)


def shipped_names(kind: str) -> list[str]:
    """Return the names of the YAML files in a package of ``bytelm``: ``recipes`` or ``plans``."""
    files = resources.files(f"bytelm.{kind}").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def shipped_text(kind: str, name: str) -> str:
    """Return the text of a YAML file of a kind, shipped or on disk.

    Raises:
        ConfigError: no such file exists, or it cannot be read.
    """
    names, what = shipped_names(kind), kind.removesuffix("s")
    if name in names:
        return (resources.files(f"bytelm.{kind}") / f"{name}.yaml").read_text("utf-8")
    path = at_home(name)
    if path.is_dir():
        raise ConfigError(f"{name!r} is a folder, not a {what}: {_in_folder(path)}")
    try:
        return path.read_text("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"no {what} {name!r}: {_no_file(path, name, kind)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {what} {name!r}: {error}") from None


def _no_file(path: Path, name: str, kind: str) -> str:
    """Return that a recipe or plan is neither a file nor shipped, and what may have been meant."""
    for other, command in (("recipes", "train"), ("plans", "study")):
        if other != kind and name in shipped_names(other):
            return f"it is a {other.removesuffix('s')}; see `bytelm {command} --help`"
    names = shipped_names(kind)
    if path.suffix not in (".yaml", ".yml") and os.sep not in name:
        hint = nearest(name, names)
        return f"not a file, and not among the shipped ones{hint} ({', '.join(names)})"
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    return f"there is no such file; {_in_folder(path.parent, path.name)}"


def _in_folder(folder: Path, name: str = "") -> str:
    """Return the YAML file of a folder that was probably meant, or all of them."""
    found = sorted(path.name for path in folder.iterdir() if path.suffix in (".yaml", ".yml"))
    if not found:
        return f"{folder} holds no YAML file"
    close = difflib.get_close_matches(name, found, n=1)
    if not name and RECIPE in found:
        close = [RECIPE]
    if close:
        return f"did you mean {str(folder / close[0])!r}?"
    more = ", ..." if len(found) > MAX_NAMED else ""
    return f"YAML files in {folder}: {', '.join(found[:MAX_NAMED])}{more}"


def load_recipe(
    name: str | Mapping[str, Any], overrides: Iterable[str] = ()
) -> Recipe | NgramRecipe:
    """Load a recipe and apply overrides.

    What a recipe with ``init.from`` leaves out of its model is taken from that checkpoint.

    Args:
        name: a shipped recipe, a path to a YAML file, or a mapping with the contents of one.
        overrides: ``key.path=value`` strings, applied in order.

    Returns:
        An :class:`NgramRecipe` if the model's kind is ``ngram``, otherwise a :class:`Recipe`.

    Raises:
        ConfigError: the recipe or an override cannot be used.
        CheckpointError: the checkpoint to begin with, which is to complete the recipe, is missing
            or damaged.
    """
    is_name = isinstance(name, str)
    where = f"recipe {name!r}" if is_name else "the recipe"
    data = complete(read_mapping(recipe_text(name) if is_name else name, where, overrides))
    model = data.get("model")
    is_counted = isinstance(model, dict) and model.get("kind") == "ngram"
    return parse(NgramRecipe if is_counted else Recipe, data, where)


def read_mapping(
    text: str | Mapping[str, Any], where: str, overrides: Iterable[str] = ()
) -> dict[str, Any]:
    """Parse the YAML of a mapping, or take a mapping, and apply ``key.path=value`` overrides.

    Raises:
        ConfigError: the text is not valid YAML or not a mapping, or an override is invalid.
    """
    try:
        data = _load(text) if isinstance(text, str) else deepcopy(dict(text))
    except YAMLError as error:
        what = " ".join(str(error).split())
        raise ConfigError(f"{where} is not valid YAML: {what}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{where} must hold a mapping, not {type(data).__name__}")
    data = modernise(data)
    for override in overrides:
        _override(data, override)
    return data


def dump_yaml(node: BaseModel) -> str:
    """Return the node as YAML that :func:`parse` reads back."""
    stream = io.StringIO()
    _yaml().dump(node.model_dump(mode="json"), stream)
    return stream.getvalue()


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return a line ``path: old -> new`` for every value in which two nested mappings differ."""
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
    value = _override_value(override, text)
    *parents, last = modern_path(path, data).split(".")
    is_ours = True
    for parent in parents:
        section = data.get(parent)
        if section is not None and not isinstance(section, dict):
            raise ConfigError(f"override {override!r}: {parent!r} holds a value, not a section")
        # A copy: a YAML alias may have put the same object in other sections.
        data[parent] = dict(section or {})
        data = data[parent]
        is_ours = has_earlier_names(data, is_ours)
    section = parents[-1] if parents else ""
    data[last] = modernise({last: value}, section, is_ours=is_ours)[last]


def _override_value(override: str, text: str) -> Any:
    """Return the value of the YAML text of an override."""
    remedy = "to set it to this text, write it in quotes, '\"...\"'"
    try:
        value = _load(text)
    except YAMLError:
        raise ConfigError(
            f"override {override!r}: {text!r} is not a YAML value; {remedy}"
        ) from None
    # Within a comment, another character changes nothing.
    with suppress(YAMLError):
        if "#" in text and _load(f"{text}.") == value:
            raise ConfigError(f"override {override!r}: # begins a comment in YAML; {remedy}")
    # A shell expands ~ at the beginning of a word only.
    return os.path.expanduser(value) if isinstance(value, str) and value[:2] == "~/" else value


def _has_unknown_kind(error: ValidationError) -> bool:
    return any(one["type"] == "union_tag_invalid" for one in error.errors())


def _explain(node: type[BaseModel], error: ValidationError) -> str:
    errors = error.errors()
    # A misspelt key is also reported as a missing one: name the spelling.
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    location = first["loc"]
    path = ".".join(_path(node, location))
    if first["type"] == "extra_forbidden":
        *_, candidates = _walk(node, location[:-1])
        fields = (field for candidate in candidates for field in candidate.model_fields.items())
        valid = [field.alias or name for name, field in fields]
        hint = nearest(str(location[-1]), valid)
        message = f"unknown key {path!r}{hint}; valid here: {', '.join(valid)}"
        section = path.rpartition(".")[0]
        if section and "kind" in valid and not hint:
            # Left from another kind, by an override of the kind alone.
            message += f"; if it belongs to another kind, set all: '{section}={{kind: ...}}'"
        return message
    message = first["msg"].removeprefix("Value error, ")
    if not path:
        return message
    if first["type"] == "missing":
        return f"{path!r} is missing"
    if first["type"] in ("union_tag_not_found", "union_tag_invalid"):
        *_, candidates = _walk(node, location)
        known = [str(kind_of(candidate)) for candidate in candidates]
        if first["type"] == "union_tag_not_found":
            hint = nearest("kind", first["input"]).replace("did you mean", "is that the key")
            return f"'{path}.kind' is missing: one of {', '.join(known)}{hint}"
        kind = first["input"].get("kind") if isinstance(first["input"], dict) else None
        hint = nearest(str(kind), known)
        return f"{path}.kind: {kind!r} is not one of {', '.join(known)}{hint}"
    if first["type"] == "bool_type":
        message = "must be true or false"
    shown = repr(first["input"])
    if len(shown) <= MAX_SHOWN:
        message += f", not {shown}"
    if first["type"] == "string_type":
        message += ": write it in quotes, '\"...\"'"
    return f"{path}: {message}"


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a hint at the valid name closest to ``name``, or an empty string."""
    matches = difflib.get_close_matches(name, list(valid), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _walk(
    node: type[BaseModel], location: tuple[int | str, ...]
) -> Iterator[list[type[BaseModel]]]:
    """Yield the candidate nodes at the beginning of a location and after each of its parts."""
    candidates: list[Any] = [node]
    yield candidates
    for part in location:
        candidates = [inner for candidate in candidates for inner in _inside(candidate, part)]
        yield [one for one in candidates if _is_node(one)]


def _inside(candidate: Any, part: int | str) -> list[Any]:
    """Return the nodes and containers that a candidate may hold at a part of a location."""
    if not _is_node(candidate):
        *_, values = (one for one in get_args(candidate) if one is not Ellipsis)
        return _held_in(values)
    if kind_of(candidate) == part:
        return [candidate]
    field = candidate.model_fields.get(str(part))
    return [] if field is None else _held_in(field.annotation, *field.metadata)


def _path(node: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Return a location as users write it, without the tags that choose between kinds."""
    steps = zip(location, _walk(node, location), strict=False)
    return [str(part) for part, before in steps if part not in [kind_of(c) for c in before]]


def _held_in(annotation: Any, *metadata: Any) -> list[Any]:
    """Return the nodes and containers of nodes that a field of a type may hold."""
    for one in metadata:
        if isinstance(one, Kinds):
            return list(one.nodes.values())
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        return _held_in(inner, *more)
    if origin in (Union, types.UnionType):
        return [one for part in get_args(annotation) for one in _held_in(part)]
    return [annotation] if origin in (dict, list, tuple) or _is_node(annotation) else []


def _is_node(candidate: Any) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, BaseModel)
