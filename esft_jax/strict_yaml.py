"""Frozen pydantic dataclasses <-> YAML 1.2 files; every mistake names its place and key.

A configuration is a dataclass of plain values and of sections, which are dataclasses of plain
values and, by name, of further sections; all forbid extra keys. A `ValueError` of the outer
`__post_init__`, which sees all sections, starts with the dotted key to change and a colon.
"""

from __future__ import annotations

import dataclasses
import difflib
import io
import re
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from esft_jax.errors import InputError, shown
from esft_jax.files import read_text, write_text_atomic

Config = TypeVar("Config")

_TAG = "tag:yaml.org,2002:"
_LONG_ESCAPE = re.compile(r"\\U([0-9A-Fa-f]{8})")
# Aliases let a few lines stand for more values than a memory holds.
_MOST_VALUES = 1_000_000


class _Constructor(SafeConstructor):
    """Values of the core schema of YAML 1.2, which are those of JSON; a date is a text there."""

    yaml_constructors = {  # noqa: RUF012 - as in the base class
        f"{_TAG}null": SafeConstructor.construct_yaml_null,
        f"{_TAG}bool": SafeConstructor.construct_yaml_bool,
        f"{_TAG}int": SafeConstructor.construct_yaml_int,
        f"{_TAG}float": SafeConstructor.construct_yaml_float,
        f"{_TAG}seq": SafeConstructor.construct_yaml_seq,
        f"{_TAG}map": SafeConstructor.construct_yaml_map,
        **dict.fromkeys(
            (f"{_TAG}str", f"{_TAG}timestamp", f"{_TAG}value", f"{_TAG}merge"),
            SafeConstructor.construct_yaml_str,
        ),
        None: SafeConstructor.construct_undefined,
    }

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        """The value of a node; an error with its line if the text of the node is no such value."""
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, str):
                # JSON may write a character as two halves; one alone is no character.
                return value.encode("utf-16", "surrogatepass").decode("utf-16")
        except (ValueError, LookupError):
            value = None
            problem = f"is no {str(node.tag).removeprefix(_TAG)}"
        else:
            if not isinstance(value, int) or -(2**63) <= value < 2**63:
                return value
            problem = "is no integer of 64 bits"
        raise ConstructorError(
            problem=f"{shown(node.value)} {problem}", problem_mark=node.start_mark
        )


