"""Scores equal lm-evaluation-harness's, document by document: vectors/eval_golden.json, made by make_eval_golden.py."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from eval_model import write_model

from refmamba.backend import load_backend
from refmamba.eval_tasks.load import load_sample
from refmamba.eval_tasks.metrics import PER_DOCUMENT, bootstrapped_perplexity, metrics
from refmamba.eval_tasks.results import Result
from refmamba.eval_tasks.score import Score, request, requests, score
from refmamba.eval_tasks.task import Document
from refmamba.eval_tasks.tasks import TASKS
from refmamba.formats.folder import open_checkpoint
from refmamba.formats.tokenizer import Tokenizer
from refmamba.spec.parameters import QuantizedModel, quantize_model
from refmamba.spec.scheme import parse_scheme

GOLDEN = json.loads((Path(__file__).parent / "vectors" / "eval_golden.json").read_text("utf-8"))
RELATIVE, ABSOLUTE = 2e-5, 1e-4  # two float32 forwards in different orders; logits reach 60


class Recorded(Tokenizer):
    """GPT-NeoX's tokens of the texts that the harness encoded, in the table; any other text is a KeyError."""

    def __init__(self) -> None:
        self.eos_token_id = self.bos_token_id = 0

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        return list(GOLDEN["tokens"][text]) if text else []


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from requests to scores, on the exact fp32 scheme."""
    source = open_checkpoint(write_model(tmp_path_factory.mktemp("model")))
    assert not isinstance(source, QuantizedModel)
    backend = load_backend("cpu")
    runner = backend.load(quantize_model(source, parse_scheme("fp32")))
    return lambda wanted: score(runner, backend, wanted)


def close(found: float, expected: float) -> bool:
    return abs(found - expected) <= RELATIVE * abs(expected) + ABSOLUTE


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_the_harness_s(task: str) -> None:
    for ours, theirs in zip(load_sample(TASKS[task]).documents, GOLDEN["full"]["tasks"][task]["documents"], strict=True):
        assert list(map(list, zip(ours.contexts, ours.continuations, strict=True))) == theirs["arguments"]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", ["full", "short"])
def test_scores_and_metrics_are_the_harness_s(task: str, length: str, scorer: Any) -> None:
    """`short` has a max_length of 28 tokens, so that most contexts are cut."""
    documents, golden = load_sample(TASKS[task]).documents, GOLDEN[length]["tasks"][task]
    wanted = [requests(document, Recorded(), GOLDEN[length]["max_length"]) for document in documents]
    flat = iter(scorer([one for many in wanted for one in many]))
    results = [Result(i, tuple(next(flat) for _ in many)) for i, many in enumerate(wanted)]
    for document, result, expected in zip(documents, results, golden["documents"], strict=True):
        found = [s.loglikelihood for s in result.scores]
        assert all(map(close, found, expected["loglikelihoods"])), (document.where, found, expected["loglikelihoods"])
        assert [s.greedy for s in result.scores] == expected["greedy"]
        for name in ("acc", "acc_norm"):
            if name in expected and name in TASKS[task].metrics:
                assert PER_DOCUMENT[name](document, result) == expected[name]
    found_metrics = {f"{m.name},none": m for m in metrics(TASKS[task], documents, results)}
    assert TASKS[task].version == golden["version"]
    names = {name for name in golden["metrics"] if "_stderr" not in name}
    assert set(found_metrics) == names
    for name, metric in found_metrics.items():
        smooth = name == "perplexity,none"  # its standard error is a bootstrap: another stream of random numbers
        assert metric.value == pytest.approx(golden["metrics"][name], rel=1e-4 if smooth else 1e-12)
        assert metric.stderr == pytest.approx(golden["metrics"][name.replace(",", "_stderr,")], rel=0.2 if smooth else 1e-12)


@pytest.mark.parametrize(("context", "continuation", "loglikelihood", "greedy"), GOLDEN["edges"])
def test_edges_are_the_harness_s(context: str, continuation: str, loglikelihood: float, greedy: bool, scorer: Any) -> None:
    (found,) = scorer([request(Recorded(), context, continuation, 2048, "here")])
    assert close(found.loglikelihood, loglikelihood)
    assert found.greedy == greedy


def test_the_edges_hold_a_greedy_hit_and_a_miss() -> None:
    assert {edge[3] for edge in GOLDEN["edges"]} == {True, False}


@pytest.mark.filterwarnings("error")
def test_a_perplexity_that_no_float_holds_is_infinite() -> None:
    assert bootstrapped_perplexity([-800.0, -700.0])[0] == math.inf
    assert bootstrapped_perplexity([-2.0, -4.0])[0] == pytest.approx(20.085536923187668)  # e^3


def test_acc_norm_leaves_the_delimiter_out() -> None:
    document = Document("here", ("Question",) * 2, (" a", " abc"), gold=1)
    assert PER_DOCUMENT["acc_norm"](document, Result(0, (Score(-2.0, False), Score(-4.5, False)))) == 1.0


def test_ties_go_to_the_first_choice_and_an_empty_choice_never_wins() -> None:
    document = Document("here", ("Question",) * 3, (" ", " four", " fore"), gold=1)
    result = Result(0, (Score(-9.0, False), Score(-8.0, False), Score(-8.0, False)))
    assert PER_DOCUMENT["acc"](document, result) == PER_DOCUMENT["acc_norm"](document, result) == 1.0
    assert PER_DOCUMENT["acc"](replace(document, gold=2), result) == 0.0
