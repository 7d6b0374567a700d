"""`refmamba verify`: does a backend give the specification's bits? Test vectors first, then whole models.

The vectors (tests/vectors, inside the package as `vectors`) are data with a source; tests/vectors/README.md tells their
format. Whole models are compared with the reference, which runs beside, and with frozen hashes.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import click
import numpy as np

from refmamba import SPEC_VERSION
from refmamba.arith import F32Array
from refmamba.backend import DEFAULT_BACKEND, Backend, Runner, load_backend
from refmamba.calibrate import load_calibration
from refmamba.checkpoint import open_checkpoint
from refmamba.errors import DataError, NonFiniteError
from refmamba.model import Mamba, QuantizedModel, quantize_model
from refmamba.quantize import ACTIVATION_BITS, Codes, FixedPoint
from refmamba.reference import OPERATIONS
from refmamba.scheme import LINEAR_LAYERS, Scheme, parse_scheme
from refmamba.trace import last_site

SCHEMES = (
    "fp32", "w8-mlp", "w8-all", "w4-mlp", "w4-all", "w2-all", "w8a8-mlp", "w8a8-all", "w8a4-mlp", "w4a16-all",
    "int8", "int8-static", "int8-smooth",
)  # fmt: skip
DTYPES = {"f32": "<f4", "f64": "<f8", "i8": "i1", "i16": "<i2", "i32": "<i4", "i64": "<i8", "u8": "u1"}
STEPS = 6  # tokens that are run one at a time
CHUNKS = (1, 2, 5, 3, 17)  # lengths of the chunks, over and over


def vectors_folder() -> Path:
    """Where the vectors lie, in the package as in the clone."""
    return Path(str(resources.files("refmamba") / "vectors"))


# Values of vectors.


def encode(value: Any) -> Any:
    """A value as JSON: arrays with a dtype, a shape and, for floats, the hexadecimal digits of their bits."""
    if isinstance(value, Codes):
        return {"codes": {"q": encode(value.q), "scale": encode(value.scale), "bits": value.bits}}
    if isinstance(value, FixedPoint):
        return {"fixed_point": {"q": encode(value.q), "exponent": encode(value.exponent)}}
    if isinstance(value, tuple):
        return {"tuple": [encode(v) for v in value]}
    if isinstance(value, np.ndarray | np.generic):
        x = np.asarray(value)
        name = {"f": "f", "i": "i", "u": "u"}[x.dtype.kind] + str(8 * x.dtype.itemsize)
        if x.dtype.kind == "f":
            unsigned = np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}").ravel().tolist()
            return {name: " ".join(f"{v:0{2 * x.dtype.itemsize}x}" for v in unsigned), "shape": list(x.shape)}
        return {name: x.ravel().tolist(), "shape": list(x.shape)}
    return {"float": value.hex()} if isinstance(value, float) else value


def decode(value: Any) -> Any:
    """What `encode` encoded, in new arrays."""
    if not isinstance(value, dict):
        return value
    if "codes" in value:
        return Codes(decode(value["codes"]["q"]), decode(value["codes"]["scale"]), value["codes"]["bits"])
    if "fixed_point" in value:
        return FixedPoint(decode(value["fixed_point"]["q"]), decode(value["fixed_point"]["exponent"]))
    if "tuple" in value:
        return tuple(decode(v) for v in value["tuple"])
    if "float" in value:
        return float.fromhex(value["float"])
    name = next(key for key in value if key != "shape")
    values, dtype = value[name], np.dtype(DTYPES[name])
    if dtype.kind == "f":
        bits = np.array([int(v, 16) for v in values.split()], f"<u{dtype.itemsize}")
        return bits.view(dtype).reshape(value["shape"])
    return np.array(values, dtype).reshape(value["shape"])


# Comparison.


@dataclass(frozen=True)
class Difference:
    """The first place where something is not as it must be."""

    operation: str
    where: str
    element: list[int] = field(default_factory=list)
    expected: str = ""
    found: str = ""

    def __str__(self) -> str:
        values = f", element {self.element}: expected {self.expected}, found {self.found}" if self.expected else ""
        return f"{self.operation}: {self.where}{values}"


def _bits(x: Any) -> str:
    if x.dtype.kind != "f":
        return str(x)
    return f"{int(x.view(f'u{x.dtype.itemsize}')):0{2 * x.dtype.itemsize}x} ({x})"


def ulps(a: Any, b: Any) -> Any:
    """Steps between two float32 arrays, 0 for two NaN; both zeros are one number."""
    a_at, b_at = (np.where(v < 0, -(v & 0x7FFFFFFF), v) for v in (x.view(np.int32).astype(np.int64) for x in (a, b)))
    return np.where(np.isnan(a) & np.isnan(b), 0, np.abs(a_at - b_at))


def unequal(expected: Any, found: Any, compare: str = "exact") -> tuple[Any, int]:
    """Where two arrays of one shape differ under a rule, and the largest distance in float32 steps."""
    distance = int(ulps(expected, found).max(initial=0)) if expected.dtype == np.float32 == found.dtype else 0
    rule, _, limit = compare.partition(":")
    if rule == "ulp":
        return ulps(expected, found) > int(limit), distance
    if rule == "close":
        far = np.abs(expected - found.astype(expected.dtype)) > float(limit) * np.abs(expected).max()
        return far | np.isnan(found), distance
    if rule == "value" or expected.dtype.kind != "f":
        return expected != found, distance
    as_bits = f"u{expected.dtype.itemsize}"
    return (expected.view(as_bits) != found.view(as_bits)) & ~(np.isnan(expected) & np.isnan(found)), distance


def difference(operation: str, where: str, expected: Any, found: Any, compare: str = "exact") -> tuple[Difference | None, int]:
    """The first difference of two arrays in C order, and the largest distance in float32 steps."""
    expected, found = np.asarray(expected, order="C"), np.asarray(found, order="C")
    same_kind = expected.dtype == found.dtype if expected.dtype.kind == "f" else found.dtype.kind in "iu"
    if expected.shape != found.shape or not same_kind:
        return Difference(operation, f"{where}: {found.dtype} {found.shape}, not {expected.dtype} {expected.shape}"), 0
    wrong, distance = unequal(expected, found, compare)
    if not np.any(wrong):
        return None, distance
    at = tuple(int(i) for i in np.argwhere(np.atleast_1d(wrong))[0])[: expected.ndim]
    return Difference(operation, where, list(at), _bits(expected[at]), _bits(found[at])), distance


def parts(value: Any) -> list[tuple[str, Any]]:
    """A result as arrays with names."""
    if isinstance(value, tuple):
        return [(f"result {i}", v) for i, v in enumerate(value)]
    if hasattr(value, "q"):
        last = "scale" if hasattr(value, "scale") else "exponent"
        return [("codes", np.asarray(value.q)), (last, np.asarray(getattr(value, last)))]
    return [("result", np.asarray(value))]


# Operations.


@dataclass
class Row:
    """One line of the table: an operation, or a scheme's check on a whole model."""

    check: str
    scheme: str
    cases: int = 0
    exact: int = 0
    failed: int = 0
    max_ulp: int = 0
    offered: bool = True


