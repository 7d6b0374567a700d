"""The operations of docs/SPEC.md once more, in rational arithmetic, one number at a time: a source of test vectors.

Shares no code with refmamba. A float32 is a Python float; every operation is done exactly with fractions.Fraction and
rounded to float32, half to even, by `rounded`. Slow, and plain enough to be checked by reading it beside the SPEC.
"""

import math
from fractions import Fraction

Floats = list[float]


def rounded(x: Fraction, like: float = 0.0) -> float:
    """x rounded to float32, half to even; infinity beyond the largest float32. A result of zero has the sign of `like`."""
    if x == 0:
        return math.copysign(0.0, like)
    e = x.numerator.bit_length() - x.denominator.bit_length()
    while Fraction(2) ** e > abs(x):
        e -= 1
    while Fraction(2) ** (e + 1) <= abs(x):
        e += 1
    unit = Fraction(2) ** (max(e, -126) - 23)
    y = round(x / unit) * unit  # Fraction's round is half to even
    if abs(y) >= Fraction(2) ** 128:
        return math.copysign(math.inf, x)
    return math.copysign(float(y), x)


def _finite(*values: float) -> bool:
    return all(math.isfinite(v) for v in values)


def add(a: float, b: float) -> float:
    """a + b."""
    return rounded(Fraction(a) + Fraction(b), a + b) if _finite(a, b) else a + b


def sub(a: float, b: float) -> float:
    """a - b."""
    return add(a, -b)


def mul(a: float, b: float) -> float:
    """a * b."""
    sign = math.copysign(1, a) * math.copysign(1, b)
    return rounded(Fraction(a) * Fraction(b), sign) if _finite(a, b) else a * b


def div(a: float, b: float) -> float:
    """a / b, b not zero."""
    sign = math.copysign(1, a) * math.copysign(1, b)
    return rounded(Fraction(a) / Fraction(b), sign) if _finite(a, b) else a / b


