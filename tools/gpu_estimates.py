"""What a call of mamba-2.8b costs on a GPU, estimated without one: `python tools/gpu_estimates.py OUT.md [--arch sm_90]`.

From the kernels' SASS: instructions, those of the longest loop, registers. From the launches of a call, recorded as in
compile_kernels.py: how many there are, the bytes of every tensor that a kernel takes, and the products of int8. From them and
the card's data sheet, with the efficiencies below: seconds, which are estimates until benchmarks/gpu.py has measured them.
Beside them what mamba-ssm would take in bfloat16, by the same data sheet.
"""

import argparse
import itertools
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
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
# An H100 SXM by its data sheet: bytes, int8 and bfloat16 operations a second; its multiprocessors, the schedulers of each
# (an instruction of a warp a clock), and the exponentials of each (a thread's, a clock).
BANDWIDTH, INT8, BFLOAT16 = 3.35e12, 1979e12, 989e12
MULTIPROCESSORS, SCHEDULERS, EXPONENTIALS, CLOCK = 132, 4, 16, 1.755e9
# What of it is reached, and the seconds that a launch adds: assumptions.
OF_BANDWIDTH, OF_PRODUCTS, OF_ISSUED, LAUNCH = 0.8, 0.6, 0.8, 2e-6
NOT_READ_WHOLE = ("table_ptr",)
PARTS = ("bytes", "products", "scan", "codes", "other instructions")  # what a kernel may take its time for


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
    """A kernel's machine code: instructions; those on the shortest way from its first to its end, and in its longest and in all
    innermost loops; registers and bytes of a thread's stack."""

    instructions: int
    way: int
    loop: int
    loops: int
    registers: int
    stack: int


def shortest_way(lines: Sequence[tuple[int, str]], jumps: Mapping[int, int]) -> int:
    """Instructions from the first to the end, where every loop is passed once, and no branch is taken that is longer than what
    it goes around: a division's rare cases, and what only the first and the last tokens of a sequence do.

    lines: address and text of each instruction; jumps: where a branch goes to, by its address.
    """
    ways = {math.inf: math.inf}
    following = [*(at for at, _ in lines[1:]), math.inf]
    for (at, text), after in zip(reversed(lines), reversed(following), strict=True):
        choices = [] if text.startswith(("EXIT", "RET", "BRA")) else [ways[after]]
        if "EXIT" in text or text.startswith("RET"):
            choices.append(0)
        if jumps.get(at, 0) > at:
            choices.append(ways[min(to for to in ways if to >= jumps[at])])
        ways[at] = 1 + min(choices, default=math.inf)
    return int(ways[lines[0][0]])


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
    jumps = {at: int(to[1], 16) for at, text in lines if (to := re.search(r"\bBRA.* `?\(?(?:\.L_x_\d+)?(0x[0-9a-f]+)", text))}
    loops = [(to, at) for at, to in jumps.items() if to < at]
    sizes = [sum(first <= line <= last for line, _ in lines) for first, last in loops]
    inner = [not any(first <= a and b <= last and (a, b) != (first, last) for a, b in loops) for first, last in loops]
    registers, stack = (int(re.findall(rf"{word}:(\d+)", usage)[0]) for word in ("REG", "STACK"))
    return Code(len(lines), shortest_way(lines, jumps), max(sizes, default=0), sum(itertools.compress(sizes, inner)), registers,
                stack)  # fmt: skip


def seconds(launch: Launch, code: Code, tokens: int) -> dict[str, float]:
    """What a launch takes for its bytes, its products and, in a prefill, its instructions; the largest counts.

    The scan's longest loop takes LANES tokens at once; a product's loops go along the row, BK columns at once; a kernel for
    codes holds the row. The scheduler that has the most warps to serve is the last to end. In decode the compiler unrolls
    loops by numbers that the code does not tell.
    """
    name, constant = launch.configuration.kernel.__name__, dict(launch.configuration.constants)
    instructions = 0.0
    if name == "scan_kernel":
        instructions = code.loop * tokens / constant["LANES"]
    elif name in ("code_kernel", "spread_kernel"):
        instructions = code.way
    elif constant.get("SOURCE") == "codes":
        instructions = code.way + (triton.cdiv(constant["K"], constant["BK"]) - 1) * code.loops
    warps = triton.cdiv(triton.cdiv(launch.blocks, MULTIPROCESSORS) * launch.configuration.warps, SCHEDULERS)
    return {
        "bytes": launch.bytes / (OF_BANDWIDTH * BANDWIDTH),
        "products": launch.operations / (OF_PRODUCTS * INT8),
        {"scan_kernel": "scan", "code_kernel": "codes"}.get(name, "other instructions"):
            warps * instructions / (OF_ISSUED * CLOCK),
    }  # fmt: skip


