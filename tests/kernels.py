"""A stranger's kernels: what `refmamba verify --operations` and `--backend` are given in the tests."""

from typing import Any

import numpy as np

from refmamba.backends.reference import Reference
from refmamba.spec import codes, ops


def off_by_a_bit(*arguments: Any) -> Any:
    """A selective scan whose output is an ulp or two too large."""
    y, h = ops.selective_scan(*arguments)
    return (y * np.float32(1.0000001)).astype(np.float32), h


class OnlyScan:
    def operations(self) -> Any:
        return {"selective_scan": off_by_a_bit}


class Right:
    def operations(self) -> Any:
        return {"gate": ops.gate, "code_static": codes.code_static, "pack4": codes.pack4}


class Misspelled:
    def operations(self) -> Any:
        return {"selectiv_scan": off_by_a_bit}


class Breaks:
    def operations(self) -> Any:
        return {"silu": lambda x: 1 / 0}


class Nothing:
    pass


class Offers:
    """No backend: it lacks most parts."""

    def __init__(self, device: str | None = None) -> None:
        pass

    def operations(self) -> Any:
        return {"silu": library_silu}


class NoDevice(Reference):
    def __init__(self) -> None:
        super().__init__()


class BreaksAtStart(Reference):
    def __init__(self, device: str | None = None) -> None:
        raise ValueError("no accelerator")


class BreaksInside(Reference):
    def load(self, model: Any) -> Any:
        raise ZeroDivisionError("not today")


class Float(Reference):
    """A float backend."""

    exact = False

    def load(self, model: Any) -> Any:
        from refmamba.conformance.replaced import ReplacedRunner

        return ReplacedRunner(model, {"silu": library_silu})

    def operations(self) -> Any:
        return {"silu": library_silu}


def library_silu(x: Any) -> Any:
    return x / (1 + np.exp(-x))


def half_silu(x: Any) -> Any:
    """In 16 bits."""
    x = x.astype(np.float16)
    return x / (np.float16(1) + np.exp(-x))


def torch_silu(x: Any) -> Any:
    import torch

    return torch.nn.functional.silu(x)


def bfloat16_silu(x: Any) -> Any:
    import torch

    return torch.nn.functional.silu(x.to(torch.bfloat16))


def in_place(x: Any) -> Any:
    x.mul_(2)
    return x


for kernel in (torch_silu, bfloat16_silu, in_place):
    vars(kernel)["tensors"] = "torch"


class Tensors:
    """A class that asks for tensors, codes included."""

    tensors = "torch"

    def operations(self) -> Any:
        return {"rescale": self.rescale}

    def rescale(self, acc: Any, x: Any, w: Any) -> Any:
        import torch

        assert all(isinstance(v, torch.Tensor) for v in (acc, x.q, w.q))
        as_codes = [
            codes.Codes(c.q.numpy(), c.scale.numpy(), c.bits) if hasattr(c, "scale")
            else codes.FixedPoint(c.q.numpy(), c.exponent.numpy())
            for c in (x, w)
        ]  # fmt: skip
        return torch.from_numpy(codes.rescale(acc.numpy(), *as_codes))
