"""What `make site` needs beside the pages in docs/: a hook of mkdocs, and an extension of griffe, which reads the docstrings.

It makes the pages that have their source elsewhere: the README and its like, the commands from their --help, the Python face
from its docstrings, and the interactive page.
"""

import posixpath
import re
import tempfile
from pathlib import Path
from typing import Any

import click
import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from refmamba.commands.main import COMMANDS
from refmamba.commands.main import refmamba as group

ROOT = Path(__file__).resolve().parents[1]
# Files of the repository, and the pages that they become.
PAGES = {
    "README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks.md", "tests/vectors/README.md": "vectors.md",
}  # fmt: skip
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
# What `import refmamba` offers, and what its methods give; then what a backend is.
FACE = (
    "load", "quantize", "run.model.Model", "run.generate.Generation", "run.generate.Context", "run.generate.Chosen",
    "run.generate.Likely", "run.perplexity.Perplexity", "spec.scheme.Scheme", "spec.config.MambaConfig", "spec.trace.Trace",
    "spec.trace.Step", "errors",
)  # fmt: skip
PROTOCOL = ("backend.Backend", "backend.Runner", "backend.State")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The course's pages, in order, where there are any."""
    course = sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs" / "course").glob("*.md"))
    if course and config.nav:
        overview = [page for page in course if page.endswith("README.md")]
        config.nav.insert(3, {"The course": overview + [page for page in course if page not in overview]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that have their source elsewhere, and the pictures that they show."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=moved(source, files, config)))
    files.append(File.generated(config, "commands.md", content=commands()))
    files.append(File.generated(config, "python.md", content=python()))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        group.main(["step", "--html", str(file)], standalone_mode=False)
        files.append(File.generated(config, "page.html", content=file.read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links lead to the site's pages; and a list may follow a paragraph at once, as everywhere but in Python-Markdown."""
    if page.file.src_uri not in PAGES.values():
        markdown = linked(markdown, f"docs/{page.file.src_uri}")
    lines: list[str] = []
    for line in markdown.split("\n"):
        before = lines[-1] if lines else ""
        if re.match(r"(-|\d+\.) ", line) and before.strip() and not re.match(r"(-|\d+\.) |\s", before):
            lines.append("")
        lines.append(line)
    return "\n".join(lines)


def moved(source: str, files: Files, config: MkDocsConfig) -> str:
    """A file of the repository as a page of the site; its pictures are added to the files."""
    text = (ROOT / source).read_text("utf-8")
    for image, _, target, _ in LINK.findall(text):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if image and not path.startswith("docs/") and not files.get_file_from_path(path):
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return linked(text, source)


def linked(text: str, source: str) -> str:
    """The text with its links to files of the repository as links between pages; what is no page stays as its name alone."""

    def page(match: re.Match[str]) -> str:
        image, words, target, anchor = match.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        here = PAGES.get(source, source.removeprefix("docs/"))
        place = PAGES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else path if image else None)
        if "://" in target or not (ROOT / path).exists():
            return match[0]
        if place is None:
            return words
        return f"{image}[{words}]({posixpath.relpath(place, posixpath.dirname(here) or '.')}{anchor or ''})"

    return LINK.sub(page, text)


def commands() -> str:
    """Every command's --help."""
    parts = ["# Commands", "What `refmamba COMMAND --help` prints. INSTALL.md says how a shell completes commands and options."]
    for name in COMMANDS:
        command = group.get_command(click.Context(group), name)
        assert command is not None
        context = click.Context(command, info_name=f"refmamba {name}", max_content_width=100, terminal_width=100)
        parts += [f"## {name}", f"```text\n{command.get_help(context)}\n```"]
    return "\n\n".join(parts) + "\n"


def python() -> str:
    """What mkdocstrings then fills in."""
    parts = ["# Python", "## What `import refmamba` offers", *(f"::: refmamba.{name}" for name in FACE)]
    parts += ["## What a backend is", *(f"::: refmamba.{name}" for name in PROTOCOL)]
    return "\n\n".join(parts) + "\n"


class Doctests(griffe.Extension):
    """Examples in docstrings, `>>> ...`, become blocks of code: Markdown would take them for quotations."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Every object that was read."""
        if obj.docstring is not None:
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"(?m)^>>> (?:.|\n(?!\n|\Z))*", lambda match: f"```pycon\n{match[0]}\n```", text)