def read_vectors(operation: str) -> list[dict[str, Any]]:
    """The vectors of an operation."""
    data = json.loads((vectors_folder() / "operations" / f"{operation}.json").read_text("utf-8"))
    vectors: list[dict[str, Any]] = data["vectors"]
    return vectors


def check_vector(operation: str, function: Callable[..., Any], vector: Mapping[str, Any]) -> tuple[Difference | None, int]:
    """Run one vector. Whatever a backend raises is a difference."""
    where, wanted = f"vector '{vector['name']}'", vector["result"]
    raised = wanted.get("raises") if isinstance(wanted, dict) else None
    arguments = [decode(a) for a in vector["arguments"]]
    try:
        with np.errstate(all="ignore"):
            found = function(*arguments)
    except NonFiniteError as error:
        return (None if raised else Difference(operation, f"{where}: raised {error}")), 0
    except Exception as error:  # a stranger's backend may raise anything
        return Difference(operation, f"{where}: raised {type(error).__name__}: {error}"), 0
    if raised:
        return Difference(operation, f"{where}: a NaN or an infinity was not refused"), 0
    if [encode(a) for a in arguments] != vector["arguments"]:
        return Difference(operation, f"{where}: an argument was changed in place"), 0
    expected, results = parts(decode(wanted)), parts(found)
    if [name for name, _ in expected] != [name for name, _ in results]:
        return Difference(operation, f"{where}: the result is not of the form {[name for name, _ in expected]}"), 0
    largest = 0
    for (name, e), (_, f) in zip(expected, results, strict=True):
        first, distance = difference(operation, f"{where}, {name}", e, f, vector["compare"])
        if first:
            return first, distance
        largest = max(largest, distance)
    return None, largest


