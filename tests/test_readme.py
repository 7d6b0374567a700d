"""The README tells the truth: what it says that a command prints, it prints; and docs/READING.md has this code's files."""

import doctest
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from refmamba.commands.main import refmamba as commands

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"^    \$ refmamba (.*)\n((?:    (?!\$ ).*\n|\n(?=    (?!\$ )))*)", README, re.MULTILINE)


def refmamba(*args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "refmamba", *args], capture_output=True, text=True, encoding="utf-8", check=True
    )
    return done.stdout


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 120


def test_the_example_is_what_the_command_prints() -> None:
    command, printed = SHOWN[0]
    expected = "\n".join(line.removeprefix("    ") for line in printed.rstrip().splitlines())
    assert refmamba(*shlex.split(command)).rstrip() == expected


def test_the_hash_is_that_of_every_backend() -> None:
    found = re.findall(r'    \$ refmamba (generate [^\n]*--json[^\n]*)\n    .*"logits_sha256": "([0-9a-f]{64})"', README)
    assert len(found) >= 2
    for command, digest in found:
        assert json.loads(refmamba(*command.split()))["logits_sha256"] == digest


def test_every_command_prints_what_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other in one folder, with the kernel that is shown. `...` stands for anything."""
    kernel = re.search(r"```python\n# mykernels.py\n(.*?)```", README, re.DOTALL)
    assert kernel is not None
    (tmp_path / "mykernels.py").write_text(kernel[1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mykernels", raising=False)
    assert len(SHOWN) > 8
    for command, printed in SHOWN[1:]:
        expected = re.escape(re.sub(r"(?m)^    ", "", printed).rstrip())
        done = CliRunner().invoke(commands, shlex.split(command))
        expected = re.sub(r"(?:\\ )?\\\.\\\.\\\.(?:\\ )?", "(?s:.*)", expected)
        assert re.fullmatch(expected, done.stdout.rstrip()), done.stdout or done.exception
    monkeypatch.delitem(sys.modules, "mykernels")


def test_the_python_lines_give_what_is_shown() -> None:
    test = doctest.DocTestParser().get_doctest(README, {}, "README.md", None, None)
    assert len(test.examples) == 4
    assert doctest.DocTestRunner().run(test).failed == 0


def test_the_reading_order_has_the_files_lines() -> None:
    rows = re.findall(r"\| \d+ \| `(refmamba/spec/\w+\.\w+)` \| (\d+) \|", (ROOT / "docs" / "READING.md").read_text("utf-8"))
    room = {file.name for file in (ROOT / "refmamba" / "spec").iterdir() if file.is_file()} - {"__init__.py"}
    assert {Path(file).name for file, _ in rows} == room
    for file, lines in rows:
        assert len((ROOT / file).read_text(encoding="utf-8").splitlines()) == int(lines), file
    assert sum(int(lines) for file, lines in rows if file.endswith(".py")) < 2050
