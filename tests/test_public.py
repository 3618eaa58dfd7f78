"""What others rely on: names, help, words in the README, and no engine's name inside of passes."""

from __future__ import annotations

import inspect
import io
import re
import tokenize
from pathlib import Path

import click
import pytest

import qpass
from qpass.cli import main
from qpass.targets import TARGETS
from tests.jobs import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PASSES = sorted((ROOT / "qpass" / "passes").rglob("*.py"))
COMMANDS = sorted(main.commands.items())


def test_public_names() -> None:
    assert sorted(qpass.__all__) == [
        "Report", "__version__", "calibrate", "compare", "lint", "load_target", "optimize", "plan",
        "verify",
    ]  # fmt: skip
    for name in qpass.__all__:
        found = getattr(qpass, name)
        assert name == "__version__" or inspect.getdoc(found)


def test_commands() -> None:
    assert [name for name, _ in COMMANDS] == [
        "calibrate", "compare", "inspect", "lint", "merge", "optimize", "plan", "targets", "verify",
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_every_command_and_option_has_help(name: str, command: click.Command) -> None:
    assert command.help
    assert f"qpass {name}" in README
    options = [p for p in command.params if isinstance(p, click.Option)]
    assert [p.name for p in options if not p.help] == []


def test_readme_speaks_of_every_target_and_no_unknown_option() -> None:
    assert [name for name in TARGETS if f"`{name}`" not in README] == []
    known = {text for _, command in COMMANDS for p in command.params for text in p.opts}
    for line in re.findall(r"qpass (?:optimize|plan|calibrate|verify) .*", README):
        used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", line))
        assert used <= known, line


@pytest.mark.parametrize("path", PASSES, ids=lambda path: path.stem)
def test_no_pass_knows_an_engine(path: Path) -> None:
    """Names of engines may stand in comments and docstrings, which say why; never in code."""
    names = re.compile(r"ort[-_]x86|ort[-_]arm|openvino|tensorrt|qnn|vitis|onnxruntime", re.I)
    code = path.read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        docstring = token.type == tokenize.STRING and token.string.startswith(('"""', 'r"""'))
        if token.type == tokenize.COMMENT or docstring:
            continue
        # onnxruntime computes constants in `constant_folding`: a tool there, not a target.
        if "import onnxruntime as ort" in token.line:
            continue
        assert not names.search(token.string), f"{path.name}:{token.start[0]}: {token.line}"


def test_no_pass_looks_at_targets() -> None:
    wrong = re.compile(r"^\s*from qpass\.(targets|rounds|pipeline)\b", re.M)
    assert [path.name for path in PASSES if wrong.search(path.read_text())] == []