def sqrt(a: float) -> float:
    """The square root of a positive number, from far more bits than float32 has and a sticky bit, rounded once."""
    x = Fraction(a)
    shift = 400
    root = math.isqrt(int(x * 2**shift))
    exact = Fraction(root) ** 2 == x * 2**shift
    return rounded(Fraction(2 * root + (0 if exact else 1), 2 * 2 ** (shift // 2)))


def f32(x: float) -> float:
    """The float32 nearest to a float64."""
    return rounded(Fraction(x))


EXP_TERMS = [f32(x) for x in (0.0013814599, 0.008368717, 0.04166839, 0.16666521, 0.49999994)]
LOG_TERMS = [
    f32(x) for x in (-0.07634609, 0.12761751, -0.13160223, 0.14201738, -0.16623351, 0.20001228, -0.25000823, 0.3333333)
]


def exp(x: float) -> float:
    """Eq. (1)."""
    if not f32(-87.336) <= x <= f32(88.722):
        return math.inf if x > 0 else 0.0 if x < 0 else x
    n = float(round(Fraction(mul(x, f32(1.442695)))))
    r = sub(sub(x, mul(n, 0.693145751953125)), mul(n, f32(1.4286068e-06)))
    p = EXP_TERMS[0]
    for term in EXP_TERMS[1:]:
        p = add(mul(p, r), term)
    p = add(add(mul(p, mul(r, r)), r), 1.0)
    return rounded(Fraction(p) * Fraction(2) ** int(n))


def log(x: float) -> float:
    """Eq. (2)."""
    if not 0 < x < math.inf:
        return -math.inf if x == 0 else x if x > 0 else math.nan
    m, k = math.frexp(x)
    if Fraction(m) < Fraction(0x3504F3 | 0x800000, 2**24):  # sqrt(1/2) as the SPEC's bits give it
        m, k = 2 * m, k - 1
    f, n = sub(m, 1.0), float(k)
    p = LOG_TERMS[0]
    for term in LOG_TERMS[1:]:
        p = add(mul(p, f), term)
    square = mul(f, f)
    low = mul(n, f32(1.4286068e-06))
    y = add(sub(add(mul(mul(p, f), square), low), mul(0.5, square)), f)
    return add(y, mul(n, 0.693145751953125))


def log1p(y: float) -> float:
    """Eq. (3)."""
    u = add(1.0, y)
    return add(log(u), div(sub(y, sub(u, 1.0)), u))


def softplus(x: float) -> float:
    """Eq. (4)."""
    return x if x > 20 or math.isnan(x) else add(max(x, 0.0), log1p(exp(-abs(x))))


def silu(x: float) -> float:
    """Eq. (5)."""
    return div(x, add(1.0, exp(-x)))


def tree(x: Floats) -> float:
    """Eq. (6)."""
    width = 1
    while width < len(x):
        width *= 2
    x = x + [0.0] * (width - len(x))
    while width > 1:
        width //= 2
        x = [add(a, b) for a, b in zip(x[:width], x[width:], strict=True)]
    return x[0]


def absmax(x: Floats) -> float:
    """Eq. (7): the maximum."""
    m = max(abs(v) for v in x)
    return m if Fraction(m) >= Fraction(1, 2**100) else 0.0


def scale(m: float, bits: int) -> float:
    """Eq. (7): the scale."""
    return div(float(2 ** (bits - 1) - 1), m) if m else 1.0


def quantize(x: float, s: float, bits: int) -> int:
    """Eq. (8)."""
    largest = 2 ** (bits - 1) - 1
    return round(max(min(Fraction(mul(x, s)), Fraction(largest)), Fraction(-largest)))


def fixed_point(x: Floats, magnitude_bits: int) -> tuple[list[int], int]:
    """Eq. (10), one row."""
    m = absmax(x)
    if not m:
        return [0] * len(x), 0
    exponent = min(126, magnitude_bits - math.frexp(m)[1])
    return [round(Fraction(v) * Fraction(2) ** exponent) for v in x], exponent


def grouped(row: Floats, bits: int, group: int) -> tuple[list[int], list[int], float]:
    """Eq. (30), one row: codes, steps, scale. Squared errors in exact rational numbers; raises where two are so close that the
    rounding of the sums could decide, but for equal ones."""
    m, largest = absmax(row), 2 ** (bits - 1) - 1
    if not m:
        return [0] * len(row), [1] * -(-len(row) // group), 1.0
    s = div(126.0, m)
    codes: list[int] = []
    steps: list[int] = []
    for start in range(0, len(row), group):
        t = [Fraction(v) * Fraction(s) for v in row[start : start + group]]
        top = min(126 // largest, max(1, math.ceil(max(abs(v) for v in t) / largest)))
        tried = {}
        for step in range(top, max(0, top - 6), -1):
            q = [max(-largest, min(largest, round(v / step))) for v in t]
            tried[step] = (sum(((v - c * step) ** 2 for v, c in zip(t, q, strict=True)), Fraction(0)), q)
        least = min(error for error, _ in tried.values())
        close = [step for step, (error, _) in tried.items() if error != least and error < least * (1 + Fraction(1, 10**9))]
        assert not close, close
        step = max(step for step, (error, _) in tried.items() if error == least)
        steps.append(step)
        codes += tried[step][1]
    return codes, steps, s


def rotated(row: Floats) -> Floats:
    """Eq. (31), one row: Hadamard's matrix by its definition on the fixed-point codes, each sum rounded once."""
    q, e = fixed_point(row, 30)
    block = len(row) & -len(row)
    out = []
    for start in range(0, len(row), block):
        for i in range(block):
            total = sum((-1) ** (i & j).bit_count() * q[start + j] for j in range(block))
            out.append(rounded(Fraction(total) / Fraction(2) ** e))
    return out


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """Eq. (16), one token."""
    root = sqrt(add(div(tree([mul(v, v) for v in x]), float(len(x))), f32(eps)))
    return [mul(div(v, root), w) for v, w in zip(x, weight, strict=True)]


def conv1d(x: Floats, state: Floats, taps: Floats, bias: float | None) -> tuple[Floats, Floats]:
    """Eq. (17), one channel."""
    padded, out = state + x, []
    for t in range(len(x)):
        y = mul(padded[t], taps[0])
        for tap in range(1, len(taps)):
            y = add(y, mul(padded[t + tap], taps[tap]))
        out.append(y if bias is None else add(y, bias))
    return out, padded[len(x) :]


def scan(u: Floats, delta: Floats, A: Floats, B: list[Floats], C: list[Floats], D: float, h: Floats) -> tuple[Floats, Floats]:
    """Eq. (20, 21, 22), one channel."""
    out = []
    for t in range(len(u)):
        du = mul(delta[t], u[t])
        h = [add(mul(exp(mul(delta[t], a)), old), mul(du, b)) for a, old, b in zip(A, h, B[t], strict=True)]
        out.append(add(tree([mul(c, v) for c, v in zip(C[t], h, strict=True)]), mul(D, u[t])))
    return out, h


def log_softmax(x: Floats) -> Floats:
    """Eq. (25), one row."""
    shifted = [sub(v, max(x)) for v in x]
    total = log(tree([exp(v) for v in shifted]))
    return [sub(v, total) for v in shifted]


def split_product(x: list[int], w: list[int]) -> float:
    """Eq. (12), one row by one row: blocks of 4096 columns, each joined with one rounding to float64, added in order."""
    total = 0.0
    for start in range(0, len(x), 4096):
        block = x[start : start + 4096]
        low = [(v + 2048) % 4096 - 2048 for v in w[start : start + 4096]]
        high = [(v - part) // 4096 for v, part in zip(w[start : start + 4096], low, strict=True)]
        both = [sum(a * b for a, b in zip(block, part, strict=True)) for part in (high, low)]
        total += float(both[0] * 4096 + both[1])
    return total


def sample(logits: Floats, draw: float, temperature: float, top_k: int, top_p: float) -> int:
    """Eq. (26). The running sums are float64, as Python's own floats are."""
    largest, t = max(logits), f32(temperature)
    if t == 0:
        return logits.index(largest)
    weights = [exp(div(sub(v, largest), t)) for v in logits]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])[: top_k or None]
    running, total = [], 0.0
    for i in order:
        total += weights[i]
        running.append(total)
    if top_p < 1:
        running = running[: next(i for i, v in enumerate(running) if v >= top_p * total) + 1]
    return order[next(i for i, v in enumerate(running) if v > draw * running[-1])]
