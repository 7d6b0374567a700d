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
from refmamba.spec.scheme import NAMED, Scheme, parse_scheme
from refmamba.spec.transforms import Hadamard, Smooth
from refmamba.teach.payload import packed, page_data, planes, recorded_data, why_not

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
PIECE = 2**17  # characters of the weights in one element
PARAGRAPH = 600  # characters of the passage that the page measures on at first


def source(name: str) -> str:
    """A file of the page."""
    return resources.files("refmamba.teach.page").joinpath(name).read_text(encoding="utf-8")


def scripts(names: Sequence[str]) -> str:
    """Some scripts one after the other, each under its name, in ASCII."""
    text = "\n".join(f"// ---- {name}\n{source(name)}" for name in names)
    return text.encode("ascii", "backslashreplace").decode()


def write_page(opened: Opened, schemes: Sequence[Scheme] | None, prompt: str, file: Path) -> str | None:
    """Write the page of a model. schemes: that it offers; None: every built-in one.

    Of a model that the page cannot run it holds the recorded forwards of the prompt, under `fp32` beside the schemes (None:
    `int8`). Returns why, in words; None for a page that runs its model. Raises RefmambaError, so SchemeError for a scheme that
    the page's engine does not know.
    """
    reason = why_not(opened)
    if schemes is None:
        schemes = [parse_scheme(name) for name in (PAGE_SCHEMES if reason is None else ("int8",))]
    for scheme in schemes:
        if unknown := scheme.unknown_to(KNOWN):
            raise SchemeError(f"scheme {scheme.name}: the page does not know {unknown}; leave it out of --scheme")
    if reason is None:
        data, carried = page_data(opened, schemes), planes(opened.float_checkpoint())
    else:
        plain = [parse_scheme("fp32")] if "fp32" not in [scheme.name for scheme in schemes] else []
        data, carried = recorded_data(opened, [*plain, *schemes], prompt)
    parts = {
        "page.css": source("page.css"),
        "worker": scripts(WORKER),
        "page": scripts(PAGE),
        "about": html.escape(about(data["name"], reason)),
        "prompt": html.escape(prompt),
        "paragraph": html.escape(passage()[:PARAGRAPH]),
        "data": packed(json.dumps(data).encode()),
        "weights": pieces(packed(carried)),
    }
    page = re.sub(r"\{\{([\w.]+)\}\}", lambda match: parts[match[1]], source("page.html"))
    # In ASCII a browser keeps the text at one byte a character, and decodes the whole of it in half the time.
    write_text(file, page.encode("ascii", "xmlcharrefreplace").decode())
    return reason


def pieces(text: str) -> str:
    """A long text in many elements, so that a browser can paint while it reads them."""
    parts = (text[at : at + PIECE] for at in range(0, len(text), PIECE))
    return "\n".join(f'<script type="text/plain" class="weights">{part}</script>' for part in parts)


def about(name: str, reason: str | None) -> str:
    """What the page is, in a sentence or two. reason: why it does not run its model."""
    if reason is not None:
        return (
            f"This page holds what refmamba's reference computed for the beginning of one prompt with the model “{name}”, "
            f"number by number. It does not run the model: {reason}. Its engine checks itself on the test vectors all the same."
        )
    return (
        f"This page holds the model “{name}” and runs it: every number below is computed here, with the same bits as "
        "refmamba's command line. Click a number, change it, and see what follows."
    )
