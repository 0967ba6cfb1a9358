"""Reports as one HTML file: every picture inside, every table, nothing from a network."""

from __future__ import annotations

import base64
from html.parser import HTMLParser

from hvpfast.lab.report.html import page

REPORT = """# A < B & *what* follows

**Yes.** The mean is `a*b*c` lower,
see [the record](records.jsonl).

| | x | word |
| --- | ---: | --- |
| ‖H‖² | **1** | a \\| b |
| <b> | −2 | |

| | |
| --- | --- |
| system | Linux |

- One item,
  continued
- *Two*: 2 * 3 * 4

![Curves of "all" seeds](curves.png)
```
x < 1
```
Last words.
"""


class Outline(HTMLParser):
    """Checks that tags nest, and collects them."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_report_becomes_one_page() -> None:
    picture = b"\x89PNG picture"
    text = page(REPORT, {"curves.png": picture}.__getitem__)
    outline = Outline()
    outline.feed(text)
    assert outline.open == []
    count = {tag: outline.tags.count(tag) for tag in ("h1", "p", "table", "tr", "li", "img", "pre")}
    assert count == {"h1": 1, "p": 2, "table": 2, "tr": 4, "li": 2, "img": 1, "pre": 1}
    assert "<title>A &lt; B &amp; *what* follows</title>" in text
    assert "<h1>A &lt; B &amp; <em>what</em> follows</h1>" in text
    assert "<p><strong>Yes.</strong> The mean is <code>a*b*c</code> lower, see <a href=" in text
    assert '<td style="text-align: right"><strong>1</strong></td><td>a | b</td>' in text
    assert "<td>&lt;b&gt;</td>" in text
    assert "<li>One item, continued</li>" in text
    assert "<li><em>Two</em>: 2 * 3 * 4</li>" in text
    assert "<pre><code>x &lt; 1</code></pre>" in text
    assert f"data:image/png;base64,{base64.b64encode(picture).decode()}" in text
    assert 'alt="Curves of &quot;all&quot; seeds"' in text
    assert text.count("<p>Last words.</p>") == 1


def test_nothing_comes_from_a_network() -> None:
    outline = Outline()
    outline.feed(page(REPORT, lambda name: b""))
    assert not {"script", "link", "iframe"} & set(outline.tags)
    addresses = [value for name, value in outline.attributes if name in ("src", "href")]
    assert [str(value).split(",")[0] for value in addresses] == [
        "records.jsonl", "data:image/png;base64"
    ]  # fmt: skip


def test_a_report_without_a_heading_has_a_title() -> None:
    assert "<title>Report</title>" in page("words", lambda name: b"")
