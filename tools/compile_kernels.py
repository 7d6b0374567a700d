"""The PTX of every Triton kernel in every configuration of the backend, without a GPU, and what of it would not be exact.

python tools/compile_kernels.py OUT [--arch sm_90]: writes OUT/NAME.ptx, prints a line for each kernel, and ends with 1 where
one holds an instruction that an exact kernel must not have. The configurations are recorded, not listed: models of the paper's
sizes, a layer each, are called under every scheme with every kind of call, and each launch is kept instead of run.
"""

import argparse
import dataclasses
import hashlib
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from refmamba.backends.adapter import on_arrays
from refmamba.backends.triton import operations
from refmamba.backends.triton.call import batch_of, initial_state, last_batch, last_rows
from refmamba.backends.triton.forward import Forward
from refmamba.conformance.models import SCHEMES
from refmamba.conformance.operations import check_vector
from refmamba.conformance.vectors import read_vectors
from refmamba.spec.coders import ParameterGrouped, UnquantizedMatrix
from refmamba.spec.codes import Codes, FixedPoint, Param
from refmamba.spec.config import MambaConfig, kind_of
from refmamba.spec.parameters import QuantizedModel, parameter_coder, site_values
from refmamba.spec.scheme import Scheme, parse_scheme

ARCHITECTURES = ("sm_80", "sm_90", "sm_120")
# Instructions that round otherwise than SPEC section 1 says, or that an assembler is free to make into such.
FORBIDDEN = {
    "a fused multiply-add": r"fma\.\w+\.f(?:32|64)|mad\.\w*\.?f\w+",
    "an approximation": r"[\w.]*\.approx[\w.]*|div\.full[\w.]*|(?:ex2|lg2|rcp|rsqrt|tanh|sin|cos)\.[\w.]*",
    "flushed subnormals": r"[\w.]*\.ftz[\w.]*",
    "free to be fused by the assembler": r"(?:add|sub|mul)\.(?:sat\.)?f(?:32|64)",
    "a maximum that drops NaN": r"(?:max|min)\.f(?:32|64)",
    "a float sum in no written order": r"(?:red|atom)[\w.:]*\.add\.[\w.]*f\d+[\w.]*|redux[\w.]*f32",
    "a float tensor product": r"(?:wg)?mma[\w.]*(?:tf32|f16|bf16|e4m3|e5m2|f64)[\w.]*",
}
INSTRUCTION = re.compile(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)", re.M)


def faults(ptx: str) -> list[str]:
    """What of a kernel's PTX is not exact: `instruction: why`, each once."""
    used = sorted(set(INSTRUCTION.findall(ptx)))
    return [f"{op}: {why}" for op in used for why, pattern in FORBIDDEN.items() if re.fullmatch(pattern, op)]


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One specialization of a kernel: signature and constants by parameter, the aligned parameters, warps and stages."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    warps: int
    stages: int

    @property
    def name(self) -> str:
        """The kernel, its constants, and a few digits that tell what else differs."""
        words = [v if isinstance(v, str) else f"{k}{v}" for k, v in self.constants if v is not None and v is not False]
        rest = hashlib.sha256(repr((self.signature, self.constants, self.aligned, self.stages)).encode()).hexdigest()[:6]
        return "-".join([self.kernel.__name__, *words, f"w{self.warps}", rest])


TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int8: "*i8", torch.uint8: "*u8", torch.int16: "*i16",
         torch.int32: "*i32", torch.int64: "*i64"}  # fmt: skip


def specialized(kernel: Any, warps: int, stages: int, arguments: dict[str, Any]) -> Configuration:
    """What Triton would compile for a launch: it looks at divisibility by 16, and takes a 1 for a constant."""
    signature, constants, aligned = [], [], []
    for parameter in kernel.params:
        name, value = parameter.name, arguments[parameter.name]
        fixed = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not fixed):
            signature.append((name, "constexpr"))
            constants.append((name, value))
        elif isinstance(value, torch.Tensor):
            signature.append((name, TYPES[value.dtype]))
            aligned += [name] if value.storage_offset() * value.element_size() % 16 == 0 else []
        else:
            signature.append((name, "fp32" if isinstance(value, float) else "i32"))
            aligned += [name] if isinstance(value, int) and value % 16 == 0 and not fixed else []
    return Configuration(kernel, tuple(signature), tuple(constants), tuple(aligned), warps, stages)


def compiled(configuration: Configuration, architecture: str, **options: Any) -> Any:
    """Triton's result: `.asm["ptx"]`, `.asm["cubin"]`."""
    names = [name for name, _ in configuration.signature]
    source = ASTSource(
        configuration.kernel,
        dict(configuration.signature),
        constexprs={(names.index(name),): value for name, value in configuration.constants},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in configuration.aligned},
    )
    settings = {"enable_fp_fusion": False, "num_warps": configuration.warps, "num_stages": configuration.stages}
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    return triton.compile(source, target=target, options=settings | options)


