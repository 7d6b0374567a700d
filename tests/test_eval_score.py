"""Recurrent scoring: shared beginnings run once, and no number depends on what is scored together."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import TINY, RandomSource

from refmamba.backend import load_backend
from refmamba.errors import DataError, NonFiniteError
from refmamba.eval_tasks import score as scoring
from refmamba.eval_tasks.score import Request, Score, score, token_request
from refmamba.spec.arith import F32Array, IntArray
from refmamba.spec.ops import log_softmax
from refmamba.spec.parameters import quantize_model
from refmamba.spec.scheme import parse_scheme

REFERENCE, CPU = load_backend("reference"), load_backend("cpu")


class Counting:
    """A Runner that writes down the sequences it runs."""

    def __init__(self, source: RandomSource, scheme: str) -> None:
        self._runner: Any = REFERENCE.load(quantize_model(source, parse_scheme(scheme)))
        self.model, self.config, self.scheme = self._runner.model, self._runner.config, self._runner.scheme
        self.ran: list[list[IntArray]] = []
        self.states: list[Any] = []

    def initial_state(self, batch: int) -> Any:
        return self._runner.initial_state(batch)

    def restore_state(self, conv: Any, ssm: Any) -> Any:
        raise AssertionError("scoring restores no state")

    def step(self, tokens: IntArray, state: Any, *, hook: Any = None) -> Any:
        raise AssertionError("scoring runs whole pieces")

    def prefill(self, sequences: Sequence[IntArray], state: Any = None, **options: Any) -> Any:
        self.ran.append(list(sequences))
        self.states.append(state)
        return self._runner.prefill(sequences, state, **options)

    @property
    def tokens(self) -> int:
        return sum(len(sequence) for call in self.ran for sequence in call)


def questions(seed: int) -> list[Request]:
    """Eight documents with two to four choices each, some with a common beginning, some of one token."""
    rng = np.random.default_rng(seed)
    found = []
    for document in range(8):
        context = rng.integers(0, 50, rng.integers(1, 30)).tolist()
        common = rng.integers(0, 50, rng.integers(0, 6)).tolist()
        for _ in range(rng.integers(2, 5)):
            choice = [*common, *rng.integers(0, 50, rng.integers(1, 8)).tolist()]
            found.append(token_request(context, choice, 2048, f"document {document}"))
    return found


def directly(runner: Counting, request: Request) -> Score:
    """The definition: one call over context and continuation, a log-softmax of every row."""
    (logits,), _ = runner.prefill([np.array(request.tokens[:-1])], logits="all")
    logs: F32Array = log_softmax(logits)[-request.scored :]
    targets = np.array(request.tokens[-request.scored :])
    value = np.sum(logs[np.arange(len(targets)), targets], dtype=np.float64)
    return Score(float(value), bool(np.all(np.argmax(logits[-request.scored :], axis=1) == targets)))


@pytest.mark.parametrize("scheme", ["fp32", "int8", "w4-mlp", "w8a8-all"])
@pytest.mark.parametrize(("tokens", "nodes", "worth_sharing"), [(40, 3, 1), (100_000, 1000, 1), (256, 32, 2)])
def test_every_batch_gives_the_bits_of_the_definition(
    scheme: str, tokens: int, nodes: int, worth_sharing: int, tiny: RandomSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "HOST", scoring.HOST._replace(tokens=tokens, nodes=nodes))
    monkeypatch.setattr(scoring, "WORTH_SHARING", worth_sharing)
    runner, wanted = Counting(tiny, scheme), questions(1)
    together = score(runner, REFERENCE, wanted)
    assert together == [directly(runner, one) for one in wanted]
    fast = CPU.load(runner.model)
    assert [score(fast, CPU, [one])[0] for one in wanted] == together
    order = np.random.default_rng(0).permutation(len(wanted))
    assert score(runner, REFERENCE, [wanted[i] for i in order]) == [together[i] for i in order]


@pytest.mark.parametrize("scheme", ["int8", "w8a8-mlp"])
def test_scores_that_stay_on_a_device_are_those_of_the_definition(scheme: str, tiny: RandomSource) -> None:
    pytest.importorskip("torch")
    model, wanted, backend = quantize_model(tiny, parse_scheme(scheme)), questions(1), load_backend("torch")
    runner = backend.load(model)
    assert hasattr(runner, "scores")
    assert score(runner, backend, wanted) == score(CPU.load(model), CPU, wanted)


def test_of_two_largest_logits_the_first_is_greedy_on_a_device_too() -> None:
    torch = pytest.importorskip("torch")
    from refmamba.backends.adapter import scores_of

    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]])
    values, greedy = scores_of(logits, [1, 1], [[(0, 1), (0, 2)], [(0, 0), (0, 2)]], lambda x: x)
    assert values.tolist() == [3.0, 3.0, 2.0, 2.0]
    assert greedy.tolist() == [True, False, True, False]
    with pytest.raises(NonFiniteError, match="lm_head"):
        scores_of(torch.tensor([[1.0, np.inf]]), [1], [[(0, 0)]], lambda x: x)


def test_a_greedy_hit_needs_every_token(tiny: RandomSource) -> None:
    runner = Counting(tiny, "fp32")
    (logits,), _ = runner.prefill([np.array([3, 1])], logits="last")
    best = int(np.argmax(logits[-1]))
    other = (best + 1) % 50
    (logits,), _ = runner.prefill([np.array([3, 1, other])], logits="last")
    after_other = int(np.argmax(logits[-1]))
    asked = [Request((3, 1, best), 1, ""), Request((3, 1, other), 1, ""), Request((3, 1, other, after_other), 2, "")]
    assert [one.greedy for one in score(runner, REFERENCE, asked)] == [True, False, False]


def test_what_choices_share_runs_once_and_last_tokens_never(tiny: RandomSource) -> None:
    runner = Counting(tiny, "fp32")
    context, shared = [5, 6, 7, 8], [*range(9, 17)]
    choices = [[*shared, 21, 22], [*shared, 23, 24, 20], [*shared, 23, 25, 26]]
    score(runner, REFERENCE, [token_request(context, choice, 2048, "") for choice in choices])
    assert runner.tokens == 4 + 8 + 1 + 2 + 2  # context; 9 to 16; 21; 23 24; 23 25: one token is not worth a fork


def test_a_context_is_shared_however_short_and_nothing_else_is(tiny: RandomSource) -> None:
    runner = Counting(tiny, "fp32")
    documents = [token_request([5, first], [7, choice, 9], 2048, "") for first in (1, 2) for choice in (3, 4)]
    score(runner, REFERENCE, documents)
    assert [[len(sequence) for sequence in call] for call in runner.ran] == [[2, 2], [2, 2, 2, 2]]


def test_a_call_has_no_more_tokens_and_states_than_its_limits(tiny: RandomSource) -> None:
    runner, rng = Counting(tiny, "fp32"), np.random.default_rng(0)
    lengths = enumerate((300, *[100] * 5, *[4] * 40))
    contexts = [[first, *rng.integers(0, 50, length - 1).tolist()] for first, length in lengths]
    score(runner, REFERENCE, [token_request(context, [1], 2048, "") for context in contexts])
    assert [len(call) for call in runner.ran] == [1, 2, 2, 32, 9]


def test_a_whole_sequence_scheme_is_never_forked(tiny: RandomSource) -> None:
    runner, wanted = Counting(tiny, "w8a8-mlp"), questions(2)
    score(runner, REFERENCE, wanted)
    ran = [tuple(sequence) for call in runner.ran for sequence in call]
    assert sorted(ran) == sorted(one.tokens[:-1] for one in wanted)
    assert runner.states == [None] * len(runner.ran)


def test_the_last_tokens_are_kept_where_a_text_is_too_long() -> None:
    assert token_request([1, 2, 3], [4, 5], 3, "").tokens == (2, 3, 4, 5)
    assert token_request([1, 2, 3], [4, 5, 6], 3, "").tokens == (3, 4, 5, 6)
    with pytest.raises(DataError, match="rows:7: the continuation has 3 tokens, more than the model's 2"):
        token_request([1], [4, 5, 6], 2, "rows:7")
    with pytest.raises(DataError, match="rows:7: no token is left for the continuation"):
        token_request([1], [], 2, "rows:7")


class Poisoned(RandomSource):
    """Token 7 has a NaN in its embedding; the head is another matrix."""

    def read(self, name: str) -> F32Array:
        x = super().read(name)
        if name == "embedding.weight":
            x[7, 3] = np.nan
        return x


@pytest.mark.parametrize("scheme", ["fp32", "w8a8-mlp"])
def test_a_nan_names_the_document_that_has_it(scheme: str) -> None:
    runner = Counting(Poisoned(replace(TINY, tie_embeddings=False)), scheme)
    clean = [token_request([i, 2], [3, 4], 2048, f"rows:{i}") for i in range(6)]
    assert len(score(runner, REFERENCE, clean)) == 6
    with pytest.raises(NonFiniteError, match=r"^rows:40: ") as error:
        score(runner, REFERENCE, [*clean, token_request([1, 7], [3, 4], 2048, "rows:40")])
    assert "\n" not in str(error.value)
