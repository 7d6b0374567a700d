"""How near products in fixed point, SPEC (10), (12), (13), come to exact ones, beside a float32 product of the BLAS library.

    python benchmarks/fixed_point.py

For each width K: 64 tokens of standard normal float32, and the same with every 64th channel 100 times larger; 256 rows of
weights, normal with a deviation of 0.02. The error is the root mean square of the difference from float64's product, over the
root mean square of the product.
"""

import numpy as np

from refmamba.spec.arith import F32Array
from refmamba.spec.codes import ACTIVATION_BITS, WEIGHT_BITS, fixed_point, integer_product, rescale

WIDTHS = (48, 768, 1536, 2560, 5120)


def errors(x: F32Array, w: F32Array) -> tuple[float, float]:
    """The errors in fixed point and in float32. x: (L, K). w: (rows, K)."""
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    factors = fixed_point(x, ACTIVATION_BITS, "x"), fixed_point(w, WEIGHT_BITS, "w")
    ours = rescale(integer_product(*factors), *factors)
    fixed, single = (float(np.sqrt(np.mean((y - exact) ** 2) / np.mean(exact**2))) for y in (ours, x @ w.T))
    return fixed, single


def main() -> None:
    """Print one line a width."""
    print("    K  outliers  fixed point  float32")
    for K in WIDTHS:
        for factor in (1, 100):
            r = np.random.default_rng(K)
            x, w = r.standard_normal((64, K), np.float32), np.float32(0.02) * r.standard_normal((256, K), np.float32)
            x[:, ::64] *= np.float32(factor)
            fixed, single = errors(x, w)
            print(f"{K:5}  {factor:>8}  {fixed:11.1e}  {single:7.1e}")


if __name__ == "__main__":
    main()
