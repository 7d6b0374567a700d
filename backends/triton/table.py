"""Block sizes by shape, fixed: what a tuner may choose, and nothing that a bit depends on."""

from typing import NamedTuple

import triton

from refmamba.spec.codes import BLOCK

INTERPRETED: bool = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1
FEW = 16  # sequences in a step that the fused kernels of decode take; more run as a prefill of one token each


class Blocks(NamedTuple):
    """rows (tokens), columns of the result and of K in a block, and its warps and stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int = 2


def power_of_two(n: int) -> int:
    """The smallest power of two from n on."""
    return 1 << max(n - 1, 0).bit_length()


def row_blocks(rows: int, k: int) -> Blocks:
    """Kernels that go along rows of K: norm, convolution, codes, read back. columns: the whole row, for eq. (6)."""
    width = power_of_two(k)
    if INTERPRETED:
        return Blocks(min(power_of_two(rows), 128), width, width, 1)
    even = k & -k  # the power of two that divides k: if it is large, no column of a block is idle
    return Blocks(1 if width > 256 else 4, width, min(even if even >= 256 else width, 2048), 4 if width > 256 else 1)


def product_blocks(rows: int, n: int, k: int, digits: int, planes: int) -> Blocks:
    """Products of stored codes. rows: tokens; a block has rows * digits rows of digits.

    A block is narrow where its registers would not suffice: short rows of K are dt_proj's, which has eq. (18) after it, and
    digits of more than BLOCK columns are joined more than once, eq. (12).
    """
    if INTERPRETED:
        return Blocks(max(16 // digits, min(power_of_two(rows), 128)), min(power_of_two(max(n, 16)), 256), 128, 1)
    tall = 128 if rows * digits > 64 and digits * planes == 1 else 64 if rows * digits > 32 else 16
    wide = n > 1024 and planes == 1 and 256 < k <= (BLOCK if digits > 1 else k)
    return Blocks(max(tall // digits, 1), 128 if wide else 64, 128 if digits * planes == 1 else 64,
                  8 if tall == 128 else 4, 3)  # fmt: skip


def spread_block(k: int) -> tuple[int, int]:
    """Columns of the result and of K that four warps make bytes of, for the product of a packed weight."""
    return 256 if INTERPRETED else 16, min(max(power_of_two(k), 32), 256)


def step_blocks(rows: int, n: int) -> Blocks:
    """The fused kernels of decode. depth: less for many rows and few columns: those are x_proj's, after the convolution."""
    m = 1 if rows == 1 else 4 if rows <= 4 else FEW
    if INTERPRETED:
        return Blocks(m, min(power_of_two(max(n, 16)), 256), 64, 1)
    return Blocks(m, 64 if n > 16384 else 32 if n > 1024 else 16, 256 if m <= 4 else 128 if n > 1024 else 64, 4)


class ScanBlocks(NamedTuple):
    """channels in a block of one warp, threads that share a channel, and states of a tile: as many, or what one of them loads
    at once."""

    channels: int
    lanes: int
    tile: int


def scan_blocks(sequences: int, channels: int, states: int) -> ScanBlocks:
    """The scan over a call: many lanes a channel where there are few channels, so that there are some five warps for each of
    an H100's 528 schedulers. A block is one warp, so that none waits for another."""
    width, together = power_of_two(states), sequences * channels
    if INTERPRETED:
        return ScanBlocks(min(power_of_two(channels), 2048), width, width)
    if together > 65536:
        return ScanBlocks(32, 1, min(4, width))
    lanes = min(16 if together < 8192 else 8 if together < 16384 else 4, width)
    return ScanBlocks(32 // lanes, lanes, lanes)


def step_tile(states: int) -> int:
    """States of a tile in decode."""
    return power_of_two(states) if INTERPRETED else min(4, power_of_two(states))
