"""`refmamba verify --against`: numbers from elsewhere."""

import functools
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from refmamba.commands.options import calibrate_option, parse_tokens, percentile_option, print_json, scheme_option
from refmamba.conformance.against import Verdict, compare_model, compare_operation
from refmamba.conformance.comparison import Tolerance, parse_tolerance
from refmamba.conformance.dumps import Dump, read_dump
from refmamba.errors import DataError
from refmamba.run.session import DEFAULT_MODEL, ModelChoice, open_model
from refmamba.spec import SPEC_VERSION

DEFAULT_SCHEME = "fp32"  # of numbers from elsewhere


def against_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give `verify` --against, --scheme, --calibrate and --percentile: it then looks at a file of numbers, and runs no backend.
    The command has --tokens, --tolerance, --model and --json."""

    @click.option(
        "--against", type=click.Path(path_type=Path), help="Numbers from elsewhere instead: a .npy, .npz or .safetensors."
    )
    @scheme_option
    @calibrate_option
    @percentile_option
    @functools.wraps(command)
    def with_against(
        *args: Any, against: Path | None, scheme: str | None, tokens: str | None, calibrate: Path | None, percentile: float,
        **rest: Any,
    ) -> Any:  # fmt: skip
        if against is not None:
            tolerance = rest.get("tolerance_name")
            tolerance = None if tolerance is None else parse_tolerance(tolerance)
            dump = read_dump(against)
            name, under = rest["model"] or dump.text("model") or DEFAULT_MODEL, scheme or dump.text("scheme")
            choice = ModelChoice(name, under, calibrate=calibrate, percentile=percentile)
            verdict = _verdict(dump, choice, tokens, tolerance)
            show(against, verdict, tolerance, as_json=rest["as_json"])
            sys.exit(verdict.first is not None)
        for name, value in (("--scheme", scheme), ("--tokens", tokens), ("--calibrate", calibrate),
                            ("--percentile", None if percentile == 1 else percentile)):  # fmt: skip
            if value is not None:
                raise DataError(f"{name} goes with --against; a backend is checked under --schemes")
        return command(*args, **rest)

    return with_against


def _verdict(dump: Dump, choice: ModelChoice, tokens: str | None, tolerance: Tolerance | None) -> Verdict:
    if "operation" in dump.about:
        return compare_operation(dump, tolerance)
    sequence = None if tokens is None else np.array(parse_tokens(tokens))
    return compare_model(dump, open_model(choice, DEFAULT_SCHEME), sequence, tolerance)


def show(file: Path, verdict: Verdict, tolerance: Tolerance | None, *, as_json: bool) -> None:
    """Print what became of a dump."""
    same = verdict.first is None
    if as_json:
        result = {"file": str(file), "specification": SPEC_VERSION, "tolerance": tolerance and tolerance.name, "ok": same}
        print_json(result | asdict(verdict))
        return
    click.echo(f"{file}: {verdict.title}, specification {SPEC_VERSION}")
    for line in verdict.lines:
        kl = "" if line.divergence is None else f"KL {line.divergence:.1e}"
        click.echo(f"{line.name:<32} relative error {line.relative:<9.1e} {kl:<12} {'ok' if line.ok else 'FAILED'}")
    for note in verdict.notes:
        click.echo(note)
    if verdict.first:
        click.echo(f"first difference: {verdict.first}")
        if verdict.cause:
            click.echo(f"cause: {verdict.cause}")
    else:
        click.echo(f"within {tolerance.name}" if tolerance else "every bit is the specification's")
