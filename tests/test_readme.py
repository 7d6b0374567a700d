"""The README tells the truth: its example, its hash and its line counts are those of this code."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def refmamba(*args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "refmamba", *args], capture_output=True, text=True, encoding="utf-8", check=True
    )
    return done.stdout


def test_the_example_is_what_the_command_prints() -> None:
    command, printed = re.search(r"    \$ refmamba (generate [^\n|]*)\n((?:    .*\n|\n)+?)(?=\S)", README).groups()  # type: ignore[union-attr]
    expected = "\n".join(line.removeprefix("    ") for line in printed.rstrip().splitlines())
    assert refmamba(*shlex.split(command)).rstrip() == expected


def test_the_hash_is_that_of_every_backend() -> None:
    found = re.findall(r'    \$ refmamba (generate [^\n]*--json[^\n]*)\n    .*"logits_sha256": "([0-9a-f]{64})"', README)
    assert len(found) >= 2
    for command, digest in found:
        assert json.loads(refmamba(*command.split()))["logits_sha256"] == digest


def test_the_reading_order_has_the_files_lines() -> None:
    rows = re.findall(r"\| \d+ \| `(refmamba/spec/\w+\.\w+)` \| (\d+) \|", README)
    room = {file.name for file in (ROOT / "refmamba" / "spec").iterdir() if file.is_file()} - {"__init__.py"}
    assert {Path(file).name for file, _ in rows} == room
    for file, lines in rows:
        assert len((ROOT / file).read_text(encoding="utf-8").splitlines()) == int(lines), file
    assert sum(int(lines) for file, lines in rows if file.endswith(".py")) < 2050