class Hollow(Mapping[str, Param]):
    """The parameters of a model of any size under a scheme, zeros that take no memory."""

    def __init__(self, config: MambaConfig, scheme: Scheme) -> None:
        self.scheme = scheme
        self.shapes = {"lm_head.weight": (config.vocab_size, config.d_model)} | config.shapes()
        self.sites = site_values(config, scheme)

    def __getitem__(self, name: str) -> Param:
        if name in self.sites:
            shape, dtype = self.sites[name]
            return np.zeros(shape, dtype).view(np.float32)  # exponents are kept as their bits
        shape, coder = self.shapes[name], parameter_coder(kind_of(name), self.scheme)
        if coder is None:
            return np.broadcast_to(np.float32(0), shape)
        if isinstance(coder, UnquantizedMatrix):
            return FixedPoint(np.broadcast_to(np.int32(0), shape), np.zeros(shape[0], np.int32))
        scale = np.ones(coder.scale_shape(shape), np.float32)
        q = np.broadcast_to(np.int8(0), shape)
        if isinstance(coder, ParameterGrouped):
            return Codes(q, scale, coder.bits, np.ones(coder.steps_shape(shape), np.uint8), coder.group)
        return Codes(q, scale, coder.bits)

    def __iter__(self) -> Iterator[str]:
        return iter([*self.shapes, *self.sites])

    def __len__(self) -> int:
        return len(self.shapes) + len(self.sites)


class Recorder(dict[Configuration, None]):
    """Takes the place of the backend's `launch`, and keeps each configuration once, in order."""

    def __call__(self, kernel: Any, grid: tuple[int, ...], warps: int, stages: int = 2, /, **arguments: Any) -> None:
        self[specialized(kernel, warps, stages, arguments)] = None


WIDTHS = {"130m": 768, "1.4b": 2048, "2.8b": 2560}
CALLS = ([1], [1] * 4, [1] * 16, [1] * 17, [20], [2048], [2048] * 16)  # tokens of each sequence


def configurations(widths: Sequence[int] = tuple(WIDTHS.values()), schemes: Sequence[str] = SCHEMES) -> list[Configuration]:
    """Every configuration of every kernel that models of these widths take, and that single operations take."""
    found = Recorder()
    for width in widths:
        config = MambaConfig(width, 1, 50280)
        for name in schemes:
            scheme = parse_scheme(name)
            forward = Forward(QuantizedModel(config, scheme, Hollow(config, scheme)), torch.device("meta"), found)
            for lengths in CALLS:
                batch = batch_of([np.zeros(n, np.int64) for n in lengths], forward.device)
                state = initial_state(config, len(lengths), forward.device)
                x = forward.body(batch, state, state)
                forward.head(last_rows(x, batch), last_batch(batch))
    with patch.object(operations, "launch", found):
        for operation, function in on_arrays(operations.OPERATIONS, torch.device("cpu")).items():
            for vector in read_vectors(operation):
                check_vector(operation, function, vector)
    return list(found)


WORK: list[Configuration] = []  # what the processes share: a kernel cannot be sent to one


def write(out: Path, architecture: str, i: int) -> tuple[str, list[str]]:
    """Compile WORK[i] into a file: its name, and what is wrong with it."""
    configuration = WORK[i]
    try:
        ptx = compiled(configuration, architecture).asm["ptx"]
    except Exception as error:  # Triton's have no base of their own
        return configuration.name, [f"not compiled: {' '.join(str(error).split()) or type(error).__name__}"]
    (out / f"{configuration.name}.ptx").write_text(ptx, "utf-8")
    return configuration.name, faults(ptx)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--arch", default="sm_90", choices=ARCHITECTURES)
    parser.add_argument("--widths", default=",".join(map(str, WIDTHS.values())), help="d_model, with commas")
    parser.add_argument("--schemes", default=",".join(SCHEMES), help="with commas")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes; Triton's compiler takes one core")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    WORK[:] = configurations([int(w) for w in arguments.widths.split(",")], arguments.schemes.split(","))
    wrong = 0
    with multiprocessing.get_context("fork").Pool(arguments.jobs) as pool:
        for name, found in pool.imap(partial(write, arguments.out, arguments.arch), range(len(WORK))):
            wrong += bool(found)
            print(f"{name}: {'; '.join(found) or 'exact'}", flush=True)
    print(f"{len(WORK)} kernels for {arguments.arch}: " + (f"{wrong} are not exact" if wrong else "every kernel is exact"))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
