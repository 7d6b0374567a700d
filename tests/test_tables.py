"""Tables of what the specification holds, and that a notebook shows them."""

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refmamba
from refmamba.spec.codes import Codes
from refmamba.spec.scheme import NAMED, parse_scheme
from refmamba.spec.trace import Trace
from refmamba.teach.ipython import SHOWN
from refmamba.teach.tables import ROWS, STEPS, VALUES, table_of

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"
PROMPT = "The old man"


def trace(scheme: str) -> Trace:
    return refmamba.load("small", scheme=scheme, backend="reference").trace(PROMPT)


@pytest.mark.parametrize("scheme", [*NAMED, "w8a4-all"])
def test_a_scheme_s_table_has_every_quantizer(scheme: str) -> None:
    value = parse_scheme(scheme)
    count = sum(len(part) for part in (value.weights, value.inputs, value.outputs, value.smooth, value.rotate))
    assert len(table_of(value).rows) == count
    assert scheme in table_of(value).title


def test_codes_have_their_scale_and_what_they_use() -> None:
    codes = Codes(np.array([[1, -1, 0, 127], [0, 0, 0, 5]], np.int8), np.array([[2.5], [0.5]], np.float32), 8)
    assert table_of(codes).rows == (("0", "2.5", "4", "25.0 %", "1 -1 0 127"), ("1", "0.5", "2", "75.0 %", "0 0 0 5"))
    assert "2 x 4 codes of 8 bits, −127 to 127, a scale for each row" in str(table_of(codes))
    vector = Codes(np.array([3, 0], np.int8), np.array(4, np.float32), 8)
    assert table_of(vector).rows == (("0", "4.0", "2", "50.0 %", "3 0"),)


def test_codes_in_groups_are_shown_times_their_steps() -> None:
    q = np.ones((1, 32), np.int8)
    codes = Codes(q, np.ones((1, 1), np.float32), 4, np.array([[3, 5]], np.uint8), 16)
    assert table_of(codes).rows[0][-1] == "3 3 3 3 3 3 3 3 …"
    assert "a whole step for each 16 columns" in table_of(codes).title


@pytest.mark.parametrize("scheme", ["fp32", "int8", "int8-static", "int4", "llm-int8", "w8a8-all"])
def test_a_step_s_error_is_that_of_reading_back(scheme: str) -> None:
    forward = trace(scheme)
    for step in forward.layer(1):
        shown = table_of(step)
        codes, x = step.result, step.arguments[0]
        if step.operation in ("code", "code_static"):
            scales = np.broadcast_to(codes.scale, (len(x), 1)).astype(np.float64)
            assert [np.float32(row[1]) for row in shown.rows] == scales.ravel().tolist()
        elif step.operation == "fixed_point":
            scales = 2.0 ** codes.exponent[:, None].astype(np.float64)
            assert [row[1] for row in shown.rows] == [f"2^{exponent}" for exponent in codes.exponent]
        else:
            assert all(row[1:3] == ("", "") for row in shown.rows)
            continue
        lost, size = np.sum((codes.q / scales - x) ** 2, axis=1), np.sum(x.astype(np.float64) ** 2, axis=1)
        expected = np.sqrt(lost / np.where(size, size, 1))  # a token without outliers has none to lose
        assert [float(row[2].split()[0]) for row in shown.rows] == pytest.approx((100 * expected).tolist(), rel=6e-3)


def test_a_trace_has_a_row_for_each_step_up_to_some() -> None:
    forward = trace("int8")
    assert len(table_of(forward).rows) == STEPS
    assert table_of(forward).rest == f"and {len(forward) - STEPS} more steps: trace.layer(3) has those of a layer"
    layer = table_of(forward.layer(2))
    assert [row[2] for row in layer.rows] == [step.sites[0] for step in forward.layer(2)]
    assert layer.rest == ""


def test_a_weight_s_table_is_short() -> None:
    weight = trace("int8").step("layers.0.in_proj.acc").arguments[1]
    shown = table_of(weight)
    assert len(shown.rows) == ROWS
    assert shown.rest == f"and {len(weight.q) - ROWS} more rows"
    assert all(len(row[-1].split()) == VALUES + 1 for row in shown.rows)


def test_html_is_escaped_and_has_every_cell() -> None:
    shown = table_of(parse_scheme("fp32"))
    assert shown.html() == (
        "<table><caption>scheme fp32: nothing is quantized</caption>"
        "<thead><tr><th>what</th><th>where</th><th>bits</th><th>scale</th></tr></thead><tbody></tbody></table>"
    )
    named = table_of(refmamba.Scheme("<b>"))
    assert "scheme &lt;b&gt;" in named.html()


def test_what_has_no_table_is_named() -> None:
    with pytest.raises(TypeError, match="there is no table of a list"):
        table_of([])


def test_every_class_that_a_notebook_shows_is_there() -> None:
    for module, names in SHOWN.items():
        for name in names:
            assert isinstance(getattr(importlib.import_module(module), name), type)


def test_ipython_shows_a_table_and_loads_nothing_before() -> None:
    pytest.importorskip("IPython", reason="pip install 'refmamba[test]'")
    code = """if True:
        import sys
        from IPython.core.interactiveshell import InteractiveShell
        shell = InteractiveShell.instance()
        import refmamba
        assert "refmamba.teach.tables" not in sys.modules
        shown, _ = shell.display_formatter.format(refmamba.load("small", scheme="int8").scheme)
        assert shown["text/plain"].startswith("scheme int8"), shown
        assert shown["text/html"].startswith("<table><caption>scheme int8</caption>"), shown
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def said(notebook: Any) -> list[list[Any]]:
    """What every cell of code gave: texts, tables, and what it printed."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [[output.get("data", output.get("text")) for output in cell.outputs] for cell in cells]


@pytest.mark.ci
@pytest.mark.filterwarnings("default")  # of the libraries that run notebooks
def test_the_notebook_gives_what_it_shows() -> None:
    reason = "pip install 'refmamba[test]'"
    nbformat, nbclient = pytest.importorskip("nbformat", reason=reason), pytest.importorskip("nbclient", reason=reason)
    pytest.importorskip("ipykernel", reason=reason)
    written = nbformat.read(NOTEBOOK, as_version=4)
    run = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(run, timeout=300, kernel_name="python3").execute()
    assert said(run) == said(written)
    assert sum("text/html" in output for outputs in said(written) for output in outputs) > 5
