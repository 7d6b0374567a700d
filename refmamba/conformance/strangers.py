"""A stranger's operations: found by name, and called with the arrays that they ask for."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np

from refmamba.backend import stranger, strangers_error
from refmamba.errors import BackendError
from refmamba.spec.operations import OPERATIONS

TENSORS = ("numpy", "torch")


def load_operations(text: str, device: str | None = None) -> dict[str, Callable[..., Any]]:
    """`module:Class`, `module:object` or `name=module:function`: the operations by name.

    A class is called without arguments; what it makes, or the object, has `operations()`, which gives {name: function}. An
    attribute `tensors = "torch"` of the function, or of the class or object, asks for torch tensors, which lie on `device`.
    Raises BackendError.
    """
    name, equals, path = text.rpartition("=")
    value = stranger(path)
    if equals:
        offered: Any = {name: value}
        source: Any = value
    else:
        with strangers_error(path):
            source = value() if inspect.isclass(value) else value
        if not callable(getattr(source, "operations", None)):
            raise BackendError(f"{path} has no operations(), which gives {{name: function}}; a single function is NAME={path}")
        with strangers_error(path):
            offered = source.operations()
    if not isinstance(offered, Mapping) or not offered:
        raise BackendError(f"{path}: operations() gives no {{name: function}} with at least one operation")
    for operation, function in offered.items():
        if operation not in OPERATIONS:
            near = difflib.get_close_matches(str(operation), OPERATIONS, 1, 0)
            raise BackendError(f"{path}: there is no operation '{operation}'; the nearest is '{near[0]}'")
        if not callable(function):
            raise BackendError(f"{path}: '{operation}' is no function but {type(function).__name__}")
    return {operation: called_with(function, source, path, device) for operation, function in offered.items()}


def called_with(function: Callable[..., Any], source: Any, path: str, device: str | None) -> Callable[..., Any]:
    """A function that takes and gives NumPy arrays, whatever it asks for."""
    tensors = getattr(function, "tensors", getattr(source, "tensors", "numpy"))
    if tensors not in TENSORS:
        raise BackendError(f"{path} asks for tensors = {tensors!r}; there are {', '.join(TENSORS)}")
    if tensors == "numpy":
        if device not in (None, "cpu"):
            raise BackendError(f"{path} takes NumPy arrays, which lie on 'cpu', not on '{device}'")
        return function
    try:
        import torch
        import torch.utils.dlpack
    except ImportError as error:
        raise BackendError(f"{path} asks for torch tensors: pip install 'refmamba[torch]'") from error
    try:
        place = torch.zeros(1, device=device or "cpu").device
    except (RuntimeError, AssertionError) as error:
        raise BackendError(f"the device '{device}' is not there: {str(error).splitlines()[0]}") from error

    def to_torch(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return torch.utils.dlpack.from_dlpack(np.array(value, order="C")).to(
                place
            )  # a copy: a view of ours may be read-only
        return _mapped(value, to_torch)

    def to_numpy(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu()
            return np.from_dlpack(value.float() if value.dtype == torch.bfloat16 else value.contiguous())
        return _mapped(value, to_numpy)

    def operation(*arguments: Any) -> Any:
        before = [to_torch(argument) for argument in arguments]
        result = to_numpy(function(*before))
        for argument, tensor in zip(arguments, before, strict=True):
            if isinstance(argument, np.ndarray):
                after = to_numpy(tensor)
                if after.tobytes() != argument.tobytes():
                    argument[...] = after  # so that whoever compares sees the change
        return result

    return operation


def widened(function: Callable[..., Any]) -> Callable[..., Any]:
    """A float kernel whose results of 16 bits are given in 32, which is what the operations around it take."""

    def widen(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return value.astype(np.float32) if value.dtype == np.float16 else value
        return _mapped(value, widen)

    def operation(*arguments: Any) -> Any:
        return widen(function(*arguments))

    return operation


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Codes, tuples and lists with each of their arrays changed."""
    if isinstance(value, tuple | list):
        return tuple(change(item) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: change(getattr(value, field.name)) for field in fields(value)})
    return value