def check_operations(backend: Backend) -> Iterator[tuple[Row, Difference | None]]:
    """Every operation of the specification on its vectors, in reading order."""
    offered = backend.operations()
    for operation in OPERATIONS:
        row, first = Row(operation, ""), None
        for vector in read_vectors(operation):
            row.cases += 1
            if operation not in offered:
                row.offered = False
                continue
            wrong, distance = check_vector(operation, offered[operation], vector)
            row.failed += wrong is not None
            row.exact += wrong is None and distance == 0
            row.max_ulp = max(row.max_ulp, distance if vector["compare"].startswith("ulp") else 0)
            first = first or wrong
        yield row, first


# Whole models.


def sha256_of(logits: Sequence[F32Array]) -> str:
    """SHA-256 of little-endian float32 logits, one sequence after the other."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(x, "<f4").tobytes() for x in logits)).hexdigest()


def operation_of(site: str, scheme: Scheme) -> str:
    """The operation that makes a site's value."""
    last = last_site(site)
    layer, _, side = last.rpartition(".")
    if layer not in (*LINEAR_LAYERS, "lm_head"):
        return {"embedding": "embed", "norm": "rms_norm", "norm_f": "rms_norm", "u": "silu", "delta": "step_size",
                "scan": "selective_scan", "ssm_state": "selective_scan", "conv_state": "conv1d"}.get(last, last)  # fmt: skip
    quantizer = scheme.inputs.get(layer)
    coded = "fixed_point" if quantizer is None else "code_static" if quantizer.scale == "static" else "code"
    made = {"in_codes": coded, "acc": "integer_product", "result": "rescale", "out_codes": "code"}
    return made.get(side, "dequantize and bias" if side == "out" else "input")


def sites_of(runner: Runner, tokens: Any) -> dict[str, Any]:
    """Everything that a runner shows of one sequence."""
    seen: dict[str, Any] = {}
    runner.prefill([tokens], logits="all", hook=lambda site, value: seen.update({site: np.array(value)}))
    return seen


def replay(reference: Mamba, offered: Mapping[str, Callable[..., Any]], seen: Mapping[str, Any], at: str) -> Difference | None:
    """One layer's operations, one by one, on the reference's own values: the first that a backend gets wrong."""
    model, config, e = reference.model, reference.config, reference.config.d_inner
    r, n = config.dt_rank, config.d_state

    def site(name: str) -> Any:
        return seen[f"{at}.{name}"]

    def linear(layer: str) -> Iterator[tuple[str, tuple[Any, ...], Any]]:
        name, w = operation_of(f"{at}.{layer}.in_codes", reference.scheme), model.params[f"{at}.{layer}.weight"]
        x = site(f"{layer}.in")
        if f"{at}.{layer}.smooth" in model.params:
            x = np.ldexp(x, -model.value(f"{at}.{layer}.smooth"))
        quantizer = reference.scheme.inputs.get(layer)
        arguments: tuple[Any, ...] = (x, ACTIVATION_BITS, layer)
        if quantizer and quantizer.scale == "static":
            arguments = (x, model.value(f"{at}.{layer}.absmax"), quantizer.bits, layer)
        elif quantizer:
            arguments = (x, quantizer.bits, layer, "per_row" if quantizer.scale == "per_token" else "per_tensor")
        codes = OPERATIONS[name](*arguments)
        yield name, arguments, codes
        yield "integer_product", (codes, w), site(f"{layer}.acc")
        yield "rescale", (site(f"{layer}.acc"), codes, w), site(f"{layer}.result")

    def calls() -> Iterator[tuple[str, tuple[Any, ...], Any]]:
        yield "rms_norm", (site("residual_in"), model.value(f"{at}.norm.weight"), config.norm_eps), site("norm")
        yield from linear("in_proj")
        c, z = np.split(site("in_proj.out"), 2, axis=1)
        bias = model.value(f"{at}.conv1d.bias") if config.use_conv_bias else None
        before = np.zeros((e, config.d_conv - 1), np.float32)
        weight = model.value(f"{at}.conv1d.weight")
        yield "conv1d", (c, before, weight, bias), (site("conv1d"), site("conv_state"))
        yield "silu", (site("conv1d"),), site("u")
        yield from linear("x_proj")
        yield from linear("dt_proj")
        yield "step_size", (site("dt_proj.out"), model.value(f"{at}.dt_proj.bias")), site("delta")
        B, C = np.split(site("x_proj.out")[:, r:], 2, axis=1)
        A, h = reference.A[int(at.split(".")[1])], np.zeros((e, n), np.float32)
        arguments = (site("u"), site("delta"), A, B, C, model.value(f"{at}.D"), h)
        yield "selective_scan", arguments, (site("scan"), site("ssm_state"))
        yield "gate", (site("scan"), z), site("gate")
        yield from linear("out_proj")

    for name, arguments, expected in calls():
        vector = {"name": f"{at}, on the reference's inputs", "arguments": [encode(a) for a in arguments],
                  "result": encode(expected), "compare": "value" if name == "integer_product" else "exact"}  # fmt: skip
        first = check_vector(name, offered[name], vector)[0] if name in offered else None
        if first:
            return first
    return None


