"""The folder of compiled kernels: it follows every source, and the backend works where none can be written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import platformdirs
import pytest

from refmamba.backends.cpu import cache

ROOT = Path(__file__).resolve().parents[1]
RUN = """
import hashlib
import numpy as np
from conftest import TINY, RandomSource
from refmamba.backend import load_backend
from refmamba.spec.parameters import quantize_model
from refmamba.spec.scheme import LINEAR_LAYERS, Quantizer, Scheme
weights = {f"{layer}.weight": Quantizer(8, "per_tensor") for layer in LINEAR_LAYERS}
scheme = Scheme("dynamic", weights, dict.fromkeys(LINEAR_LAYERS, Quantizer(8, "per_token")))
model = quantize_model(RandomSource(TINY), scheme)
for name in ("reference", "cpu"):
    logits = load_backend(name).load(model).prefill([np.arange(9)], logits="all")[0][0]
    print(hashlib.sha256(logits.tobytes()).hexdigest())
"""


def run(package: Path, **variables: str) -> tuple[list[str], str]:
    """Hashes of the reference's and the cpu backend's logits by a copy of the package in a process of its own; its stderr."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(package), str(ROOT / "tests")])} | variables
    done = subprocess.run([sys.executable, "-c", RUN], cwd=package, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split(), done.stderr


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder with a copy of the package."""
    shutil.copytree(ROOT / "refmamba", tmp_path / "copy" / "refmamba", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "copy"


@pytest.mark.ci
def test_a_changed_constant_reaches_the_kernels(copied: Path, tmp_path: Path) -> None:
    """The kernels are compiled with ABSMAX_ZERO, of another file. Some activations are below 2^-4, no matrix is."""
    before, _ = run(copied, NUMBA_CACHE_DIR=str(tmp_path))
    source = copied / "refmamba" / "spec" / "codes.py"
    text = source.read_text(encoding="utf-8")
    assert text.count("ABSMAX_ZERO = f32(2.0**-100)") == 1
    source.write_text(text.replace("ABSMAX_ZERO = f32(2.0**-100)", "ABSMAX_ZERO = f32(2.0**-4)"), encoding="utf-8")
    after, _ = run(copied, NUMBA_CACHE_DIR=str(tmp_path))
    assert len(set(before)) == len(set(after)) == 1
    assert before != after


def test_the_key_covers_every_module_that_the_kernels_load() -> None:
    """Beside the walk over the sources, Python's own list of what is loaded. Packages are loaded only for their members."""
    code = f"import sys, {', '.join(cache.ENTRIES)}\nprint(*(m.__file__ for n, m in sys.modules.items() if 'refmamba.' in n))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    modules = {Path(file).resolve() for file in loaded if not file.endswith("__init__.py")}
    assert len(modules) > 15
    assert modules <= {source.resolve() for source in cache.sources()}


def test_a_change_far_away_changes_the_key(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """errors.py is imported by what the kernels import. Its time stays."""
    monkeypatch.setattr(cache, "PACKAGE", copied / "refmamba")
    before, source = cache.key(), copied / "refmamba" / "errors.py"
    times = source.stat()
    source.write_bytes(source.read_bytes() + b"\n")
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert cache.key() != before


def test_a_source_that_is_missing_is_an_error(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "PACKAGE", copied / "refmamba")
    cache.key()
    (copied / "refmamba" / "errors.py").unlink()
    with pytest.raises(FileNotFoundError, match=r"refmamba\.errors has no source"):
        cache.key()


def test_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "numba"))
    assert cache.cache_folder()[0].parent == tmp_path / "numba" / "refmamba"
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "home" / name)
    assert cache.cache_folder()[0].parent == tmp_path / "home" / "refmamba"


@pytest.mark.ci
def test_where_no_cache_can_be_written(copied: Path, tmp_path: Path) -> None:
    """Files stand where the folders would be: the chosen one, the user's, and the one beside the source of the reference's
    scan. The folder that serves instead is gone when the process is."""
    file, scratch = tmp_path / "file", tmp_path / "scratch"
    scratch.mkdir()
    for blocked in (file, copied / "refmamba" / "spec" / "__pycache__"):
        blocked.touch()
    hashes, said = run(copied, NUMBA_CACHE_DIR=str(file), XDG_CACHE_HOME=str(file), HOME=str(file), TMPDIR=str(scratch))
    assert len(set(hashes)) == 1
    assert said.startswith("compiling the CPU kernels")
    assert list(scratch.iterdir()) == []
