"""Implementations of the specification. Names as text only: a backend is imported when it is asked for.

A backend imports `refmamba.backend`, `refmamba.spec` and its own files, never another backend.
"""

from typing import NamedTuple


class Entry(NamedTuple):
    """One backend: where its class is, the extra of the package that installs what it needs, and what it is in a line."""

    path: str
    extra: str
    about: str


BACKENDS = {
    "reference": Entry("refmamba.backends.reference:Reference", "", "the specification itself, NumPy"),
    "cpu": Entry("refmamba.backends.cpu.backend:Cpu", "", "numba kernels on packed codes, fast"),
    "torch": Entry("refmamba.backends.torch_eager.backend:Torch", "torch", "eager PyTorch, on a CPU or a GPU"),
    "triton": Entry("refmamba.backends.triton.backend:Triton", "triton", "Triton kernels, fast on a CUDA GPU"),
    "mamba-ssm": Entry("refmamba.backends.mamba_ssm.backend:MambaSsm", "torch", "the official kernels, bfloat16, not exact"),
    "mamba-ssm-float16": Entry("refmamba.backends.mamba_ssm.backend:MambaSsmFloat16", "torch", "the same in float16"),
    "mamba-ssm-float32": Entry("refmamba.backends.mamba_ssm.backend:MambaSsmFloat32", "torch", "the same in float32"),
}
DEFAULT_BACKEND = "cpu"
