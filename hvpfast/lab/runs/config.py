"""A configuration on the command line: an option per dataclass field, helped by its docstring."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import textwrap
import typing
from collections.abc import Callable, Mapping
from typing import Any


def field_docs(config_type: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass; none where there is no source."""
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(config_type))).body[0]
    except (OSError, TypeError, SyntaxError):
        return {}
    docs: dict[str, str] = {}
    for field, below in itertools.pairwise(body.body if isinstance(body, ast.ClassDef) else []):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=text)):
                docs[name] = " ".join(str(text).split())
    return docs


def integers(text: str) -> list[int]:
    """Parse one word of a list of integers: ``7``, or the range ``0-9`` with both ends."""
    first, dash, last = text.partition("-")
    try:
        return list(range(int(first), int(last) + 1)) if dash and first else [int(text)]
    except ValueError:
        message = f"expected an integer or a range such as 0-9, got {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def add_config_arguments(group: argparse._ActionsContainer, default: Any) -> None:
    """Add ``--field-name`` for each field of the dataclass instance; options not given are None."""
    docs, hints = field_docs(type(default)), typing.get_type_hints(type(default))
    for field in dataclasses.fields(default):
        kind = hints[field.name]
        text = f"{docs.get(field.name, '')} (default: {words(getattr(default, field.name))})"
        options: dict[str, Any] = {"dest": field.name, "help": text.strip().replace("%", "%%")}
        if typing.get_origin(kind) is typing.Literal:
            options["choices"] = typing.get_args(kind)
        else:
            options["metavar"] = field.name.rsplit("_", 1)[-1].upper()
            options["type"] = kind
        if typing.get_origin(kind) is tuple:
            options["nargs"] = "+"
            options["type"] = integers if typing.get_args(kind)[0] is int else float
        group.add_argument("--" + field.name.replace("_", "-"), **options)


def words(value: Any) -> str:
    """Return a value as it would be typed on the command line."""
    if isinstance(value, tuple):
        whole = len(value) > 2 and all(type(v) is int for v in value)
        if whole and value == tuple(range(value[0], value[-1] + 1)):
            return f"{value[0]}-{value[-1]}"
        return " ".join(map(words, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def given_arguments(args: argparse.Namespace, config_type: type) -> dict[str, Any]:
    """Return the fields given on the command line, as the dataclass wants them."""
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(config_type)}
    return {name: flatten(value) for name, value in given.items() if value is not None}


def flatten(value: Any) -> Any:
    """Turn a list of words, each a value or a list of values, into a tuple; other values pass."""
    if not isinstance(value, list):
        return value
    return tuple(v for word in value for v in (word if isinstance(word, list) else [word]))


def from_json(config_type: Callable[..., Any], stored: Mapping[str, Any]) -> Any:
    """Rebuild a configuration from config.json: JSON's lists are the dataclass's tuples."""
    return config_type(**{k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()})
