"""Where the compiled kernels are kept, and their import.

numba keeps what it compiles in a folder that it asks for when a function is decorated, and compiles anew when the file of
the decorated function changes. A function or a constant that the file imports can change without its notice: so the
folder's name holds a hash of every source that the kernels import, and the kernels are imported here and nowhere else.
"""

import ast
import hashlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import platformdirs

from refmamba.spec.jit import SETTINGS, numba

PACKAGE = Path(__file__).parents[2]  # refmamba
ENTRIES = ("refmamba.backends.cpu.kernels.alone", "refmamba.backends.cpu.kernels.layers")  # what numba keeps on disk


def source_of(module: str) -> Path | None:
    """The file of one of refmamba's modules; None where there is no module of that name."""
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def imported(source: Path) -> set[str]:
    """The names of refmamba's modules that a file imports, by name or as `from PACKAGE import MODULE`."""
    names = set[str]()
    for node in ast.walk(ast.parse(source.read_bytes(), str(source))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= {node.module, *(name for name in members if source_of(name))}
    return {name for name in names if name.partition(".")[0] == PACKAGE.name}


def sources() -> list[Path]:
    """The files of the kernels and of all that they import from refmamba. Raises FileNotFoundError where one is missing."""
    files, left = dict[str, Path](), set(ENTRIES)
    while left:
        name = left.pop()
        source = source_of(name)
        if source is None:
            raise FileNotFoundError(f"{name} has no source, on which the name of the folder of compiled kernels depends")
        files[name] = source
        left |= imported(source) - set(files)
    return [files[name] for name in sorted(files)]


def key() -> str:
    """A name for what is compiled from these very sources, by this Python and numba, for the processor asked for.

    numba tells its files apart by the sources' place and time as well. So a folder that is there holds what is needed, and
    an empty one means that the user waits.
    """
    total = hashlib.sha256(f"{sys.version} {numba.__version__} {SETTINGS.CPU_NAME} {SETTINGS.CPU_FEATURES}".encode())
    for source in sources():
        total.update(f"{source} {source.stat().st_mtime_ns}".encode() + source.read_bytes())
    return total.hexdigest()[:16]


def cache_folder() -> tuple[Path, Any]:
    """A folder for the compiled kernels, and what removes it when this process ends, where no lasting one can be written."""
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    parent = Path(chosen) / "refmamba" if chosen else platformdirs.user_cache_path("refmamba")
    folder = parent / f"kernels-{key()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder, None
    except OSError:
        temporary = tempfile.TemporaryDirectory(prefix="refmamba-kernels-")
        return Path(temporary.name), temporary


def _import_kernels() -> tuple[Any, Any]:
    before, SETTINGS.CACHE_DIR = SETTINGS.CACHE_DIR, str(CACHE)
    try:
        from refmamba.backends.cpu.kernels import alone, layers
    finally:
        SETTINGS.CACHE_DIR = before
    return alone, layers


CACHE, _REMOVES_CACHE = cache_folder()
alone, layers = _import_kernels()