def locate(reference: Mamba, runner: Runner, backend: Backend, tokens: Any) -> Difference | None:
    """The first site whose values differ; None where all are equal (so it is not the forward of one sequence).

    Where a fused backend shows only some sites, its single operations are tried on the layer that differs.
    """
    seen, found, equal = sites_of(reference, tokens), sites_of(runner, tokens), "the tokens"
    for site, expected in seen.items():
        if backend.sites is not None and last_site(site) not in backend.sites:
            continue
        operation = operation_of(site, reference.scheme)
        if site not in found:
            return Difference(operation, f"{site} is not shown")
        first, _ = difference(operation, f"{site} (equal up to {equal})", expected, found[site])
        if first and backend.sites is not None and site.startswith("layers."):
            return replay(reference, backend.operations(), seen, ".".join(site.split(".")[:2])) or first
        if first:
            return first
        equal = site
    return None


class ModelChecks:
    """One model under one scheme: the backend beside the reference."""

    def __init__(self, backend: Backend, model: QuantizedModel, sequences: Sequence[Any]) -> None:
        self.reference, self.runner, self.backend = Mamba(model), backend.load(model), backend
        self.sequences, self.whole = sequences, model.scheme.whole_sequence
        self.alone = [self.reference.prefill([s], logits="all") for s in sequences]
        self.logits = [rows[0] for rows, _ in self.alone]

    def same_state(self, where: str, expected: Any, found: Any) -> Difference | None:
        """Both parts of two states."""
        for name, e, f in zip(("conv_state", "ssm_state"), expected.arrays(), found.arrays(), strict=True):
            first, _ = difference("state", f"{where}, {name} [sequence, layer, channel, ...]", e, f)
            if first:
                return first
        return None

    def rows(self, operation: str, where: str, expected: Any, found: Any) -> Difference | None:
        """Logits."""
        return difference(operation, f"{where}, logits [token, row]", expected, found)[0]

    def prefill(self) -> Iterator[Difference | None]:
        """Each sequence alone, all positions, the last one and none."""
        for i, s in enumerate(self.sequences):
            found, state = self.runner.prefill([s], logits="all")
            first = self.rows("prefill", f"sequence {i}", self.logits[i], found[0])
            yield first or self.same_state(f"prefill of sequence {i}", self.alone[i][1], state)
        s = self.sequences[0]
        expected = self.reference.prefill([s], logits="last")[0][0]
        yield self.rows("prefill", "the last position alone", expected, self.runner.prefill([s], logits="last")[0][0])
        rows, state = self.runner.prefill([s], logits="none")
        empty = self.rows("prefill", "no position", np.empty((0, self.runner.config.vocab_size), np.float32), rows[0])
        yield empty or self.same_state("prefill without logits", self.alone[0][1], state)

    def batch(self) -> Iterator[Difference | None]:
        """All sequences at once, of their different lengths: each as if it were alone."""
        found, state = self.runner.prefill(self.sequences, logits="all")
        for i, rows in enumerate(found):
            yield self.rows("batch", f"sequence {i} of {len(found)}", self.logits[i], rows)
        for i in range(len(found)):
            yield self.same_state(f"batch, sequence {i}", self.alone[i][1], state.take([i]))

    def step(self) -> Iterator[Difference | None]:
        """One token at a time, every sequence at once; the state that goes in stays as it was."""
        long = [s for s in self.sequences if len(s) >= STEPS]
        state, kept = self.runner.initial_state(len(long)), self.reference.initial_state(len(long))
        for t in range(STEPS):
            tokens = np.array([s[t] for s in long])
            before = [x.copy() for x in state.arrays()]
            found, after = self.runner.step(tokens, state)
            expected, kept = self.reference.step(tokens, kept)
            yield self.rows("step", f"token {t} [sequence, row]", expected, found)
            for name, old, now in zip(("conv_state", "ssm_state"), before, state.arrays(), strict=True):
                yield difference("state", f"step {t} changed the {name} that it was given", old, now)[0]
            state = after
        yield self.same_state("steps", kept, state)

    def chunks(self) -> Iterator[Difference | None]:
        """A sequence in pieces: the bits of one call, unless the scheme's scale is the whole call's."""
        s, at, state, kept = self.sequences[0], 0, self.runner.initial_state(1), self.reference.initial_state(1)
        for i in range(len(s)):
            piece = s[at : at + CHUNKS[i % len(CHUNKS)]]
            if not len(piece):
                break
            found, state = self.runner.prefill([piece], state, logits="all")
            expected = self.logits[0][at : at + len(piece)]
            if self.whole:
                rows, kept = self.reference.prefill([piece], kept, logits="all")
                expected = rows[0]
            yield self.rows("chunks", f"chunk of {len(piece)} tokens from {at}", expected, found[0])
            at += len(piece)

    def fork(self) -> Iterator[Difference | None]:
        """States taken from a batch, more than once, and run on."""
        _, state = self.runner.prefill(self.sequences[:2], logits="none")
        _, kept = self.reference.prefill(self.sequences[:2], logits="none")
        order, tokens = [1, 0, 1], np.array([1, 2, 3]) % self.runner.config.vocab_size
        found, expected = self.runner.step(tokens, state.take(order))[0], self.reference.step(tokens, kept.take(order))[0]
        yield self.rows("fork", "a step after take [sequence, row]", expected, found)
        yield self.same_state("the forked state was changed", kept, state)

    def run(self) -> Iterator[tuple[Row, Difference | None]]:
        """Every check; the first difference of one sequence's forward is traced to its site."""
        scheme = self.reference.scheme.name
        for check in (self.prefill, self.batch, self.step, self.chunks, self.fork):
            row, first = Row(f"model: {check.__name__}", scheme), None
            try:
                for wrong in check():
                    row.cases += 1
                    row.exact += wrong is None
                    row.failed += wrong is not None
                    first = first or wrong
                if first and check == self.prefill:
                    located = (locate(self.reference, self.runner, self.backend, s) for s in self.sequences)
                    first = next(filter(None, located), first)
            except Exception as error:  # a stranger's backend may raise anything
                row.cases, row.failed = row.cases + 1, row.failed + 1
                first = first or Difference(check.__name__, f"raised {type(error).__name__}: {error}")
            yield row, first


