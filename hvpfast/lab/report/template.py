"""Reports as Jinja2 templates: the prose in a file of its own, the numbers from the findings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hvpfast.lab.report import words

FUNCTIONS = ("number", "percent", "spread", "change", "effect", "interval", "p_value", "count")
"""Functions of ``words.py`` that templates have, as filters and as functions."""


def environment(folder: Path) -> Environment:
    """Return what renders the templates of a folder; they can import ``macros.md.jinja``."""
    found = Environment(
        loader=FileSystemLoader([folder, Path(__file__).parent]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown, from the study's own findings
    )
    functions = {name: getattr(words, name) for name in FUNCTIONS}
    found.filters.update(functions)
    found.globals.update(functions)
    return found


def render(path: Path, **names: Any) -> str:
    """Return the Markdown of a template, wrapped; a name that is missing is an error."""
    return words.wrap(environment(path.parent).get_template(path.name).render(names))


def render_lines(path: Path, **names: Any) -> str:
    """Return the paragraphs of a template as one line each."""
    text = environment(path.parent).get_template(path.name).render(names)
    return "\n".join(" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n"))
