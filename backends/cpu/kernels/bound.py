"""The bound on a panel sum's error: by it a product is rounded to float32 without its exact sum (docs/CPU.md).

A sum of products x w is made in panels, of float64 values: the codes of x are at most 2^30, those of w 2^22, so the products
are exact. Let u = 2^-53, S the sum of |x w|, and P = ceil(K / PANEL).
- In a panel each addition is off by at most u times the panel's part of S; so are all panels together by PANEL u S. The P
  additions of the panels' sums are off by u S each. Together (PANEL + P) u S.
- Eq. (12) joins each block once and adds ceil(K / BLOCK) <= P blocks: at most (P + 1) u S.
- Adding and taking off the bound, to see whether the rounding is open, is off by u S, once each way.
That is PANEL + 2 P + 2 of the PANEL + 2 P + 16 units that `sum_error` has; the rest is far more than the squares of u, which
were left out, for any K that fits a memory.

S is at most the product of the norms of x and w, and those are computed with roundings of their own.
- w's is a float64 sum of exact squares, rounded to float32, then multiplied by `sum_error`, of float32 too: four roundings of
  at most 2^-24. WEIGHT_NORM_ROOM holds 16,000 of them.
- x's is a float32 sum in 16 lanes: each of the K / 16 additions and one product are off by 2^-24 of what is positive, then
  come four levels of the tree. The root halves that: (K / 16 + 5) 2^-25, and two roundings more. ROW_NORM_ROOM holds it for
  every K up to 2^22.
"""

import math

import numpy as np

from refmamba.backends.cpu.kernels.tables import f32

PANEL = 256  # columns of a panel
ROUNDING = 2.0**-53  # of a float64
ROW_NORM_ROOM = f32(1.01)
WEIGHT_NORM_ROOM = 1.001


def sum_error(k: int) -> np.float32:
    """For a sum of k products in panels: how far it and eq. (12)'s are apart at most, over the product of both norms."""
    return f32((PANEL + 2 * math.ceil(k / PANEL) + 16) * ROUNDING)
