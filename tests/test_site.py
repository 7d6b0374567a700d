"""The documentation site: built without a warning, and every link in it leads somewhere."""

import os
import re
import subprocess
import sys
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

from refmamba.commands.main import COMMANDS

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings")
pytestmark = pytest.mark.ci
ROOT = Path(__file__).resolve().parents[1]


class Page(HTMLParser):
    """What a page links to, its places, and its text."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.places: set[str] = {""}
        self.text = ""
        self.feed(file.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.add(value)
            if name in ("id", "name") and value:
                self.places.add(value)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return {file.relative_to(folder): Page(file) for file in folder.rglob("*.html")}


def test_every_link_leads_somewhere(site: dict[Path, Page]) -> None:
    """Within the site, a page and a place on it; nothing that a page shows is loaded from elsewhere."""
    broken = defaultdict(list)
    for file, page in site.items():
        if file.name in ("404.html", "page.html"):  # one is shown anywhere; the other makes its links as it runs
            continue
        for link in page.links:
            target, place = urldefrag(link)
            if re.match(r"[a-z]+:", target):
                continue
            path = Path(os.path.normpath(file.parent / unquote(target))) if target else file
            known = site.get(path)
            if target.endswith(".html") or not target:
                own = path.name == "page.html" or place.startswith("__")  # places that are made as the page runs
                right = known is not None and (own or unquote(place) in known.places)
            else:
                right = target in (".", "..") or path.suffix in (".css", ".js", ".png", ".svg", ".xml", ".ipynb")
            if not right:
                broken[str(file)].append(link)
    assert dict(broken) == {}


def test_the_reference_is_there(site: dict[Path, Page]) -> None:
    """Every command's --help, and what `import refmamba` offers; the page that runs the model; formulas as they stand."""
    commands, python, spec = (site[Path(name)] for name in ("commands.html", "python.html", "SPEC.html"))
    for command in COMMANDS:
        assert f"Usage: refmamba {command} " in commands.text
    for name in ("load", "run.model.Model.generate_batch", "backend.Runner.restore_state", "errors.NonFiniteError"):
        assert f"refmamba.{name}" in python.places
    assert "model.generate(" in python.text
    assert ">>> >>>" not in python.text
    assert "exp(x) = (((p·(r·r) + r) + 1) · 2^⌊n/2⌋) · 2^(n − ⌊n/2⌋)" in spec.text
    assert Path("page.html") in site
