"""How sequences are cut into passes, and the tables of a pass's rows."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refmamba.backends.cpu.memory import address
from refmamba.spec.arith import IntArray
from refmamba.spec.mamba1 import Positions


def passes(lengths: Sequence[int], limit: int) -> list[list[tuple[int, int, int]]]:
    """Cut sequences into passes of at most `limit` tokens, in order: (sequence, first token, end) of each part."""
    result: list[list[tuple[int, int, int]]] = [[]]
    room = limit
    for b, length in enumerate(lengths):
        start = 0
        while start < length:
            if room == 0:
                result.append([])
                room = limit
            stop = min(length, start + room)
            result[-1].append((b, start, stop))
            room -= stop - start
            start = stop
    return result


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a pass: how many there are, of how many the logits are asked for, and the tables that the kernels read."""

    count: int
    out_count: int
    fields: dict[str, int]  # addresses of the tables
    tables: tuple[IntArray, ...]


@functools.lru_cache(8)
def plan(lengths: tuple[int, ...], positions: tuple[Positions, ...]) -> Rows:
    """First row of each sequence, sequence of each row; rows whose logits are asked for, and the same two of those. Kept, as
    every step of a decode has the same."""
    starts = np.cumsum([0, *lengths])
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    firsts = [{"all": 0, "last": n - 1, "none": n}[p] for n, p in zip(lengths, positions, strict=True)]
    chosen = [np.arange(start + first, start + n) for start, first, n in zip(starts, firsts, lengths, strict=False)]
    out_row = np.concatenate(chosen)
    out_starts, out_sequence = np.cumsum([0, *map(len, chosen)]), sequence[out_row]
    tables = {"START": starts, "SEQUENCE": sequence, "OUT_ROW": out_row, "OUT_START": out_starts,
              "OUT_SEQUENCE": out_sequence}  # fmt: skip
    return Rows(len(sequence), len(out_row), {name: address(t) for name, t in tables.items()}, tuple(tables.values()))
