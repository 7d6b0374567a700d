"""Log-likelihoods of continuations, each shared beginning computed once.

All token sequences of a batch of requests form a tree: what two of them begin with is one node, and the state after a
node is forked into its children. So a document's context runs once for all its choices, and so does what choices
or documents begin with in common. Nodes of the same depth run together, sorted by length. Schemes with a scale over the
whole sequence (`wNaM-*`) have no such states: each context + continuation is one sequence, as the paper's set-up has it.
A runner that has `scores` gives the scores alone, so that on a GPU states, logits and log-softmax stay there.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refmamba.backend import Backend, Runner, Scores, Targets
from refmamba.errors import DataError, NonFiniteError
from refmamba.eval_tasks.task import Document
from refmamba.formats.tokenizer import Tokenizer
from refmamba.spec import ops
from refmamba.spec.arith import F32Array, IntArray
from refmamba.spec.mamba1 import Positions

MAX_LENGTH = 2048


class Sizes(NamedTuple):
    """How much is run together: documents in a block, which is saved as a whole; tokens and nodes in a call, at most."""

    documents: int
    tokens: int
    nodes: int


# None of these changes a number. A call of more tokens is slower on the cpu backend, which runs so many at a time and
# would carry all states from piece to piece, and takes a GPU hardly more time; a state of mamba-2.8b has 25 MB; forking
# one costs what a token or two cost.
HOST, GPU = Sizes(16, 256, 32), Sizes(128, 8192, 128)
SOFTMAX_ROWS = 32  # of logits at a time, to bound memory
WORTH_SHARING = 2  # tokens, at least, of a shared beginning that is no whole context


def sizes_of(backend: Backend) -> Sizes:
    """What suits a backend's device."""
    return GPU if backend.device.startswith("cuda") else HOST


@dataclass(frozen=True)
class Request:
    """Score `tokens[-scored:]`, each given what stands before it. where: the place that an error names."""

    tokens: tuple[int, ...]
    scored: int
    where: str


@dataclass(frozen=True)
class Score:
    """A continuation's log-likelihood (natural), and whether each of its tokens was the likeliest."""

    loglikelihood: float
    greedy: bool


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of a context, never none, and of its continuation.

    White space at the context's end moves to the continuation; both are encoded as one text and cut where the context
    alone ends. An empty context is the prefix token alone. Raises TokenizerError where there is none.
    """
    if not context:
        prefix, tokens = [tokenizer.prefix], tokenizer.encode(continuation, special=False)
        return (tokens[:1], tokens[1:]) if tokens[:1] == prefix else (prefix, tokens)
    stripped = context.rstrip()
    joined, before = tokenizer.encode(context + continuation), tokenizer.encode(stripped)
    return before, joined[len(before) :]


def request(tokenizer: Tokenizer, context: str, continuation: str, max_length: int, where: str) -> Request:
    """A text's request: its last max_length + 1 tokens. Raises DataError where nothing is left to score, or too much."""
    before, after = encode_pair(tokenizer, context, continuation)
    return token_request(before, after, max_length, where)


def token_request(before: Sequence[int], after: Sequence[int], max_length: int, where: str) -> Request:
    """The request of a context's and a continuation's tokens, cut to the last max_length + 1. Raises DataError."""
    if not after or not before:
        raise DataError(f"{where}: no token is left for the {'continuation' if before else 'context'} once both are encoded")
    if len(after) > max_length:
        raise DataError(f"{where}: the continuation has {len(after)} tokens, more than the model's {max_length}")
    return Request(tuple([*before, *after][-(max_length + 1) :]), len(after), where)


def requests(document: Document, tokenizer: Tokenizer, max_length: int) -> list[Request]:
    """One request a choice. Raises DataError."""
    pairs = zip(document.contexts, document.continuations, strict=True)
    return [request(tokenizer, a, b, max_length, document.where) for a, b in pairs]


@dataclass
class _Node:
    """Tokens that some requests share, after the parent's. targets: (offset, request, place in its scored tokens), sorted."""

    tokens: IntArray
    where: str
    targets: list[tuple[int, int, int]]
    children: list["_Node"]

    @property
    def inside(self) -> bool:
        """Whether logits are wanted before the last token."""
        return any(offset < len(self.tokens) - 1 for offset, _, _ in self.targets)


def _tree(requested: Sequence[Request]) -> list[_Node]:
    """The roots of the requests' tree. A sequence's last token is only scored, never run."""

    def grow(group: list[int], start: int, agreed: int) -> list[_Node]:
        """Nodes from `start` on for requests that agree before `agreed`, and are sorted by their tokens."""
        nodes, group = [], [i for i in group if len(requested[i].tokens) - 1 > start]
        for _, members in itertools.groupby(group, key=lambda i: requested[i].tokens[agreed]):
            branch = list(members)
            low, high = requested[branch[0]].tokens, requested[branch[-1]].tokens  # all share what these two share
            # a node also ends where a context does, so that no logits are computed inside one, and where a sequence does
            ends = {len(requested[i].tokens) - part for i in branch for part in (1, requested[i].scored)}
            end = agreed + 1
            while end not in ends and low[end] == high[end]:
                end += 1
            if end not in ends and len(branch) > 1 and end - start < WORTH_SHARING:
                nodes += grow(branch, start, end)
                continue
            scored = []
            for i in branch:
                first = len(requested[i].tokens) - requested[i].scored
                scored += [(place - 1 - start, i, place - first) for place in range(max(start + 1, first), end + 1)]
            node = _Node(np.array(low[start:end], np.int64), requested[branch[0]].where, sorted(scored), grow(branch, end, end))
            nodes.append(node)
        return nodes

    return grow(sorted(range(len(requested)), key=lambda i: requested[i].tokens), 0, 0)


