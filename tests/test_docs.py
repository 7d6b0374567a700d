"""The documents name what is there (files, equations, code, who may import whom), and print what their commands print."""

import ast
import doctest
import importlib
import re
import shlex
from functools import cache
from pathlib import Path
from urllib.parse import parse_qs

import pytest
from click.testing import CliRunner
from test_imports import RULES

from refmamba.commands.main import refmamba as command
from refmamba.run.session import ModelChoice, open_model
from refmamba.spec.scheme import parse_scheme
from refmamba.teach.follow import Follower
from refmamba.teach.forwards import follow

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    "README.md",
    "benchmarks/README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(str(file.relative_to(ROOT)) for file in (ROOT / "docs").rglob("*.md")),
]
FOLDERS = "refmamba|backends|eval_tasks|tests|tools|benchmarks|docs"
SPEC = (ROOT / "docs" / "SPEC.md").read_text("utf-8")
GLOSSARY = (ROOT / "docs" / "GLOSSARY.md").read_text("utf-8")
RUNS = re.compile(r"^```(pycon|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\$ refmamba (.*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)
PAGE = (ROOT / "refmamba" / "teach" / "page" / "page.html").read_text("utf-8")
# Those that calibrate, or measure a text under several schemes.
MINUTES = {"docs/course/5-outliers.md", "docs/course/6-three-remedies.md"}


def paths(document: str) -> set[Path]:
    """Every file or folder of this repository that a document links to, or names in backquotes; NAME stands for any."""
    text = (ROOT / document).read_text("utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)\)", text) if ":" not in link]
    named = re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", text)
    return {(ROOT / document).parent / link for link in links} | {ROOT / name for name in named if "NAME" not in name}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_exists(document: str) -> None:
    assert [str(path.relative_to(ROOT)) for path in sorted(paths(document)) if not path.exists()] == []


def test_the_readme_has_paths() -> None:
    assert ROOT / "docs" / "PAPER.md" in paths("README.md")
    assert ROOT / "benchmarks" / "results" / "cpu.png" in paths("README.md")


def rows(text: str) -> list[list[str]]:
    """The cells of every table's rows, headings and rules left out."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def exists(name: str) -> bool:
    """Whether `spec.codes.Codes.scale` is there: a module, a function, a class, or a class's method or field."""
    parts = ["refmamba", *name.split(".")]
    for end in range(len(parts), 0, -1):
        try:
            value: object = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            if part in getattr(value, "__annotations__", {}):
                return part == parts[-1]
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return True
    return False


def test_the_glossary_names_code_that_exists() -> None:
    names = set(re.findall(r"\| `([a-z]\w*(?:\.\w+)+)` \|", GLOSSARY))
    assert len(names) > 50
    assert [name for name in sorted(names) if not exists(name)] == []
    assert not exists("spec.codes.Codes.nothing")
    assert not exists("spec.ops.nothing")


def test_the_glossary_s_equations_and_sections_are_the_specification_s() -> None:
    equations = set(re.findall(r"  \((\d+)\)$", SPEC, re.MULTILINE))
    sections = set(re.findall(r"^## (\d+)\. ", SPEC, re.MULTILINE))
    columns: dict[str, int] = {}
    cited = []
    for row in rows(GLOSSARY):
        if "meaning" in row:
            columns = {title: i for i, title in enumerate(row)}
        elif "SPEC" in columns and row[columns["SPEC"]]:
            cited += row[columns["SPEC"]].split(", ")
    assert len(cited) > 40
    assert [place for place in cited if place.strip("()") not in (equations if place.startswith("(") else sections)] == []


def test_the_table_of_imports_is_the_one_that_is_tested() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("| room | may import |")[2].partition("\n\n")[0]
    written = {room.strip("`"): set(re.findall(r"`([\w.]+)`", allowed)) for room, allowed in rows(table)}
    assert written == RULES


