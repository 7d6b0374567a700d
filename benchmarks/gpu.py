"""refmamba on one GPU, in at most 480 seconds: `python benchmarks/gpu.py [--out results/gpu.json]`.

What is measured: the copy bandwidth; verify on the small model; a CUDA graph against single launches; prefill and decode of the
published sizes with random codes; what exactness costs (the same kernels, with fused multiply-adds allowed); documents of an
evaluation; mamba-ssm where it is installed. The file is written after every line, so an end that comes early leaves what there
was; what the time did not allow is named. The exit status is 1 where a line of refmamba's own failed. --dry-run does all of it
at toy size on the CPU, in Triton's interpreter: no line is tried first on a GPU.
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

BUDGET = 480.0  # seconds
REPEATS = 3  # the fastest counts
RESULTS = Path(__file__).resolve().parent / "results" / "gpu.json"


class Report:
    """The lines so far, in a file; and the clock."""

    def __init__(self, file: Path, budget: float) -> None:
        self.file, self.budget, self.begin = file, budget, time.perf_counter()
        self.lines: dict[str, Any] = {}

    def line(self, name: str, seconds: float, measure: Callable[[], Any]) -> None:
        """Measure something that takes about so many seconds, if there is time. An error is a result too."""
        if time.perf_counter() - self.begin + seconds > self.budget:
            value: Any = "not measured: no time was left"
        else:
            try:
                value = measure()
            except Exception as error:  # the other lines are still worth their time
                value = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        self.lines[name] = value
        print(f"{time.perf_counter() - self.begin:6.1f} s  {name}: {json.dumps(value)}", flush=True)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.lines, indent=1) + "\n", encoding="utf-8")


def fastest_of(repeats: int, run: Callable[[], Any]) -> float:
    """Seconds of the fastest run, after one that compiles. A run ends with logits on the host, or waits itself."""
    run()
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        found.append(time.perf_counter() - begin)
    return min(found)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU")
    arguments = parser.parse_args()
    if arguments.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton's import
    report = Report(arguments.out, math.inf if arguments.dry_run else BUDGET)
    measure_all(report, arguments.dry_run)
    failed = [name for name, value in report.lines.items() if str(value).startswith("failed") and "mamba-ssm" not in name]
    return int(bool(failed))


def measure_all(report: Report, dry: bool) -> None:
    """Every line, the cheap and the telling ones first."""
    import torch
    import triton

    from refmamba.backends.mamba_ssm.kernels import load_kernels
    from refmamba.backends.triton.backend import Triton
    from refmamba.backends.triton.launch import launch
    from refmamba.backends.triton.model import Mamba
    from refmamba.conformance.verify import run_checks
    from refmamba.eval_tasks.score import score, token_request
    from refmamba.spec.codes import Codes, FixedPoint, Param
    from refmamba.spec.config import MambaConfig, kind_of
    from refmamba.spec.parameters import QuantizedModel, parameter_coder
    from refmamba.spec.scheme import Scheme, parse_scheme

    backend = Triton(None)
    device = torch.device(backend.device)
    fastest = partial(fastest_of, 1 if dry else REPEATS)

    class Random(Mapping[str, Param]):
        """Parameters with random codes, each row the same: what a kernel's time does not depend on."""

        def __init__(self, config: MambaConfig, scheme: Scheme) -> None:
            self.scheme, self.rng = scheme, np.random.default_rng(0)
            self.shapes = {"lm_head.weight": (config.vocab_size, config.d_model)} | config.shapes()

        def __getitem__(self, name: str) -> Param:
            shape, coder = self.shapes[name], parameter_coder(kind_of(name), self.scheme)
            if coder is None:
                if name.endswith("A_log"):
                    return np.broadcast_to(np.log(np.arange(1, shape[1] + 1, dtype=np.float32)), shape)
                return np.full(shape, -4 if name.endswith("dt_proj.bias") else 1, np.float32) if len(shape) == 1 else (
                    np.broadcast_to(self.rng.standard_normal(shape[-1:], np.float32), shape))  # fmt: skip
            if coder.bits > 8:
                q = self.rng.integers(-(2**20), 2**20, shape[-1:], np.int32)
                return FixedPoint(np.broadcast_to(q, shape), np.full(shape[0], 26, np.int32))
            largest = 2 ** (coder.bits - 1) - 1
            q8 = self.rng.integers(-largest, largest, shape[-1:], np.int8)
            return Codes(np.broadcast_to(q8, shape), np.full(coder.scale_shape(shape), 20 * largest, np.float32), coder.bits)

        def __iter__(self) -> Iterator[str]:
            return iter(self.shapes)

        def __len__(self) -> int:
            return len(self.shapes)

    def runner(width: int, depth: int, scheme: str, start: Any = launch) -> Mamba:
        config = MambaConfig(width, depth, 64 if dry else 50280)
        return Mamba(QuantizedModel(config, parse_scheme(scheme), Random(config, parse_scheme(scheme))), device, start)

    def load(kept: dict[str, Mamba], width: int, depth: int, scheme: str) -> dict[str, float]:
        begin = time.perf_counter()
        kept["m"] = runner(width, depth, scheme)
        wait()
        return {"seconds": time.perf_counter() - begin}

    def fused(kernel: Any, grid: tuple[int, ...], warps: int, stages: int = 2, /, **values: Any) -> None:
        kernel[grid](**values, num_warps=warps, num_stages=stages, enable_fp_fusion=True)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def versions() -> dict[str, str]:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
        return {"device": name, "torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version(),
                "numpy": np.__version__}  # fmt: skip

    def bandwidth() -> float:
        x = torch.zeros(1 << (16 if dry else 28), dtype=torch.int32, device=device)
        y = torch.empty_like(x)

        def copy() -> None:
            y.copy_(x)
            wait()

        return 8 * x.numel() / fastest(copy)

    def verify() -> str:
        schemes = ["int8"] if dry else ["int8", "w8-all", "w4-all", "fp32"]
        failed = [str(first) for _, first in run_checks(backend, schemes, None if dry else "small", quick=dry) if first]
        return failed[0] if failed else "every bit is the specification's"

    def prefill(model: Mamba, length: int, batch: int) -> dict[str, float]:
        tokens = [np.arange(length) % 64] * batch
        seconds = fastest(lambda: model.prefill(tokens))
        return {"seconds": seconds, "tokens_per_second": length * batch / seconds}

    def decode(model: Mamba, batch: int, graph: bool = True) -> dict[str, float]:
        tokens, count = np.arange(batch), 1 if dry else 32

        def run() -> None:
            state = model.initial_state(batch)
            for _ in range(count):
                step = model.step if graph else lambda t, s: model.prefill([t[i : i + 1] for i in range(batch)], s)
                _, state = step(tokens, state)

        seconds = fastest(run) / count
        return {"seconds_per_step": seconds, "tokens_per_second": batch / seconds}

    def inexact(width: int, depth: int) -> dict[str, float]:
        return decode(runner(width, depth, "int8", fused), 1)

    def evaluation(width: int, depth: int) -> dict[str, float]:
        """Documents of four choices, of the lengths that HellaSwag has, and what is drawn for them."""
        rng, model = np.random.default_rng(1), runner(width, depth, "int8")
        wanted = []
        for _ in range(2 if dry else 64):
            context = rng.integers(0, 64, 4 if dry else rng.integers(30, 120)).tolist()
            choices = [rng.integers(0, 64, 2 if dry else rng.integers(8, 40)).tolist() for _ in range(4)]
            wanted += [token_request(context, choice, 2048, "") for choice in choices]
        seconds = fastest(lambda: score(model, backend, wanted))
        return {"seconds": seconds, "documents_per_second": len(wanted) / 4 / seconds}

    report.line("versions", 1, versions)
    report.line("copy, bytes per second", 5, bandwidth)
    report.line("verify", 90, verify)
    sizes = {"130m": (24, 1)} if dry else {"130m": (768, 24), "1.4b": (2048, 48), "2.8b": (2560, 64)}
    lengths, batches = ((3,), (1, 2)) if dry else ((512, 2048), (1, 16))
    for size, (width, depth) in sizes.items():
        schemes = ("int8", "w4-all") if dry else ("int8", "w8-all", "w4-all", "fp32") if size == "130m" else ("int8", "w4-all")
        for scheme in schemes:
            kept: dict[str, Mamba] = {}
            report.line(f"{size} {scheme}: load", 10, partial(load, kept, width, depth, scheme))
            if "m" not in kept:
                continue
            for batch in batches:
                report.line(f"{size} {scheme}: decode, batch {batch}", 5, partial(decode, kept["m"], batch))
                for length in lengths:
                    report.line(f"{size} {scheme}: prefill {length}, batch {batch}", 8,
                                partial(prefill, kept["m"], length, batch))  # fmt: skip
            if size == "130m":
                report.line(f"{size} {scheme}: decode without a graph", 5, partial(decode, kept["m"], 1, graph=False))
        report.line(f"{size} int8: decode, not exact (fused)", 15, partial(inexact, width, depth))
        if size == "1.4b" or dry:
            report.line(f"{size} int8: evaluation of {2 if dry else 64} documents", 40, partial(evaluation, width, depth))

    def mamba_ssm(width: int, depth: int, dtype: Any, length: int) -> dict[str, Any]:
        kernels = load_kernels()  # or the line that says what is missing
        from mamba_ssm.models.config_mamba import MambaConfig as TheirConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

        model = MambaLMHeadModel(TheirConfig(d_model=width, n_layer=depth, vocab_size=50280), device=device, dtype=dtype).eval()
        ids = torch.zeros(1, length, dtype=torch.long, device=device)

        def run() -> None:
            with torch.inference_mode():
                model(ids, num_last_tokens=1)
            wait()

        def write() -> None:
            with torch.inference_mode():
                model.generate(input_ids=ids[:, :1], max_length=33, cg=True)
            wait()

        return {"packages": kernels.packages, "prefill_seconds": fastest(run), "decode_seconds_per_step": fastest(write) / 32}

    for size, (width, depth) in sizes.items():
        for dtype in (torch.bfloat16, torch.float16):
            report.line(f"{size} mamba-ssm {str(dtype).removeprefix('torch.')}", 20,
                        partial(mamba_ssm, width, depth, dtype, max(lengths)))  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