def _batches(nodes: list[tuple[int, _Node]], sizes: Sizes) -> Iterator[list[tuple[int, _Node]]]:
    """Nodes by length, the longest first, within the sizes (one node may have more tokens)."""
    nodes = sorted(nodes, key=lambda item: len(item[1].tokens), reverse=True)
    while nodes:
        totals = itertools.accumulate(len(node.tokens) for _, node in nodes[: sizes.nodes])
        count = max(1, sum(total <= sizes.tokens for total in totals))
        yield nodes[:count]
        nodes = nodes[count:]


def score(runner: Runner, backend: Backend, requested: Sequence[Request]) -> list[Score]:
    """The score of each request, in order. Raises NonFiniteError, with the request's place, for a NaN or an infinity."""
    walk = _Walk(requested, sizes_of(backend), getattr(runner, "scores", None) or _scores_of(runner, backend))
    if runner.scheme.whole_sequence:
        walk.run([(0, _whole(i, request)) for i, request in enumerate(requested)], None)
    else:
        walk.run([(0, node) for node in _tree(requested)], None)
    return [Score(float(np.sum(v, dtype=np.float64)), g) for v, g in zip(walk.values, walk.greedy, strict=True)]


def _whole(i: int, request: Request) -> _Node:
    """A request's whole sequence, shared with no other."""
    first = len(request.tokens) - 1 - request.scored
    targets = [(first + place, i, place) for place in range(request.scored)]
    return _Node(np.array(request.tokens[:-1], np.int64), request.where, targets, [])


def _scores_of(runner: Runner, backend: Backend) -> Scores:
    """The `scores` of a runner that has only logits."""
    offered = backend.operations().get("log_softmax")
    log_softmax, at_once = (offered, SOFTMAX_ROWS) if offered else (ops.log_softmax, 1)  # one row of NumPy stays in the cache

    def scores(
        sequences: Sequence[IntArray], state: Any | None, logits: Positions, targets: Targets
    ) -> tuple[F32Array, NDArray[np.bool_], Any]:
        """See `refmamba.backend.Scores`."""
        outputs, after = runner.prefill(sequences, state, logits=logits)
        values, greedy = list[np.float32](), list[bool]()
        for rows, row_targets in zip(outputs, targets, strict=True):
            for part, group in itertools.groupby(row_targets, key=lambda target: target[0] // at_once):
                part_rows = rows[part * at_once : (part + 1) * at_once]
                logs, best = log_softmax(part_rows), np.argmax(part_rows, axis=-1)
                for row, token in group:
                    values.append(logs[row % at_once, token])
                    greedy.append(bool(best[row % at_once] == token))
        return np.array(values, np.float32), np.array(greedy, np.bool_), after

    return scores


class _Walk:
    """The scores as they come, while the tree is run from its roots on."""

    def __init__(self, requested: Sequence[Request], sizes: Sizes, scores: Scores) -> None:
        self.requested, self.sizes, self.scores = requested, sizes, scores
        self.values = [np.zeros(request.scored, np.float32) for request in requested]
        self.greedy = [True] * len(requested)

    def run(self, nodes: Sequence[tuple[int, _Node]], state: Any | None) -> None:
        """Run nodes, each from the state of its index (None: from the first token), then what follows them."""
        inner = [(index, node) for index, node in nodes if node.inside or len(node.tokens) == 1]
        outer = [(index, node) for index, node in nodes if not (node.inside or len(node.tokens) == 1)]
        for group, inside in ((outer, False), (inner, True)):
            for batch in _batches(group, self.sizes):
                members = [node for _, node in batch]
                mode: Positions = "all" if inside else "last" if any(node.targets for node in members) else "none"
                before = state if state is None else state.take([index for index, _ in batch])
                targets = [self.targets(node, mode) for node in members]
                try:
                    values, greedy, after = self.scores([node.tokens for node in members], before, mode, targets)
                except NonFiniteError as error:
                    if len(batch) == 1:
                        raise NonFiniteError(f"{members[0].where}: {error}") from error
                    for single in batch:  # to name the node that is the cause
                        self.run([single], state)
                    continue
                self.keep([target for node in members for target in node.targets], values, greedy)
                self.run([(i, child) for i, node in enumerate(members) for child in node.children], after)

    def targets(self, node: _Node, mode: Positions) -> list[tuple[int, int]]:
        """(row of the node's logits, token) of each score."""
        shift = 0 if mode == "all" else len(node.tokens) - 1  # only the last row is there
        return [
            (offset - shift, self.requested[i].tokens[place - self.requested[i].scored]) for offset, i, place in node.targets
        ]

    def keep(self, targets: Sequence[tuple[int, int, int]], values: F32Array, greedy: NDArray[np.bool_]) -> None:
        """Put scores where they belong, eq. (25)."""
        for (_, i, place), value, best in zip(targets, values, greedy, strict=True):
            self.values[i][place] = value
            self.greedy[i] &= bool(best)
            if not np.isfinite(value):
                raise NonFiniteError(f"{self.requested[i].where}: the model gives a NaN or an infinity for this document")