def in_16_bits(rows: int) -> dict[str, float]:
    """What a prefill in bfloat16 takes as mamba-ssm computes it, seven kernels a layer, counted in its favour: the scan's
    exponentials and its instructions run at the card's full rate, what it only writes for a backward pass is left out.

    A norm reads and writes d_model values and the float32 residual; the convolution reads and writes d_inner values; the scan
    reads u, delta and z and writes y. For each state of a token the scan takes an exponential and six instructions: delta A,
    delta u B, two in its first pass over h = a h + b, one in its second, and C h.
    """
    d, e, n, r = CONFIG.d_model, CONFIG.d_inner, CONFIG.d_state, CONFIG.dt_rank
    products = {}
    for name, (inputs, outputs) in {"in": (d, 2 * e), "x": (e, r + 2 * n), "dt": (r, e), "out": (e, d)}.items():
        operations, values = 2 * rows * inputs * outputs, rows * (inputs + outputs) + inputs * outputs
        products[name] = max(operations / (OF_PRODUCTS * BFLOAT16), 2 * values / (OF_BANDWIDTH * BANDWIDTH))
    work = rows * e * n / (MULTIPROCESSORS * CLOCK)
    scan = max(work / EXPONENTIALS, work * 6 / (32 * SCHEDULERS), 8 * rows * e / (OF_BANDWIDTH * BANDWIDTH))
    return {
        "products": CONFIG.n_layer * sum(products.values()),
        "scan": CONFIG.n_layer * scan,
        "norm and convolution": CONFIG.n_layer * rows * (12 * d + 4 * e) / (OF_BANDWIDTH * BANDWIDTH),
        "launches": 7 * CONFIG.n_layer * LAUNCH,
    }


def report(architecture: str, schemes: Sequence[str]) -> str:
    """All tables, in Markdown."""
    code: dict[Configuration, Code] = {}
    lines = [
        f"# Estimates for mamba-2.8b on an H100 ({architecture}, Triton {triton.__version__})\n",
        "Nothing here was measured on a card. `python tools/gpu_estimates.py benchmarks/results/gpu_estimates.md` writes it.\n",
        f"Data sheet: {BANDWIDTH / 1e12:.2f} TB/s, {INT8 / 1e12:.0f} int8 and {BFLOAT16 / 1e12:.0f} bfloat16 operations "
        f"(10^12/s), {MULTIPROCESSORS * SCHEDULERS} schedulers that issue {CLOCK / 1e9:.3f} x 10^9 instructions/s "
        f"each. Assumed: {OF_BANDWIDTH:.0%} of the bandwidth, "
        f"{OF_PRODUCTS:.0%} of the products, {OF_ISSUED:.0%} of the instructions, {LAUNCH * 1e6:.0f} µs a launch. A kernel "
        "takes the largest of its bytes, its products and, in a prefill, its instructions, which are those of the "
        "scheduler with the most warps.\n",
        "| scheme | call | launches | bytes, GB | int8 operations, 10^12 | "
        + " | ".join(f"{part}, ms" for part in (*PARTS, "launches", "all")) + " | tokens/s |",
        "| --- | --- |" + " ---: |" * 11,
    ]  # fmt: skip
    kernels: dict[Configuration, list[str]] = {}
    totals: dict[tuple[str, str], float] = {}
    for scheme, (call, lengths) in itertools.product(schemes, CALLS.items()):
        found = launches(scheme, lengths)
        for launch, _ in found:
            at = launch.configuration
            code[at] = code.get(at) or machine_code(at, architecture)
            kernels.setdefault(at, []).append(f"{scheme}: {call}")
        parts = dict.fromkeys(PARTS, 0.0)
        for launch, times in found:
            took = seconds(launch, code[launch.configuration], max(lengths))
            reason = max(took, key=took.__getitem__)
            parts[reason] += times * took[reason]
        count = sum(times for _, times in found)
        total = sum(parts.values()) + count * LAUNCH
        cells = [f"{sum(n * x.bytes for x, n in found) / 1e9:.2f}", f"{sum(n * x.operations for x, n in found) / 1e12:.2f}"]
        cells += [f"{1e3 * part:.2f}" for part in (*parts.values(), count * LAUNCH, total)]
        lines.append(f"| {scheme} | {call} | {count} | {' | '.join(cells)} | {sum(lengths) / total:,.0f} |")
        totals[scheme, call] = total
    macs = CONFIG.n_layer * sum(
        np.prod(s) for n, s in MambaConfig(CONFIG.d_model, 1, CONFIG.vocab_size).shapes().items() if "proj.weight" in n
    )
    head, alone = CONFIG.vocab_size * CONFIG.d_model, 2048 * 2 * macs / (OF_PRODUCTS * BFLOAT16)
    whole = in_16_bits(2048)
    parts_of_it = " + ".join(f"{part} {1e3 * took:.2f}" for part, took in whole.items())
    lines += [
        "\nFor comparison, the same sizes in 16 bits: a token of decode "
        f"{2 * (macs + head) / (OF_BANDWIDTH * BANDWIDTH) * 1e3:.2f} ms for the bytes of its weights; prefill of 2048 tokens "
        f"{1e3 * alone:.1f} ms for its products alone. A whole call as mamba-ssm computes it, in its favour: {parts_of_it} = "
        f"{1e3 * sum(whole.values()):.1f} ms.\n",
        "| scheme | call | products alone in bfloat16 / this | whole call in bfloat16 / this |", "| --- | --- | ---: | ---: |",
    ]  # fmt: skip
    for scheme, (call, times) in itertools.product(schemes, {"prefill 2048": 1, "prefill 2048, batch 16": 16}.items()):
        own, call_in_16 = totals[scheme, call], sum(in_16_bits(2048 * times).values())
        lines.append(f"| {scheme} | {call} | {times * alone / own:.2f} | {call_in_16 / own:.2f} |")
    lines += [
        "\n| kernel | instructions | with fusion | shortest way | longest loop | with fusion | registers | bytes of stack"
        " | first used by |", "| --- |" + " ---: |" * 7 + " --- |",
    ]  # fmt: skip
    for at, users in kernels.items():
        fused = machine_code(at, architecture, enable_fp_fusion=True) if users[0].startswith(schemes[0]) else None
        exact = code[at]
        lines.append(
            f"| {at.name} | {exact.instructions} | {fused.instructions if fused else ''} | {exact.way} | {exact.loop} "
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
