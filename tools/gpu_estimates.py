"""What a call of mamba-2.8b costs on a GPU, estimated without one: `python tools/gpu_estimates.py OUT.md [--arch sm_90]`.

From the kernels' SASS: instructions, those of the longest loop, registers. From the launches of a call, recorded as in
compile_kernels.py: how many there are, the bytes of every tensor that a kernel takes, and the products of int8. From them and
the card's data sheet, with the efficiencies below: seconds, which are estimates until benchmarks/gpu.py has measured them.
"""

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from compile_kernels import Configuration, Hollow, compiled, specialized

from refmamba.backends.triton.call import batch_of, initial_state, last_batch, last_rows
from refmamba.backends.triton.forward import Forward
from refmamba.spec.config import MambaConfig
from refmamba.spec.parameters import QuantizedModel
from refmamba.spec.scheme import parse_scheme

CONFIG = MambaConfig(2560, 64, 50280)  # mamba-2.8b
CALLS = {"decode, batch 1": [1], "decode, batch 16": [1] * 16, "prefill 2048": [2048], "prefill 2048, batch 16": [2048] * 16}
# An H100 SXM by its data sheet: bytes, int8 and bfloat16 operations a second; instructions of a warp that all schedulers issue.
BANDWIDTH, INT8, BFLOAT16, ISSUED = 3.35e12, 1979e12, 989e12, 132 * 4 * 1.755e9
# What of it is reached, and the seconds that a launch adds: assumptions.
OF_BANDWIDTH, OF_PRODUCTS, OF_ISSUED, LAUNCH = 0.8, 0.6, 0.8, 2e-6
NOT_READ_WHOLE = ("table_ptr",)


class Launch(NamedTuple):
    """A kernel of a call: its blocks, the bytes of its tensors, and its operations on int8."""

    configuration: Configuration
    blocks: int
    bytes: int
    operations: int


class Launches(list[Launch]):
    """Takes the place of the backend's `launch`, and keeps each."""

    def __call__(self, kernel: Any, grid: tuple[int, ...], warps: int, stages: int = 2, /, **arguments: Any) -> None:
        tensors = [v for k, v in arguments.items() if isinstance(v, torch.Tensor) and k not in NOT_READ_WHOLE]
        a = arguments
        product = 2 * a["rows"] * a["K"] * a["DIGITS"] * a["PLANES"] if "PLANES" in a else 0
        self.append(Launch(
            specialized(kernel, warps, stages, arguments), int(np.prod(grid)),
            sum(x.numel() * x.element_size() for x in tensors), product * a.get("N", a.get("channels", 0))
        ))  # fmt: skip


def launches(scheme_name: str, lengths: Sequence[int]) -> list[tuple[Launch, int]]:
    """The kernels of a call, each with how often it runs."""
    found, scheme = Launches(), parse_scheme(scheme_name)
    config = MambaConfig(CONFIG.d_model, 1, CONFIG.vocab_size)
    forward = Forward(QuantizedModel(config, scheme, Hollow(config, scheme)), torch.device("meta"), found)
    batch = batch_of([np.zeros(n, np.int64) for n in lengths], forward.device)
    state = initial_state(config, len(lengths), forward.device)
    x = forward.body(batch, state, state)
    body = len(found)  # the embedding, and a layer
    forward.head(last_rows(x, batch), last_batch(batch))
    return [(launch, CONFIG.n_layer if 0 < i < body else 1) for i, launch in enumerate(found)]


class Code(NamedTuple):
    """A kernel's machine code: instructions, those of its longest and of all loops, registers and bytes of a thread's stack."""

    instructions: int
    loop: int
    loops: int
    registers: int
    stack: int


