"""Faults planted in the Triton kernels, and what sees each: docs/GPU.md has them as a table."""

import importlib
import sys
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import torch

from refmamba.backends.triton.kernels import alone


class Fault(NamedTuple):
    """An edit of a module of kernels, the kernel that shows it, its grid and its arguments beside x and y; and who sees it.

    interpreter: its bits are others in Triton's interpreter. text: what compile_kernels.faults finds begins so; "": nothing.
    run: its bits are others where its PTX is run on NumPy, which is asked only where the text is as good as before.
    """

    module: str
    old: str
    new: str
    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    interpreter: bool
    text: str = ""
    run: bool = False

    @property
    def found(self) -> str:
        """The columns of docs/GPU.md's table."""
        return f"{'found' if self.interpreter else ''} | {f'found: {self.text}' if self.text else ''} | {'found' * self.run}"


def elementwise(op: str) -> dict[str, Any]:
    """Arguments of elementwise_kernel."""
    return {"z_ptr": None, "n": 600, "largest": 0.0, "BLOCK": 1024, "OP": op}


SHAPE = (6, 100)  # of x
NORM: dict[str, Any] = {"weight_ptr": torch.ones(100), "eps": 1e-5, "rows": 6, "K": 100, "M": 4, "WIDTH": 128}
SUM: dict[str, Any] = {"rows": 6, "K": 100, "M": 4, "WIDTH": 128}
FAULTS = {
    "`x / y` instead of `div_rn`":
        Fault("arithmetic", "tl.div_rn(x, tl.broadcast_to(y, x.shape))", "x / y", "elementwise_kernel", (1,),
              elementwise("silu"), interpreter=False, text="div.full"),
    "`tl.sqrt` instead of `sqrt_rn`":
        Fault("layers", "tl.sqrt_rn(mean + eps)", "tl.sqrt(mean + eps)", "rms_norm_kernel", (2,), NORM,
              interpreter=False, text="sqrt.approx"),
    "`tl.exp` instead of (1)":
        Fault("arithmetic", "divide(x, 1.0 + exp(-x))", "divide(x, 1.0 + tl.exp(-x))", "elementwise_kernel", (1,),
              elementwise("silu"), interpreter=True, text="ex2.approx"),
    "`tl.maximum` of floats":
        Fault("arithmetic", "tl.where(x < 0.0, 0.0, x) + log1p", "tl.maximum(x, 0.0) + log1p", "elementwise_kernel", (1,),
              elementwise("softplus"), interpreter=True, text="max.f32"),
    "`tl.max` of floats":
        Fault("alone", "shifted = x - m", "shifted = x - tl.max(x, 0)", "log_softmax_kernel", (6,), {"N": 100, "WIDTH": 128},
              interpreter=False, text="max"),
    "`tl.sum` of floats":
        Fault("alone", "tree(x, M, WIDTH), mask", "tl.sum(x, 1), mask", "tree_sum_kernel", (2,), SUM,
              interpreter=True, run=True),
    "the tree (6) in another order":
        Fault("arithmetic", "first, second = tl.split(tl.permute(tl.reshape(x, [ROWS, 2, half]), (0, 2, 1)))",
              "first, second = tl.split(tl.reshape(x, [ROWS, half, 2]))", "tree_sum_kernel", (2,), SUM,
              interpreter=True, run=True),
}  # fmt: skip


def planted(folder: Path, fault: Fault) -> Any:
    """The kernel in a copy of the kernels with one edit."""
    package = folder / f"planted_{uuid.uuid4().hex}"
    package.mkdir()
    for file in Path(str(alone.__file__)).parent.glob("*.py"):
        text = file.read_text("utf-8").replace("refmamba.backends.triton.kernels", package.name)
        if file.stem == fault.module:
            assert text.count(fault.old) == 1
            text = text.replace(fault.old, fault.new)
        (package / file.name).write_text(text, "utf-8")
    sys.path.insert(0, str(folder))
    try:
        return getattr(importlib.import_module(f"{package.name}.alone"), fault.kernel)
    finally:
        sys.path.remove(str(folder))
