"""CONTRIBUTING.md's order of folders: imports go up the list, in no circle, to public names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TORCH_PRIVATE = "hvpfast/utils/torch_private.py"  # the one file that uses torch's private parts
# Documented in spite of their underscore: of named tuples, of torch's tensors, modules, functions.
DOCUMENTED = {"_asdict", "_fields", "_replace", "_version", "_modules", "_parameters", "_schema",
              "_foreach_add", "_foreach_mul"}  # fmt: skip


def layers() -> list[tuple[str, ...]]:
    """The rows of CONTRIBUTING.md's list, from the bottom up: paths of folders and files."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text.partition("<!-- layers")[2].partition("<!-- end of layers -->")[0]
    rows = [re.findall(r"`([^`]+)`", line.split("|")[1]) for line in table.splitlines()[4:] if line]
    return [
        tuple(name if "/" in name else row[0].rpartition("/")[0] + "/" + name for name in row)
        for row in rows
    ]


class Source:
    """One file: what it imports and which private names it takes from others."""

    def __init__(self, path: Path, root: Path, modules: dict[str, str]) -> None:
        self.path, self.modules = path.relative_to(root).as_posix(), modules
        self.tree = ast.parse(path.read_text())
        self.imports: dict[str, int] = {}  # path of the imported file: line
        self.private: list[str] = []
        names = dict(self.bindings())
        own = {name for node in ast.walk(self.tree) for name in defined(node)} | DOCUMENTED
        for node in ast.walk(self.tree):
            if self.path == TORCH_PRIVATE or not isinstance(node, ast.Attribute):
                continue
            base = ast.unparse(node.value)
            foreign = node.attr not in own or base in names
            if is_private(node.attr) and foreign and base not in {"self", "cls", "argparse"}:
                self.private.append(f"{self.path}:{node.lineno} {ast.unparse(node)}")

    def bindings(self) -> Iterator[tuple[str, str]]:
        """Names that stand for modules of the package; fills ``imports`` on the way."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name in self.modules:
                        self.imports.setdefault(self.modules[alias.name], node.lineno)
                        yield alias.asname or alias.name, alias.name
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
                if self.path != TORCH_PRIVATE:
                    self.private += [
                        f"{self.path}:{node.lineno} {node.module}.{alias.name}"
                        for alias in node.names
                        if is_private(alias.name)
                    ]
            elif isinstance(node, ast.ImportFrom) and node.module in self.modules:
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    target = whole if whole in self.modules else node.module
                    self.imports.setdefault(self.modules[target], node.lineno)
                    if whole in self.modules:
                        yield alias.asname or alias.name, whole
                    elif is_private(alias.name):
                        self.private.append(f"{self.path}:{node.lineno} {whole}")
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                name = getattr(node.args[0], "value", None)
                if name in self.modules:
                    self.imports.setdefault(self.modules[name], node.lineno)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in {"_cpu", "_cuda"}


def defined(node: ast.AST) -> Iterator[str]:
    """Names that a node gives to something: definitions, assignments, slots."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
        yield node.id if isinstance(node, ast.Name) else node.attr
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value


def sources(root: Path) -> list[Source]:
    files = sorted([*root.glob("hvpfast/**/*.py"), *root.glob("hvpfast/**/*.pyi")])
    modules = {}
    for file in files:
        parts = file.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules[name] = file.relative_to(root).as_posix()
    return [Source(file, root, modules) for file in files]


def floor(path: str, order: list[tuple[str, ...]]) -> int:
    """The row to which a file belongs: that of the longest entry that holds it."""
    fits = [
        (len(entry), i)
        for i, row in enumerate(order)
        for entry in row
        if path == entry or (entry.endswith("/") and path.startswith(entry))
    ]
    assert fits, f"{path} is in no folder of CONTRIBUTING.md's list"
    return max(fits)[1]


def upward(found: list[Source], order: list[tuple[str, ...]]) -> list[str]:
    return [
        f"{source.path}:{line} imports {target}"
        for source in found
        for target, line in source.imports.items()
        if floor(target, order) > floor(source.path, order)
    ]


def circle(found: list[Source]) -> list[str]:
    """The files of a circle of imports, if there is one."""
    try:
        TopologicalSorter({s.path: {*s.imports} - {s.path} for s in found}).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_imports_keep_to_the_order_of_folders() -> None:
    found, order = sources(ROOT), layers()
    assert len(found) > 150 and len(order) > 20
    for row in order:
        for entry in row:
            assert (ROOT / entry).exists(), f"CONTRIBUTING.md names {entry}"
    assert not upward(found, order)


def test_no_circle_of_imports() -> None:
    assert not circle(sources(ROOT))


def test_nothing_private_is_taken_from_another_file() -> None:
    assert not [line for source in sources(ROOT) for line in source.private]


def test_few_entries_at_the_top() -> None:
    entries = [p.name for p in (ROOT / "hvpfast").iterdir() if p.name != "__pycache__"]
    assert len(entries) <= 15, entries


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """Two folders, the lower one first in the order."""
    for name in ("low", "high"):
        (tmp_path / "hvpfast" / name).mkdir(parents=True)
        (tmp_path / "hvpfast" / name / "__init__.py").write_text("")
    (tmp_path / "hvpfast" / "low" / "a.py").write_text("class A:\n    _x = 1\n\n\ndef _f(): ...\n")
    return tmp_path


ORDER = [("hvpfast/low/",), ("hvpfast/high/",)]


@pytest.mark.parametrize(
    "line",
    [
        "from hvpfast.high import b",
        "import hvpfast.high.b",
        "if TYPE_CHECKING:\n    from hvpfast.high.b import B",
        "def f():\n    from hvpfast.high.b import B",
        "importlib.import_module('hvpfast.high.b')",
    ],
)
def test_an_upward_import_is_found(house: Path, line: str) -> None:
    (house / "hvpfast" / "high" / "b.py").write_text("from hvpfast.low.a import A\n")
    assert not upward(sources(house), ORDER)
    (house / "hvpfast" / "low" / "c.py").write_text(line)
    assert upward(sources(house), ORDER)


def test_a_circle_is_found(house: Path) -> None:
    low = house / "hvpfast" / "low"
    (low / "b.py").write_text("from hvpfast.low import c\n")
    assert not circle(sources(house))
    (low / "c.py").write_text("def f():\n    from hvpfast.low.b import x\n")
    assert {"hvpfast/low/b.py", "hvpfast/low/c.py"} <= {*circle(sources(house))}


@pytest.mark.parametrize(
    "line",
    [
        "from hvpfast.low.a import _f",
        "from hvpfast.low import a\na._f()",
        "from hvpfast.low.a import A\nA()._x",
        "import torch\ntorch._C._x",
        "from torch.nn.modules.batchnorm import _NormBase",
    ],
)
def test_a_private_name_is_found(house: Path, line: str) -> None:
    file = house / "hvpfast" / "high" / "b.py"
    file.write_text(line)
    assert any(source.private for source in sources(house))
    file.write_text("from hvpfast.low.a import A\n\n\nclass B:\n    _y = 1\n\n\nB()._y\n")
    assert not any(source.private for source in sources(house))