def machine_code(configuration: Configuration, architecture: str, **options: Any) -> Code:
    """What cuobjdump, which comes with Triton, reads out of a kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled(configuration, architecture, **options).asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        sass, usage = (
            subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout
            for option in ("-sass", "-res-usage")
        )
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass) if text.strip() != "NOP"]
    jumps = [(at, int(to[1], 16)) for at, text in lines if (to := re.search(r"\bBRA.* `?\(?(?:\.L_x_\d+)?(0x[0-9a-f]+)", text))]
    loops = [sum(to <= line <= at for line, _ in lines) for at, to in jumps if to < at]
    registers, stack = (int(re.findall(rf"{word}:(\d+)", usage)[0]) for word in ("REG", "STACK"))
    return Code(len(lines), max(loops, default=0), sum(loops), registers, stack)


def seconds(launch: Launch, code: Code, tokens: int) -> dict[str, float]:
    """What a launch takes for its bytes, its products and its instructions; the largest counts.

    The scan's longest loop takes LANES tokens at once; both loops of a kernel for codes go along the row, BK columns at once.
    """
    name, constant = launch.configuration.kernel.__name__, dict(launch.configuration.constants)
    scan = code.loop * tokens / constant["LANES"] if name == "scan_kernel" else 0
    row = code.instructions + (triton.cdiv(constant["K"], constant["BK"]) - 1) * code.loops if name == "code_kernel" else 0
    issued = launch.blocks * launch.configuration.warps / (OF_ISSUED * ISSUED)
    return {
        "bytes": launch.bytes / (OF_BANDWIDTH * BANDWIDTH),
        "products": launch.operations / (OF_PRODUCTS * INT8),
        "scan": issued * scan,
        "codes": issued * row,
    }


def report(architecture: str, schemes: Sequence[str]) -> str:
    """All tables, in Markdown."""
    code: dict[Configuration, Code] = {}
    lines = [
        f"# Estimates for mamba-2.8b on an H100 ({architecture}, Triton {triton.__version__})\n",
        "Nothing here was measured on a card. `python tools/gpu_estimates.py benchmarks/results/gpu_estimates.md` writes it.\n",
        f"Data sheet: {BANDWIDTH / 1e12:.2f} TB/s, {INT8 / 1e12:.0f} int8 and {BFLOAT16 / 1e12:.0f} bfloat16 operations "
        f"(10^12/s), {ISSUED / 1e9:.0f} warp instructions (10^9/s). Assumed: {OF_BANDWIDTH:.0%} of the bandwidth, "
        f"{OF_PRODUCTS:.0%} of the products, {OF_ISSUED:.0%} of the instructions, {LAUNCH * 1e6:.0f} µs a launch. A kernel "
        "takes the largest of its bytes, its products and (the scan, and what makes codes) its instructions.\n",
        "| scheme | call | launches | bytes, GB | int8 operations, 10^12 | bytes, ms | products, ms | scan, ms | codes, ms"
        " | launches, ms | all, ms | tokens/s |", "| --- | --- |" + " ---: |" * 10,
    ]  # fmt: skip
    kernels: dict[Configuration, list[str]] = {}
    for scheme, (call, lengths) in itertools.product(schemes, CALLS.items()):
        found = launches(scheme, lengths)
        for launch, _ in found:
            at = launch.configuration
            code[at] = code.get(at) or machine_code(at, architecture)
            kernels.setdefault(at, []).append(f"{scheme}: {call}")
        parts, total = dict.fromkeys(("bytes", "products", "scan", "codes"), 0.0), 0.0
        for launch, times in found:
            took = seconds(launch, code[launch.configuration], max(lengths))
            reason = max(took, key=took.__getitem__)
            parts[reason] += times * took[reason]
        count = sum(times for _, times in found)
        total = sum(parts.values()) + count * LAUNCH
        cells = [f"{sum(n * x.bytes for x, n in found) / 1e9:.2f}", f"{sum(n * x.operations for x, n in found) / 1e12:.2f}"]
        cells += [f"{1e3 * part:.2f}" for part in (*parts.values(), count * LAUNCH, total)]
        lines.append(f"| {scheme} | {call} | {count} | {' | '.join(cells)} | {sum(lengths) / total:,.0f} |")
    macs = CONFIG.n_layer * sum(
        np.prod(s) for n, s in MambaConfig(CONFIG.d_model, 1, CONFIG.vocab_size).shapes().items() if "proj.weight" in n
    )
    head = CONFIG.vocab_size * CONFIG.d_model
    lines += [
        "\nFor comparison, the same sizes in 16 bits, products and bytes only, nothing for a scan, norms or launches: prefill "
        f"of 2048 tokens {2048 * 2 * macs / (OF_PRODUCTS * BFLOAT16) * 1e3:.1f} ms, a token of decode "
        f"{2 * (macs + head) / (OF_BANDWIDTH * BANDWIDTH) * 1e3:.2f} ms.\n",
        "| kernel | instructions | with fusion | longest loop | with fusion | registers | bytes of stack | first used by |",
        "| --- |" + " ---: |" * 6 + " --- |",
    ]
    for at, users in kernels.items():
        fused = machine_code(at, architecture, enable_fp_fusion=True) if users[0].startswith(schemes[0]) else None
        exact = code[at]
        lines.append(
            f"| {at.name} | {exact.instructions} | {fused.instructions if fused else ''} | {exact.loop} "
            f"| {fused.loop if fused else ''} | {exact.registers} | {exact.stack} | {users[0]} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--schemes", default="int8,w8-all,int4", help="with commas; the first one's kernels also with fusion")
    arguments = parser.parse_args()
    arguments.out.write_text(report(arguments.arch, arguments.schemes.split(",")), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