def check_frozen(backend: Backend, models: Mapping[str, QuantizedModel], expected: Mapping[str, Any]) -> Iterator[
    tuple[Row, Difference | None]
]:  # fmt: skip
    """Hashes of logits that were frozen with the vectors, and transformers' float64 logits for `fp32`."""
    sequences = [np.array(s) for s in expected["sequences"]]
    for name, model in models.items():
        wanted = expected["logits_sha256"]["schemes"].get(name)
        if wanted is None:
            continue
        row, first = Row("model: frozen hash", name, 1), None
        runner = backend.load(model)
        logits = [runner.prefill([s], logits="all")[0][0] for s in sequences]
        found = sha256_of(logits)
        if found != wanted:
            first = Difference("whole model", "SHA-256 of the logits", [], wanted, found)
        row.exact, row.failed = int(first is None), int(first is not None)
        yield row, first
        if name == "fp32" and "fp32_last_8" in expected:
            theirs = expected["fp32_last_8"]
            ours = logits[theirs["sequence"]][-8:].astype(np.float64)
            first, _ = difference("whole model", "beside transformers", decode(theirs["result"]), ours, theirs["compare"])
            yield Row("model: transformers", name, 1, 0, int(first is not None)), first


def tiny_models(schemes: Sequence[str]) -> dict[str, QuantizedModel]:
    """The tiny model in the vectors, under each scheme."""
    folder = vectors_folder() / "tiny"
    source, calibration = open_checkpoint(folder), load_calibration(folder / "calibration.json")
    assert not isinstance(source, QuantizedModel)
    return {name: quantize_model(source, parse_scheme(name), calibration) for name in schemes}


