"""`refmamba scheme`: the table, and a file that is the same scheme again."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from refmamba.commands.main import refmamba
from refmamba.errors import SchemeError
from refmamba.formats.scheme import open_scheme
from refmamba.spec.scheme import NAMED, SITES, parse_scheme

NUMBERED = [f"w{n}-{what}" for n, what in itertools.product(range(2, 9), ("mlp", "all"))]
NUMBERED += [f"w{n}a{m}-{what}" for n, m, what in itertools.product((2, 4, 8), range(2, 17), ("mlp", "all"))]


def printed(*words: str) -> str:
    done = CliRunner().invoke(refmamba, ["scheme", *words])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("name", [*NAMED, *NUMBERED])
def test_the_file_is_the_same_scheme_again(name: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(printed(name, "--json"))
    assert open_scheme(str(file)) == parse_scheme(name)
    assert printed(str(file), "--json") == file.read_text()


@pytest.mark.parametrize("name", [*NAMED, "w4-mlp", "w8a16-all"])
def test_the_table_names_every_site_in_80_columns(name: str) -> None:
    lines = printed(name).splitlines()
    assert max(map(len, lines)) <= 80
    words = " ".join(lines).replace(",", " ").split()
    for site in (site for sites in SITES.values() for site in sites):
        assert site in words, site


def test_as_a_process() -> None:
    command = [sys.executable, "-m", "refmamba", "scheme", "int4"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "  weight x_proj.weight         4 bits, grouped, group 64\n" in done.stdout
    assert done.stderr == ""


def test_what_is_wrong_in_a_file_is_told_with_its_name(tmp_path: Path) -> None:
    values = json.loads(printed("int4", "--json"))
    values["weights"]["x_proj.weight"]["bits"] = 9
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(values))
    done = CliRunner().invoke(refmamba, ["scheme", str(file)])
    assert isinstance(done.exception, SchemeError)
    assert str(done.exception) == f"{file}: scheme int4: x_proj.weight has 9 bits; weights take 2 to 4"


def test_a_name_that_is_no_scheme_is_told_which_there_are() -> None:
    done = CliRunner().invoke(refmamba, ["scheme", "int5"])
    assert isinstance(done.exception, SchemeError)
    assert "unknown scheme 'int5'; there are wN-mlp" in str(done.exception)