def load(cls: type[Config], path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `a.b=value` overrides, and build the dataclass.

    Raises:
        InputError: A file, key or value is wrong; names the file and line, or the override.
    """
    values, root = _mapping(path)
    overridden: dict[tuple[str, ...], str] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        keys = tuple(key.split("."))
        if not equals or not all(keys):
            raise InputError(
                f"override {shown(override)}: expected key=value, such as train.steps=100"
            )
        parsed, node = _parse(value, f"override {shown(override)}")
        if value[node.end_mark.index if node else 0 :].strip():
            raise InputError(
                f"override {shown(override)}: what begins with # is a comment to YAML; expected "
                "the value in quotes, such as output='\"a #b\"'"
            )
        new = _assign(values, keys, parsed, override)
        overridden |= {new: override, keys: override}

    try:
        return pydantic.TypeAdapter(cls).validate_python(values)
    except pydantic.ValidationError as error:
        where, message = _explain(cls, error)
        for end in range(len(where), 0, -1):
            if override := overridden.get(tuple(map(str, where[:end])), ""):
                raise InputError(f"override {shown(override)}: {message}") from None
        line = _line(root, where)
        raise InputError(f"{path}{f':{line}' if line else ''}: {message}") from None


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The content of a YAML file that is no configuration of its own.

    Raises:
        InputError: it cannot be read, or is no mapping; names the file.
    """
    return _mapping(path)[0]


def save(config: Any, path: str | Path) -> None:
    """Write every key, defaults included, in the order of the fields."""
    yaml: Any = YAML(typ="safe", pure=True)  # its attributes have no types
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    text = io.StringIO()
    yaml.dump(_plain(dataclasses.asdict(config)), text)
    write_text_atomic(path, text.getvalue())


def _plain(value: Any) -> Any:
    """Tuples as lists: YAML has no tuples."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _mapping(path: str | Path) -> tuple[dict[str, Any], Node | None]:
    values, root = _parse(read_text(path), str(path))
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a mapping of keys to values at the top level")
    return values, root


def _parse(text: str, place: str) -> tuple[Any, Node | None]:
    """The values of a YAML text, and its tree of nodes, which knows the lines."""
    yaml: Any = YAML(typ="safe", pure=True)  # its attributes have no types
    yaml.Constructor = _Constructor
    try:
        root = yaml.compose(text)
        if root is None:
            return None, None
        _check_aliases(root)
        return yaml.constructor.construct_document(root), root
    except RecursionError:
        raise InputError(f"{place}: nested too deeply; expected valid YAML 1.2") from None
    except InputError:
        raise
    except (OverflowError, ValueError) as error:
        line, problem = _unchecked(text, error)
    except YAMLError as error:
        mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
        line = mark.line + 1 if mark else None
        problem = (error.problem if isinstance(error, MarkedYAMLError) else str(error)) or ""
    where = f"{place}:{line}" if line and not place.startswith("override") else place
    # The first line of the problem says it; the others explain YAML.
    first = (problem.strip() or "not YAML").splitlines()[0]
    raise InputError(f"{where}: {first}; expected valid YAML 1.2")


def _unchecked(text: str, error: Exception) -> tuple[int | None, str]:
    """Line and problem of a text in which the library takes an escape for a character, or digits
    for a number, without a check of its own.
    """
    for escape in _LONG_ESCAPE.finditer(text):
        if int(escape[1], 16) > sys.maxunicode:
            line = text.count("\n", 0, escape.start()) + 1
            return line, f"{escape[0]} is an escape of no Unicode character"
    return None, str(error)


def _check_aliases(root: Node) -> None:
    """Refuse aliases of what they are in, and those that make a text stand for too many values."""
    sizes: dict[int, int | None] = {}  # None: of a node that is being counted

    def size(node: Node) -> int:
        known = sizes.setdefault(id(node), 0)
        if known is None:
            raise ConstructorError(
                problem="an alias stands for what it is a part of", problem_mark=node.start_mark
            )
        if not known:
            sizes[id(node)] = None
            match node:
                case MappingNode():
                    known = 1 + sum(size(key) + size(value) for key, value in node.value)
                case SequenceNode():
                    known = 1 + sum(map(size, node.value))
                case _:
                    known = 1
            sizes[id(node)] = known
        return known

    if size(root) > _MOST_VALUES:
        raise ConstructorError(
            problem=f"aliases make more than {_MOST_VALUES:,} values of it",
            problem_mark=root.start_mark,
        )


def _assign(
    values: dict[str, Any], keys: tuple[str, ...], value: Any, override: str
) -> tuple[str, ...]:
    """Set one value; return the key that is new by it: `keys`, or a section around it."""
    new = keys
    for depth, key in enumerate(keys[:-1], 1):
        if key not in values:
            new = min(new, keys[:depth], key=len)
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise InputError(f"override {shown(override)}: {key} has no keys of its own")
    values[keys[-1]] = value
    return new


def _line(node: Node | None, keys: Sequence[str | int]) -> int:
    """Line of a key, or of the deepest key above it that is in the file; 0 for none."""
    line = 0
    for key in keys:
        if isinstance(node, MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == str(key)), None)
            if found is None:
                return line
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, SequenceNode) and isinstance(key, int) and key < len(node.value):
            node = node.value[key]
            line = node.start_mark.line + 1
    return line


def _keys(cls: type, section: Sequence[str]) -> tuple[str, ...]:
    """The keys of a section; a section may be one of several in a mapping or a list."""
    kind: Any = cls
    for key in section:
        if dataclasses.is_dataclass(kind):
            kind = typing.get_type_hints(kind)[key]
        else:  # dict[str, Section] or tuple[Section, ...]
            kind = typing.get_args(kind)[1 if typing.get_origin(kind) is dict else 0]
    return tuple(typing.get_type_hints(kind))


def _nearest(cls: type, keys: Sequence[str | int]) -> str:
    """The dotted valid key that an unknown one most probably stands for."""
    *section, unknown = map(str, keys)
    siblings = {key: ".".join([*section, key]) for key in _keys(cls, section)}
    # A key in the wrong section is the other common mistake.
    everywhere: dict[str, str] = {}
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            everywhere |= {key: f"{name}.{key}" for key in _keys(cls, [name])}
    everywhere |= {key: key for key in _keys(cls, ())}
    for candidates, cutoff in (siblings, 0.6), (everywhere, 0.6), (siblings, 0.0):
        if found := difflib.get_close_matches(unknown, candidates, n=1, cutoff=cutoff):
            return candidates[found[0]]
    raise AssertionError("every section has keys")


def _explain(cls: type, error: pydantic.ValidationError) -> tuple[Sequence[str | int], str]:
    """The keys of the first mistake, and one line about it."""
    mistakes = error.errors(include_url=False)
    # A misspelt key that is required is missing too; only the misspelling is worth a word.
    unknown = "unexpected_keyword_argument"
    mistake = next((m for m in mistakes if m["type"] == unknown), mistakes[0])
    keys: Sequence[str | int] = mistake["loc"]
    keys = keys[:-1] if keys[-1:] == ("[key]",) else keys  # the key itself is wrong
    name = ".".join(map(str, keys))
    if mistake["type"] == "unexpected_keyword_argument":
        return keys, f"unknown key {name}; did you mean {_nearest(cls, keys)}?"
    found = explain(mistake)
    if mistake["type"] == "value_error" and not keys:
        # From a check of several keys, whose message starts with the key.
        return found.partition(":")[0].split("."), found
    return keys, f"{name}: {found}"


def explain(mistake: Any) -> str:
    """What pydantic expected where it found a mistake, and what it found, in our own words."""
    match mistake["type"]:
        case "missing":
            return "this key is missing; expected a value"
        case "value_error":
            return str(mistake["ctx"]["error"])
        case "dataclass_type":
            expected = "expected a mapping of keys to values"
        case "tuple_type":
            expected = "expected a list"
        case "too_short":
            expected = "expected at least one item"
        case _:
            expected = re.sub("^(Input should be|String should have)", "expected", mistake["msg"])
    return f"{expected.replace(' should have', ': expected')}, got {shown(mistake['input'])}"
