"""What the configurations of studies share: checks, options on the command line, the backend.

A configuration is a frozen dataclass with a docstring under each field. Each field is an option of
the command line, and its docstring the option's help. The last fields are ``root_seed``,
``backend`` and ``dtype`` in every study.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch

from hvpfast import backends
from hvpfast.lab.runs.folder import StudyError
from hvpfast.mlp.spec import MLPSpec

Activation = Literal["relu", "sigmoid", "tanh", "gelu", "gelu_tanh", "silu", "softplus"]
"""Activations of the hidden layers that a study may be asked for."""


def engine_of(config: Any, spec: MLPSpec, **more: str) -> dict[str, str]:
    """Return the backend that ``config.backend`` means for a network on the CPU, for env.json.

    Args:
        config: a study's configuration, with the fields ``backend`` and ``dtype``.
        spec: the network; a backend is chosen by its depth, activation and loss.
        more: further facts that decide the numbers.

    Returns:
        ``backend``, ``dtype``, `more`, and why each backend before the chosen one cannot be used.

    Raises:
        StudyError: the backend cannot run.
    """
    dtype, device = getattr(torch, config.dtype), torch.device("cpu")
    try:
        choice = backends.choose(config.backend, spec, device, dtype)
    except (RuntimeError, ValueError) as error:
        raise StudyError(str(error)) from error
    passed_over = {f"passed over {name}": reason for name, reason in choice.passed_over}
    return {"backend": choice.module.NAME, "dtype": config.dtype, **more, **passed_over}


def check_least(config: object, least: int, *names: str) -> None:
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name} must be at least {least}; got {getattr(config, name)}")


def check_seeds(config: object, *names: str) -> None:
    for name in names:
        seeds = getattr(config, name)
        if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
            raise ValueError(f"{name} must be different integers >= 0, at least one; got {seeds}")


def rising(values: Sequence[float]) -> bool:
    """Return whether there are values, each of them larger than the one before."""
    return bool(values) and list(values) == sorted(set(values))


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
    """Return the fields given on the command line; a list of words becomes one tuple."""
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(config_type)}
    for name, value in given.items():
        if isinstance(value, list):  # of numbers, or of the lists that `integers` makes
            parts = (word if isinstance(word, list) else [word] for word in value)
            given[name] = tuple(itertools.chain.from_iterable(parts))
    return {name: value for name, value in given.items() if value is not None}


def from_json(config_type: Callable[..., Any], stored: Mapping[str, Any]) -> Any:
    """Rebuild a configuration from config.json: JSON's lists are the dataclass's tuples."""
    return config_type(**{k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()})
