"""What eager PyTorch must not do: wait for the device in every layer, or widen a whole weight."""

import numpy as np
import pytest
from conftest import RandomSource, assert_bits

torch = pytest.importorskip("torch")

from refmamba.backend import load_backend  # noqa: E402
from refmamba.backends.torch_eager import arithmetic  # noqa: E402
from refmamba.spec.mamba1 import Mamba  # noqa: E402
from refmamba.spec.parameters import quantize_model  # noqa: E402
from refmamba.spec.scheme import parse_scheme  # noqa: E402

SCHEMES = ("int8", "w8a8-mlp", "fp32", "llm-int8")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_layer_waits_for_a_value(scheme: str, tiny: RandomSource, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = load_backend("torch").load(quantize_model(tiny, parse_scheme(scheme)))

    def wait(self: object) -> bool:
        raise AssertionError("the host waits for a value of the device")

    for name in ("__bool__", "__int__", "__float__", "item"):
        monkeypatch.setattr(torch.Tensor, name, wait)
    logits, _ = runner.prefill([np.array([1, 2, 3]), np.array([4])])
    assert np.isfinite(logits[0]).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_product_in_parts_has_the_same_bits(scheme: str, tiny: RandomSource, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantize_model(tiny, parse_scheme(scheme))
    monkeypatch.setattr(arithmetic, "int8_product_is_exact", lambda k, device: False)
    monkeypatch.setattr(arithmetic, "PART", 100)
    tokens = [np.array([1, 2, 3])]
    (expected,), _ = Mamba(model).prefill(tokens)
    (found,), _ = load_backend("torch").load(model).prefill(tokens)
    assert_bits(expected, found)