def test_every_table_that_contributing_names_is_in_its_file() -> None:
    """`NAMES` of `tests/test_conformance.py`: the table is in that file, in whichever room it is."""
    named = re.findall(r"`([A-Z_]{4,})`[^.;`]* (?:of|in) `([\w/]+\.py)`", (ROOT / "CONTRIBUTING.md").read_text("utf-8"))
    assert len(named) > 5
    for table, file in named:
        tree = ast.parse((ROOT / file).read_text("utf-8"))
        assert table in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}, f"{table} in {file}"


# -------------------------------------------------------------------------------- what a document runs, and what it prints


def prints(words: str) -> str:
    """What `refmamba` with these words of a shell's line prints, run in this process."""
    done = CliRunner().invoke(command, shlex.split(words), catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return done.stdout


def examples(text: str) -> list[doctest.Example]:
    """What a document runs, in order: blocks of Python's prompt, and the `$ refmamba ...` of a shell's, with their outputs."""
    listed = []
    for block in RUNS.finditer(text):
        line = text.count("\n", 0, block.start(2))
        if block[1] == "pycon":
            parsed = doctest.DocTestParser().get_examples(block[2])
        else:
            parsed = [
                doctest.Example(f"print(prints({match[1]!r}), end='')", match[2], lineno=block[2].count("\n", 0, match.start()))
                for match in COMMAND.finditer(block[2])
            ]
        for example in parsed:
            example.lineno += line
        listed += parsed
    return listed


def failures(document: str, text: str) -> str:
    """What a document prints otherwise than it says, in words."""
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.REPORT_UDIFF)
    runner.run(doctest.DocTest(examples(text), {"prints": prints}, document, str(ROOT / document), 0, text), out=report.append)
    return "".join(report)


def runs() -> list[object]:
    """The documents that have something to run; those that take long are marked."""
    documents = [document for document in DOCUMENTS if RUNS.search((ROOT / document).read_text("utf-8"))]
    return [pytest.param(document, marks=[pytest.mark.ci] * (document in MINUTES)) for document in documents]


@pytest.mark.parametrize("document", runs())
def test_a_document_prints_what_it_says(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder of its own, where it makes the figures that stand beside it under the same names."""
    text = (ROOT / document).read_text("utf-8")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)
    assert failures(document, text) == ""
    shown = {Path(link).name for link in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)}
    assert {file.name for file in tmp_path.iterdir()} == shown


def test_an_output_that_is_not_the_text_s_is_found() -> None:
    block = "```{}\n{}\n```\n"
    right = block.format("pycon", ">>> n = 2\n>>> n + 1\n3") + block.format("console", "$ refmamba step --op embedding\n{}")
    right = right.replace("{}\n", prints("step --op embedding"))
    assert len(examples(right)) == 3
    assert failures("right", right) == ""
    for part, other in (("\n3\n", "\n4\n"), ("token 3", "token 2"), ("  value", " value")):
        assert right.count(part) == 1
        assert failures("wrong", right.replace(part, other)).count("Failed example") == 1


@cache
def followed(scheme: str) -> Follower:
    """The forward that the page opens with."""
    small = open_model(ModelChoice("small"))
    return follow(small, parse_scheme(scheme), small.tokenizer.encode_array("Once upon a time"))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_into_the_page_opens_something(document: str) -> None:
    text = (ROOT / document).read_text("utf-8")
    for fragment in re.findall(r"page\.html#([^)`\s]+)", text):
        if "op=" not in fragment:
            assert f'id="{fragment}"' in PAGE, fragment
            continue
        values = {name: value for name, (value,) in parse_qs(fragment).items()}
        site = f"layers.{values['layer']}.{values['op']}" if "layer" in values else values["op"]
        follower = followed(values["scheme"])
        assert site in follower.sites, fragment
        follower.at(site, int(values["token"]), int(values["channel"]))  # raises for one that is not there
