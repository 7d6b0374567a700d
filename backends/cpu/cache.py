"""Where the compiled kernels are kept, and their import."""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import numba

from refmamba.spec import arith, codes

NUMBA: Any = numba.config
HERE = Path(__file__).resolve().parent


def _cache_folder() -> Path:
    """Where the compiled kernels lie: a folder for these very sources, as numba does not see an imported one change.

    Also for their place and time, and for the processor asked for, by which numba tells its files apart: so a folder that is
    there holds what is needed, and an empty one means that the user waits.
    """
    sources = [*sorted((HERE / "kernels").glob("*.py")), *(Path(str(module.__file__)) for module in (arith, codes))]
    total = hashlib.sha256(f"{NUMBA.CPU_NAME} {NUMBA.CPU_FEATURES}".encode())
    for source in sources:
        total.update(f"{source} {source.stat().st_mtime_ns}".encode() + source.read_bytes())
    digest = total.hexdigest()[:16]
    user = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(user) / "refmamba" / f"kernels-{digest}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="refmamba-kernels-"))


def _import_kernels() -> tuple[Any, Any]:
    # numba asks for its cache folder when a function is decorated.
    before, NUMBA.CACHE_DIR = NUMBA.CACHE_DIR, str(CACHE)
    try:
        from refmamba.backends.cpu.kernels import alone, layers
    finally:
        NUMBA.CACHE_DIR = before
    return alone, layers


CACHE = _cache_folder()
alone, layers = _import_kernels()
