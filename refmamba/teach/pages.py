"""The page: one self-contained HTML file that runs a model in the browser, with the specification's bits."""

import html
import json
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from refmamba.errors import SchemeError
from refmamba.formats.writing import write_text
from refmamba.run.session import Opened
from refmamba.spec import coders
from refmamba.spec.calibrate import passage
from refmamba.spec.scheme import NAMED, Scheme
from refmamba.spec.transforms import Hadamard, Smooth
from refmamba.teach.payload import packed, page_data, planes

WORKER = ("engine.js", "tokenizer.js", "checkpoint.js", "vectors.js", "follow.js", "lab.js", "worker.js")
PAGE = ("equations.js", "page.js")
SITES, BITS, ACT_BITS = ("mlp", "all"), range(8, 1, -1), range(16, 1, -1)
PAGE_SCHEMES = (
    *NAMED, *(f"w{n}-{sites}" for sites in SITES for n in BITS),
    *(f"w{n}a{m}-{sites}" for sites in SITES for n in BITS for m in ACT_BITS),
)  # fmt: skip
# What engine.js knows.
KNOWN = (
    coders.ParameterPerTensor, coders.ParameterPerChannel, coders.ParameterGrouped, coders.PerTensor, coders.PerToken,
    coders.Static, coders.PerTokenOutliers, coders.Flattened, Smooth, Hadamard,
)  # fmt: skip
PARAGRAPH = 600  # characters of the passage that the page measures on at first


def source(name: str) -> str:
    """A file of the page."""
    return resources.files("refmamba.teach.page").joinpath(name).read_text(encoding="utf-8")


def scripts(names: Sequence[str]) -> str:
    """Some scripts one after the other, each under its name."""
    return "\n".join(f"// ---- {name}\n{source(name)}" for name in names)


def write_page(opened: Opened, schemes: Sequence[Scheme], prompt: str, file: Path) -> None:
    """Write the page of a model. Raises RefmambaError, so SchemeError for a scheme that the page's engine does not know."""
    for scheme in schemes:
        if unknown := scheme.unknown_to(KNOWN):
            raise SchemeError(f"scheme {scheme.name}: the page does not know {unknown}; leave it out of --scheme")
    data = page_data(opened, schemes)
    parts = {
        "page.css": source("page.css"),
        "worker": scripts(WORKER),
        "page": scripts(PAGE),
        "about": html.escape(about(data["name"])),
        "prompt": html.escape(prompt),
        "paragraph": html.escape(passage()[:PARAGRAPH]),
        "data": packed(json.dumps(data).encode()),
        "weights": packed(planes(opened.float_checkpoint())),
    }
    write_text(file, re.sub(r"\{\{([\w.]+)\}\}", lambda match: parts[match[1]], source("page.html")))


def about(name: str) -> str:
    """What the page is, in a sentence or two."""
    return (
        f"This page holds the model “{name}” and runs it: every number below is computed here, with the same bits as "
        "refmamba's command line. Click a number, change it, and see what follows."
    )
