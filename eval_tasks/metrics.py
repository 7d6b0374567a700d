"""acc, acc_norm, perplexity and their standard errors, as lm-evaluation-harness takes them from log-likelihoods."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refmamba.eval_tasks.results import Result
from refmamba.eval_tasks.task import Document, Task

RESAMPLES = 1000  # of perplexity's bootstrap
HIGHER_IS_BETTER = {"acc": True, "acc_norm": True, "perplexity": False}


@dataclass(frozen=True)
class Metric:
    """A value over documents and its standard error; that of a single document's mean is NaN."""

    name: str
    value: float
    stderr: float


def acc(document: Document, result: Result) -> float:
    """1.0 where the right choice is the likeliest (of equal ones the first); a single choice, where each token was."""
    if len(result.scores) == 1:
        return float(result.scores[0].greedy)
    return float(np.argmax([s.loglikelihood for s in result.scores]) == document.gold)


def acc_norm(document: Document, result: Result) -> float:
    """Like acc, each log-likelihood divided by its choice's characters without the delimiter; an empty choice never wins."""
    lengths = [len(text) - 1 for text in document.continuations]
    values = [s.loglikelihood / n if n else -math.inf for s, n in zip(result.scores, lengths, strict=True)]
    return float(np.argmax(values) == document.gold)


PER_DOCUMENT = {"acc": acc, "acc_norm": acc_norm}


def mean_stderr(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and standard error of the mean: sqrt(sum((x - mean)^2) / (n - 1)) / sqrt(n)."""
    n, mean = len(values), math.fsum(values) / len(values)
    spread = math.fsum((x - mean) ** 2 for x in values)
    return mean, math.sqrt(spread / (n - 1)) / math.sqrt(n) if n > 1 else math.nan


def bootstrapped_perplexity(loglikelihoods: Sequence[float]) -> tuple[float, float]:
    """exp(-mean), and the standard deviation of the same over RESAMPLES bootstrap samples, seeded; may be infinite."""
    values, rng = np.array(loglikelihoods), np.random.default_rng(0)
    with np.errstate(over="ignore", invalid="ignore"):  # a model that is worse than 10^-308 a document
        drawn = [np.exp(-rng.choice(values, len(values)).mean()) for _ in range(RESAMPLES)]
        value = np.exp(-math.fsum(loglikelihoods) / len(loglikelihoods))
        return float(value), float(np.std(drawn, ddof=1))


def metrics(task: Task, documents: Sequence[Document], results: Sequence[Result]) -> list[Metric]:
    """A task's metrics over these documents (at least one) and their results."""
    values = []
    for name in task.metrics:
        if name == "perplexity":
            value, stderr = bootstrapped_perplexity([r.scores[0].loglikelihood for r in results])
        else:
            value, stderr = mean_stderr([PER_DOCUMENT[name](d, r) for d, r in zip(documents, results, strict=True)])
        values.append(Metric(name, value, stderr))
    return values
