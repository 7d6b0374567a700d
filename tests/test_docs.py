"""The documents name what is there: files, tests, equations, code, and the table of who may import whom."""

import ast
import importlib
import re
from pathlib import Path

import pytest
from test_imports import RULES

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    "README.md",
    "benchmarks/README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md")),
]
FOLDERS = "refmamba|backends|eval_tasks|tests|tools|benchmarks|docs"
SPEC = (ROOT / "docs" / "SPEC.md").read_text("utf-8")
GLOSSARY = (ROOT / "docs" / "GLOSSARY.md").read_text("utf-8")


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
