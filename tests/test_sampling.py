"""The draws of a seed, beside PCG64 as its author defines it, and how a sampler reads them."""

import numpy as np
import pytest

from refmamba.spec.ops import draws

MULTIPLIER, MASK = 0x2360ED051FC65DA44385DF649FCCF645, (1 << 128) - 1


def pcg64(state: int, increment: int) -> tuple[int, float]:
    """One step of the 128-bit congruential generator, its XSL-RR output, and of that the upper 53 bits as a fraction."""
    state = (state * MULTIPLIER + increment) & MASK
    folded, turn = (state >> 64) ^ (state & (1 << 64) - 1), state >> 122
    output = (folded >> turn | folded << (-turn & 63)) & (1 << 64) - 1
    return state, (output >> 11) / 2**53


def test_the_first_draw_is_the_one_that_numpy_documents() -> None:
    """ "Quick start" of numpy.random: default_rng(12345).random()."""
    assert draws(12345)() == 0.22733602246716966


@pytest.mark.parametrize("seed", [0, 1, 2**64, 2**200 + 7])
def test_the_draws_are_those_of_pcg64(seed: int) -> None:
    begin = np.random.PCG64(seed).state["state"]
    state, draw = begin["state"], draws(seed)
    for _ in range(100):
        state, expected = pcg64(state, begin["inc"])
        assert draw() == expected


def test_each_stream_begins_anew() -> None:
    first, second = draws(3), draws(3)
    assert [first() for _ in range(3)] == [second() for _ in range(3)]
    assert draws(4)() != draws(3)()
