"""docs/SPEC.md and the code cite the same equations; its figures, and docs/FORMAT.md's names, are those of the code."""

import json
import re
from pathlib import Path

import numpy as np

from refmamba.formats import checkpoint
from refmamba.spec import SPEC_VERSION, arith
from refmamba.spec.coders import CODERS
from refmamba.spec.scheme import BITS, OPTIONS, SITES, scheme_from_json

ROOT = Path(__file__).resolve().parents[1]
SPEC = (ROOT / "docs" / "SPEC.md").read_text("utf-8")
FORMAT = (ROOT / "docs" / "FORMAT.md").read_text("utf-8")
NUMBERED = [int(n) for n in re.findall(r"  \((\d+)\)$", SPEC, re.MULTILINE)]
CITATION = re.compile(r"[Ee]q\. \((\d+(?:, \d+)*)\)(?: to \((\d+)\))?")


def cited() -> dict[int, str]:
    """Every equation that the code cites, and a file that does."""
    found: dict[int, str] = {}
    for folder in ("refmamba", "backends", "eval_tasks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for several, last in CITATION.findall(file.read_text("utf-8")):
                numbers = [int(n) for n in several.split(", ")]
                numbers += range(numbers[-1], int(last) + 1) if last else []
                found |= dict.fromkeys(numbers, file.name)
    return found


def test_equations_are_numbered_in_order() -> None:
    assert list(range(1, len(NUMBERED) + 1)) == NUMBERED


def test_every_cited_equation_exists() -> None:
    assert {n: file for n, file in cited().items() if n not in NUMBERED} == {}


def test_every_equation_is_cited() -> None:
    assert set(NUMBERED) - set(cited()) == set()


def test_version_is_the_code_s() -> None:
    assert f"Version {SPEC_VERSION}." in SPEC


def test_constants_are_the_code_s() -> None:
    single = (arith.EXP_LOW, arith.EXP_HIGH, arith.LOG2_E, arith.LN2_HIGH, arith.LN2_LOW)
    for constant in (*single, *arith.EXP_TERMS, *arith.LOG_TERMS, arith.SQRT_HALF_BITS):
        assert f"{int(constant.view(np.uint32)):08x}" in SPEC


def test_the_format_has_every_key_of_a_checkpoint() -> None:
    hugging_face = [*(key for key, _, _ in checkpoint.HUGGING_FACE.values()), *checkpoint.HUGGING_FACE_ONLY]
    state_spaces = [*(key for key, _, _ in checkpoint.STATE_SPACES.values()), *checkpoint.STATE_SPACES_ONLY]
    inside = [*(key for key, _, _ in checkpoint.STATE_SPACES_SSM.values()), *checkpoint.STATE_SPACES_SSM_ONLY]
    for key in (*hugging_face, *state_spaces, *(f"ssm_cfg.{key}" for key in inside)):
        assert f"`{key}`" in FORMAT, key


def test_the_format_has_every_site_and_scale_of_a_scheme() -> None:
    for part, sites in SITES.items():
        [row] = re.findall(rf"^\| `{part}` \|.*$", FORMAT, re.MULTILINE)
        low, high = BITS[part]
        assert f'"bits": {low} to {high}' in row
        assert set(sites) <= set(re.findall(r"`([\w.]+)`", row))
        assert set(re.findall(r'"(\w+)"', row)) - {"bits", "scale", *OPTIONS} == set(CODERS[part])


def test_the_format_s_scheme_is_read() -> None:
    [example] = re.findall(r'^    (\{"name".*\})$', FORMAT, re.MULTILINE)
    assert scheme_from_json(json.loads(example)).inputs["in_proj"].bits == 8


def test_softplus_of_zero() -> None:
    value = arith.softplus(np.zeros(1, np.float32)).view(np.uint32)[0]
    assert f"softplus | +0.0 | {value:08x} | {value:08x} |" in SPEC
