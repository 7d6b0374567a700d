"""Perplexity against a float64 sum over one call's logits."""

import math
from pathlib import Path

import numpy as np
import pytest
from conftest import RandomSource

from refmamba.errors import DataError
from refmamba.run.perplexity import CALL, Perplexity, kept_baseline, perplexity
from refmamba.spec.mamba1 import Mamba
from refmamba.spec.parameters import quantize_model
from refmamba.spec.scheme import parse_scheme


def test_the_sum_over_calls_is_that_of_one_softmax_over_all_positions(tiny: RandomSource) -> None:
    runner = Mamba(quantize_model(tiny, parse_scheme("fp32")))
    tokens = np.random.default_rng(0).integers(0, tiny.config.vocab_size, CALL + 30)
    logits = runner.prefill([tokens[:-1]], logits="all")[0][0].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    nats = np.sum(np.log(np.sum(np.exp(logits), axis=1)) - logits[np.arange(len(logits)), tokens[1:]])
    result = perplexity(runner, tokens, n_bytes=1000)
    assert result.tokens == len(tokens) - 1
    assert result.nats == pytest.approx(nats, rel=1e-6)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / 1000, rel=1e-6)
    assert result.per_token == pytest.approx(math.exp(nats / (len(tokens) - 1)), rel=1e-6)


def test_the_divergence_is_the_mean_over_tokens_of_kullback_and_leibler_s(tiny: RandomSource, tmp_path: Path) -> None:
    """KL(baseline || model), sum of p·ln(p/q) over the vocabulary, from the probabilities themselves; of itself it is 0."""
    runners = [Mamba(quantize_model(tiny, parse_scheme(scheme))) for scheme in ("fp32", "w4-all")]
    tokens = np.random.default_rng(0).integers(0, tiny.config.vocab_size, CALL + 30)
    p, q = (np.exp(r.prefill([tokens[:CALL]], logits="all")[0][0].astype(np.float64)) for r in runners)
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    with kept_baseline(tmp_path) as baseline:
        perplexity(runners[0], tokens[: CALL + 1], 1, baseline.keep)
        for runner, expected in zip(runners, (0.0, np.mean(np.sum(p * np.log(p / q), axis=-1))), strict=True):
            comparison = baseline.comparison()
            perplexity(runner, tokens[: CALL + 1], 1, comparison.look)
            assert comparison.mean == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert list(tmp_path.iterdir()) == []


def test_a_perplexity_that_no_float_holds_is_infinite() -> None:
    assert Perplexity(tokens=2, nats=1500.0, n_bytes=8).per_token == math.inf
    assert Perplexity(tokens=2, nats=2.0, n_bytes=8).per_token == pytest.approx(math.e)


def test_one_token_cannot_be_scored(tiny: RandomSource) -> None:
    with pytest.raises(DataError, match="too short"):
        perplexity(Mamba(quantize_model(tiny, parse_scheme("fp32"))), np.array([1]), n_bytes=1)