def tiny_expected() -> dict[str, Any]:
    """What the tiny model gives."""
    expected: dict[str, Any] = json.loads((vectors_folder() / "tiny" / "expected.json").read_text("utf-8"))
    return expected


def run_checks(backend: Backend, schemes: Sequence[str], model: str | None = None) -> Iterator[tuple[Row, Difference | None]]:
    """All of it: the operations' vectors, the tiny model, and a model of the user's."""
    yield from check_operations(backend)
    expected, models = tiny_expected(), tiny_models(schemes)
    sequences = [np.array(s) for s in expected["sequences"]]
    for quantized in models.values():
        yield from ModelChecks(backend, quantized, sequences).run()
    yield from check_frozen(backend, models, expected)
    if model is None:
        return
    from refmamba.load import ModelChoice, load_model

    file = vectors_folder() / "small.json"
    frozen = json.loads(file.read_text("utf-8")) if model == "small" and file.exists() else None
    for name in schemes:
        files, _, quantized = load_model(ModelChoice(model, name))
        vocabulary = quantized.config.vocab_size
        yield from ModelChecks(backend, quantized, [s[:24] % vocabulary for s in sequences]).run()
        weights = files.folder / "model.safetensors"
        if frozen and hashlib.sha256(weights.read_bytes()).hexdigest() == frozen["weights_sha256"]:
            yield from check_frozen(backend, {name: quantized}, frozen)


# The command.


def table_line(row: Row) -> str:
    """One line of the table."""
    verdict = "not offered" if not row.offered else "FAILED" if row.failed else "ok"
    ulp = f"{row.max_ulp} ulp" if row.max_ulp else ""
    return f"{row.check:<20} {row.scheme:<12} {row.cases:>5} {row.exact:>5}  {ulp:<6} {verdict}"


@click.command()
@click.option("--backend", "name", default=DEFAULT_BACKEND, show_default=True, help="reference, cpu, torch, module:Class.")
@click.option("--device", help="cpu, cuda, cuda:1: where the backend offers it.")
@click.option("--model", help="Check this model too: `small`, a folder, or OWNER/NAME on the hub.")
@click.option("--schemes", default=",".join(SCHEMES), help="Schemes, with commas between.  [default: all kinds]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the table.")
def verify(name: str, device: str | None, model: str | None, schemes: str, as_json: bool) -> None:
    """Compare a backend with the specification, bit by bit; exit status 1 if it differs."""
    chosen = schemes.split(",")
    for scheme in chosen:
        parse_scheme(scheme)
    backend = load_backend(name, device)
    if not backend.exact:
        raise DataError(f"backend '{name}' does not claim the specification's bits, so there is nothing to verify")
    rows, first = [], None
    if not as_json:
        click.echo(f"{name} on {backend.device}, specification {SPEC_VERSION}\n{'check':<20} {'scheme':<12} cases exact")
    for row, wrong in run_checks(backend, chosen, model):
        rows.append(row)
        first = first or wrong
        if not as_json:
            click.echo(table_line(row))
    ok = first is None
    if as_json:
        result = {"backend": name, "device": backend.device, "specification": SPEC_VERSION, "ok": ok,
                  "rows": [asdict(row) for row in rows], "first_difference": asdict(first) if first else None}  # fmt: skip
        click.echo(json.dumps(result))
    elif first:
        click.echo(f"first difference: {first}")
    else:
        missing = [row.check for row in rows if not row.offered]
        click.echo("every bit is the specification's" + (f"; not offered: {', '.join(missing)}" if missing else ""))
    if not ok:
        sys.exit(1)
