"""The official kernels, and which piece of them is missing: told by trying, since versions do not tell."""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from refmamba.backend import told
from refmamba.errors import BackendError, printable

INSTALL = "MAMBA_KEEP_CUDA_BUILD=TRUE pip install mamba-ssm causal-conv1d --no-build-isolation"
AGAIN = INSTALL.replace("install", "install --force-reinstall --no-deps --no-cache-dir")
EXTENSIONS = {"mamba_ssm": "selective_scan_cuda", "causal_conv1d": "causal_conv1d_cuda"}


@dataclass(frozen=True)
class Kernels:
    """The functions of the packages; packages: those, with their versions."""

    scan: Callable[..., tuple[Tensor, Tensor]]
    scan_step: Callable[..., Tensor]
    conv: Callable[..., Tensor]
    conv_step: Callable[..., Tensor]
    packages: str


def release(package: str) -> str:
    """A package's name and version."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return package


def check_extension(package: str, extension: str) -> None:
    """Raise BackendError where a package, or the compiled part of it, is not there or cannot be loaded.

    The packages themselves do not tell: mamba_ssm does without causal_conv1d in silence, and in some versions without its own
    scan until that is called.
    """
    if importlib.util.find_spec(package) is None:
        raise BackendError(f"{package} is not installed: {INSTALL}")
    try:
        importlib.import_module(extension)
    except ModuleNotFoundError as error:
        raise BackendError(f"{release(package)} was installed without its CUDA kernels ({extension}): {AGAIN}") from error
    except ImportError as error:
        _, undefined, symbol = str(error).partition("undefined symbol: ")
        cause = f"is for another PyTorch than the {torch.__version__} here" if undefined else "cannot be loaded"
        detail = printable(undefined + symbol if undefined else str(error), 48)  # so that the line has room for the command
        raise BackendError(f"{extension} of {release(package)} {cause} ({detail}): {AGAIN}") from error


def load_kernels() -> Kernels:
    """Find the kernels. Raises BackendError, which names the piece that is missing and how it is installed."""
    for package, extension in EXTENSIONS.items():
        check_extension(package, extension)
    packages = ", ".join(release(package) for package in EXTENSIONS)
    try:
        from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update
    except Exception as error:  # they import much that they do not need here, and that may be of another version
        raise BackendError(f"{packages} cannot be imported: {told(error)}") from error
    return Kernels(selective_scan_fn, selective_state_update, causal_conv1d_fn, causal_conv1d_update, packages)
