"""What several test files use: models of any shape with random weights."""

import zlib

import numpy as np
import pytest

from refmamba.conformance.comparison import difference
from refmamba.spec.arith import F32Array
from refmamba.spec.config import MambaConfig


class RandomSource:
    """A ParameterSource with random weights that make a stable model; the same for the same config and seed."""

    def __init__(self, config: MambaConfig, seed: int = 0) -> None:
        self.config, self._seed = config, seed

    def read(self, name: str) -> F32Array:
        shape = self.config.shapes()[name]
        rng = np.random.default_rng([self._seed, zlib.crc32(name.encode())])
        if name.endswith("A_log"):
            return np.log(np.tile(np.arange(1, shape[1] + 1, dtype=np.float32), (shape[0], 1)))
        if name.endswith("dt_proj.bias"):
            return rng.uniform(-6, -1, shape).astype(np.float32)
        if name.endswith(("norm.weight", ".D", "norm_f.weight")):
            return rng.uniform(0.5, 1.5, shape).astype(np.float32)
        return rng.normal(0, 0.1, shape).astype(np.float32)


def assert_bits(expected: np.ndarray, array: np.ndarray, name: str = "array") -> None:
    """Two arrays have the same shape, dtype and bits: -0.0 is not 0.0. All NaN are one."""
    wrong, _ = difference("bits", name, expected, array)
    assert wrong is None, str(wrong)


TINY = MambaConfig(d_model=24, n_layer=2, vocab_size=50, d_state=8, dt_rank=3)


@pytest.fixture(scope="session")
def tiny() -> RandomSource:
    """A model of two layers and odd sizes."""
    return RandomSource(TINY)
