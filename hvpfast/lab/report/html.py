"""Reports as one HTML file: the studies' Markdown, with its pictures inside; no network needed.

Understood: headings, paragraphs, lists (``- ``), tables, fences, pictures on a line of their own,
and inside a line `code`, **bold**, *italics* and links. Everything else is text.
"""

from __future__ import annotations

import base64
import html
import itertools
import re
from collections import deque
from collections.abc import Callable
from pathlib import Path

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #222; background: #fff; margin: 2rem auto;
  max-width: 68rem; padding: 0 1.2rem; }
h1, h2, h3 { line-height: 1.25; margin: 1.8em 0 0.5em; } h1 { font-size: 1.7rem; margin-top: 0; }
h2 { font-size: 1.3rem; border-bottom: 1px solid #ddd; padding-bottom: 0.2em; }
h3 { font-size: 1.1rem; }
.wide { overflow-x: auto; margin: 1em 0; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.35em 0.8em; border-bottom: 1px solid #e3e3e3; vertical-align: top; }
th { border-bottom: 2px solid #bbb; text-align: left; }
figure { margin: 1.4em 0; } img { max-width: 100%; height: auto; }
figcaption { color: #666; font-size: 0.9rem; }
code { font-family: ui-monospace, monospace; font-size: 0.9em; background: #f3f3f3;
  padding: 0 0.2em; }
pre { background: #f3f3f3; padding: 0.8em; overflow-x: auto; } pre code { padding: 0; }
"""
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
PICTURE = re.compile(r"!\[(?P<text>.*)\]\((?P<file>[^)]+)\)\s*$")
HEADING = re.compile(r"(?P<marks>#{1,6}) (?P<text>.+)$")
OTHER_BLOCKS = ("|", "- ", "#", "![", "```")
"""Starts of the lines that end a paragraph."""
KINDS = {".png": "image/png", ".jpg": "image/jpeg", ".svg": "image/svg+xml"}


def page(markdown: str, read: Callable[[str], bytes]) -> str:
    """Return the whole HTML page of a report.

    Args:
        markdown: the report.
        read: gives the bytes of a picture by the name that the report calls it.
    """
    title = re.search(r"^# (.+)$", markdown, re.MULTILINE)
    text = html.escape(title.group(1) if title else "Report")
    return PAGE.format(title=text, style=STYLE, body="\n".join(blocks(markdown, read)))


def blocks(markdown: str, read: Callable[[str], bytes]) -> list[str]:
    lines, made = deque(markdown.splitlines()), list[str]()

    def take_while(wanted: Callable[[str], bool]) -> list[str]:
        return [lines.popleft() for _ in list(itertools.takewhile(wanted, lines))]

    while lines:
        line = lines.popleft()
        if heading := HEADING.match(line):
            size = len(heading["marks"])
            made.append(f"<h{size}>{inline(heading['text'])}</h{size}>")
        elif picture := PICTURE.match(line):
            made.append(figure(picture["text"], picture["file"], read))
        elif line.startswith("```"):
            code = "\n".join(take_while(lambda text: not text.startswith("```")))
            made.append(f"<pre><code>{html.escape(code)}</code></pre>")
            if lines:
                lines.popleft()
        elif line.startswith("|"):
            made.append(table([line, *take_while(lambda text: text.startswith("|"))]))
        elif line.startswith("- "):
            made.append(bullets([line, *take_while(lambda text: text.startswith(("- ", "  ")))]))
        elif line.strip():
            rest = take_while(lambda text: bool(text.strip()) and not text.startswith(OTHER_BLOCKS))
            made.append(f"<p>{inline(' '.join([line, *rest]))}</p>")
    return made


def bullets(lines: list[str]) -> str:
    """Return a list; an indented line continues its item."""
    items: list[str] = []
    for line in lines:
        if line.startswith("- "):
            items.append(line[2:])
        else:
            items[-1] += " " + line.strip()
    return "<ul>\n" + "\n".join(f"<li>{inline(item)}</li>" for item in items) + "\n</ul>"


def table(lines: list[str]) -> str:
    """Return a table: head, a line of dashes that aligns the columns, body."""
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])] for line in lines]
    headed = len(rows) > 1 and set("".join(rows[1])) <= set("-: ")
    dashes = rows.pop(1) if headed else []
    sides = [' style="text-align: right"' if cell.endswith(":") else "" for cell in dashes]
    made = []
    for i, row in enumerate(rows):
        kind = "th" if headed and i == 0 else "td"
        if any(row) or kind == "td":  # a head of empty cells is how Markdown writes no head
            pairs = zip(row, itertools.chain(sides, itertools.repeat("")), strict=False)
            cells = [f"<{kind}{side}>{inline(cell)}</{kind}>" for cell, side in pairs]
            made.append(f"<tr>{''.join(cells)}</tr>")
    return '<div class="wide"><table>\n' + "\n".join(made) + "\n</table></div>"


def figure(text: str, file: str, read: Callable[[str], bytes]) -> str:
    kind = KINDS[Path(file).suffix.lower()]
    source = f"data:{kind};base64,{base64.b64encode(read(file)).decode()}"
    image = f'<img alt="{html.escape(text)}" src="{source}">'
    return f"<figure>{image}<figcaption>{inline(text)}</figcaption></figure>"


def inline(text: str) -> str:
    """Return a line's HTML: code, bold, italics, links."""
    parts = re.split(r"`([^`]+)`", text.replace("\\|", "|"))
    return "".join(
        f"<code>{html.escape(part)}</code>" if i % 2 else styled(html.escape(part))
        for i, part in enumerate(parts)
    )


def styled(text: str) -> str:
    """Return escaped text with its bold, italics and links as HTML."""
    text = re.sub(r"\*\*(\S(?:.*?\S)?)\*\*", r"<strong>\1</strong>", text)
    text = re.sub(r"(?<![\w*])\*(\S(?:[^*]*\S)?)\*(?![\w*])", r"<em>\1</em>", text)
    return re.sub(r"\[([^\]]+)\]\((https?://[^)\s]+|[\w./-]+)\)", r'<a href="\2">\1</a>', text)
