"""What an installation says of itself: ``hvpfast info``, and the sources that it runs from."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

import hvpfast as hf
from hvpfast import __main__ as cli
from hvpfast.lab import environment


def test_the_checkout_holds_the_package() -> None:
    assert environment.checkout() / "hvpfast" / "__init__.py" == Path(hf.__file__).resolve()


def test_info_says_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["backends"]["reference"] is None
    assert facts["versions"]["torch"] == environment.version("torch")
    assert facts["machine"]["cores"] >= 1
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert "backend reference" in text
    assert "threads" in text


def test_results_in_a_checkout_are_no_change_of_the_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "hvpfast" / "lab" / "environment.py"
    module.parent.mkdir(parents=True)
    module.write_text("1\n")
    monkeypatch.setattr(environment, "__file__", str(module))
    assert environment.source() is None
    author = ("-c", "user.name=a", "-c", "user.email=a@b")
    for command in (["init"], ["add", "."], [*author, "commit", "-m", "first"]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True, capture_output=True)
    (tmp_path / "bench.json").write_text("{}")
    found = environment.source()
    assert found is not None and len(found["commit"]) == 40 and not found["dirty"]
    module.write_text("2\n")
    assert environment.source() == {"commit": found["commit"], "dirty": True}


def test_info_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hvpfast.backends._cpu", None)
    facts = environment.collect()
    assert facts["cpu kernels"] == {}
    facts["backends"] = {"cpu": "the extension is missing", "reference": None}
    facts["gpu"] = [{"name": "T", "compute capability": "9.0", "memory GiB": 80.0}]
    text = environment.text(facts)
    assert "not available: the extension is missing" in text
    assert "T, compute capability 9.0, 80.0 GiB" in text


def test_info_of_the_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.cuda_models, "engine", lambda: "built without CUDA")
    assert environment.collect()["cuda kernels"] == {}
    engine = types.SimpleNamespace(cuda_version=13020, matrix_products=lambda: "own tiles; because")
    monkeypatch.setattr(environment.cuda_models, "engine", lambda: engine)
    text = environment.text(environment.collect())
    assert "CUDA kernels: toolkit" in text
    assert "CUDA 13.2" in text
    assert "own tiles; because" in text
