"""Memory for the kernels: aligned arrays, their addresses, and states and logits whose memory is used again."""

import collections
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmamba.backends.cpu.kernels.instructions import LANES
from refmamba.backends.cpu.kernels.tables import LINE

MOST_SPARE = 2**28  # bytes of memory that is kept to be used again
CHUNK = 2**25  # bytes that an arena asks for: NumPy asks the system for huge pages from 4 MB on


def aligned(shape: Sequence[int], dtype: Any = np.float32) -> NDArray[Any]:
    """An uninitialized array on a cache line's boundary, as the kernels' vectors need it."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + LINE, np.uint8)
    start = -address(memory) % LINE
    array: NDArray[Any] = memory[start : start + size].view(dtype).reshape(shape)
    return array


class Arena:
    """Arrays that live as long as a model, side by side in large chunks of memory.

    So they lie in huge pages, where the system has them: a small page is read in a tenth of a microsecond, and looking up where
    the next one lies takes a good part of that.
    """

    def __init__(self) -> None:
        self._free = np.empty(0, np.uint8)

    def empty(self, shape: Sequence[int], dtype: Any) -> NDArray[Any]:
        """An uninitialized array on a cache line's boundary."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size > len(self._free):
            self._free = aligned((max(size, CHUNK),), np.uint8)
        array: NDArray[Any] = self._free[:size].view(dtype).reshape(shape)
        self._free = self._free[size + -size % LINE :]
        return array

    def copy(self, array: NDArray[Any]) -> NDArray[Any]:
        """A copy of an array on a cache line's boundary."""
        copy = self.empty(array.shape, array.dtype)
        copy[...] = array
        return copy


def address(array: NDArray[Any]) -> int:
    """Where an array's values begin."""
    return int(array.__array_interface__["data"][0])


def strips_of(channels: int) -> int:
    """Strips of 16 that hold so many channels."""
    return -(-channels // LANES)


class Lease:
    """A pool's memory, given back when the last array on it is gone."""

    def __init__(self, pool: "Pool", memory: NDArray[np.uint8]) -> None:
        self._pool, self._memory = pool, memory
        self.__array_interface__ = memory.__array_interface__

    def __del__(self) -> None:
        if self._memory.size <= MOST_SPARE:
            self._pool.spare.append(self._memory)


class Pool:
    """Memory of states, or of logits, to be used again: the system's new pages cost more than what fills them."""

    def __init__(self) -> None:
        self.spare: collections.deque[NDArray[np.uint8]] = collections.deque(maxlen=2)

    def take(self, size: int) -> NDArray[np.uint8]:
        """`size` bytes on a cache line's boundary, uninitialized."""
        if size == 0:
            return np.empty(0, np.uint8)
        try:
            memory = self.spare.pop()
        except IndexError:
            memory = np.empty(0, np.uint8)
        if not size <= memory.size <= 2 * size:
            memory = aligned((size,), np.uint8)
        return np.asarray(Lease(self, memory))[:size]
