"""Receipts: what was computed, bound by a chain of hashes, so that anyone can compute it again (docs/FORMAT.md, section 7)."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refmamba.errors import DataError
from refmamba.formats.reading import TABLE_BYTES, read_json
from refmamba.formats.scheme import scheme_in
from refmamba.formats.writing import write_text
from refmamba.run.generate import Chooser, Sampler, choose_tokens
from refmamba.run.session import Session
from refmamba.spec import SPEC_VERSION
from refmamba.spec.arith import F32Array
from refmamba.spec.scheme import Scheme

FORMAT = 1
COMMANDS = ("generate", "logits")
BOUND = ("format", "command", "spec_version", "model_sha256", "scheme", "sampling", "n_ids", "prompt_tokens")
LARGEST_TOKEN = 2**63 - 1  # that an i64 holds


def first_link(header: Mapping[str, Any]) -> str:
    """chain_0: SHA-256 of the entries that say what was computed, as JSON with sorted keys and without spaces."""
    return hashlib.sha256(json.dumps(header, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def next_link(link: str, logits: F32Array, token: int) -> str:
    """chain_i = SHA-256(chain_(i-1), logits_i, token_i): 32 bytes, float32 (vocabulary,) and an i64, little-endian."""
    row = np.ascontiguousarray(logits, "<f4").tobytes()
    return hashlib.sha256(bytes.fromhex(link) + row + token.to_bytes(8, "little")).hexdigest()


@dataclass(frozen=True)
class Receipt:
    """What a receipt's file holds. See docs/FORMAT.md.

    command: `generate` or `logits`. model_sha256: the content hash of the model under the scheme, calibrated scales
    included. sampler, n_ids: of `generate`; else None. about: bound by nothing.
    """

    command: str
    model_sha256: str
    scheme: dict[str, Any]
    sampler: Sampler | None
    n_ids: int | None
    prompt_tokens: list[int]
    tokens: list[int]
    chain: list[str]
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def hashed_tokens(self) -> list[int]:
        """token_1 ... token_n of the chain."""
        return self.tokens if self.command == "generate" else self.prompt_tokens

    def header(self) -> dict[str, Any]:
        """The entries that chain_0 binds."""
        sampling = None if self.sampler is None else asdict(self.sampler)
        values = (FORMAT, self.command, SPEC_VERSION, self.model_sha256, self.scheme, sampling, self.n_ids, self.prompt_tokens)
        return dict(zip(BOUND, values, strict=True))

    def save(self, file: Path) -> None:
        """Write it as JSON, an entry a line. Raises DataError."""
        values = self.header() | {"tokens": self.tokens, "chain": self.chain, "about": self.about}
        write_text(file, "{\n" + ",\n".join(f'  "{key}": {json.dumps(value)}' for key, value in values.items()) + "\n}\n")


class Recorder:
    """Makes the receipt of one run while it happens: `look` is shown the logits (vocabulary,) of each token, and the token.

    sampler: of `generate`; None for `logits`. Raises DataError for a backend that is not exact, and what the runner raises.
    """

    def __init__(self, session: Session, prompt_tokens: NDArray[np.integer[Any]], sampler: Sampler | None = None) -> None:
        session.check_exact("a receipt")
        if sampler is not None:  # as the file has them, whatever kind of number they were
            sampler = Sampler(float(sampler.temperature), int(sampler.top_k), float(sampler.top_p), int(sampler.seed))
            if max(sampler.top_k, sampler.seed) > LARGEST_TOKEN:
                raise DataError(f"a receipt holds a seed and a top_k up to {LARGEST_TOKEN}; give smaller ones")
        choice = session.opened.choice
        about = {"model": choice.model, "revision": choice.revision,
                 "calibrate": None if choice.calibrate is None else str(choice.calibrate),
                 "percentile": None if choice.percentile == 1 else choice.percentile,
                 "backend": choice.backend, "device": session.backend.device}  # fmt: skip
        self._receipt = Receipt(
            COMMANDS[sampler is None],
            session.model_sha256,
            session.scheme.to_json(),
            sampler,
            None if sampler is None else session.tokenizer.n_ids,
            [int(token) for token in prompt_tokens],
            [],
            [],
            {key: value for key, value in about.items() if value is not None},
        )
        self._receipt.chain.append(first_link(self._receipt.header()))

    def look(self, logits: F32Array, token: int) -> None:
        """One more token."""
        if self._receipt.sampler is not None:
            self._receipt.tokens.append(token)
        self._receipt.chain.append(next_link(self._receipt.chain[-1], logits, token))

    def save(self, file: Path) -> None:
        """Write the receipt. Raises DataError."""
        self._receipt.save(file)


def read_receipt(file: Path) -> tuple[Receipt, Scheme]:
    """A receipt, and its scheme.

    Raises FileError, and DataError or SchemeError for a file that no run under this specification has made.
    """
    values = read_json(file, TABLE_BYTES)
    needed, entries = {*BOUND, "tokens", "chain"}, values.keys() - {"about"}
    if wrong := sorted(needed ^ entries):
        raise DataError(f"{file}: a receipt has {'no' if wrong[0] in entries else 'an'} entry {wrong[0]}")
    if values["format"] != FORMAT:
        raise DataError(f"{file}: a receipt of format {values['format']!r}; this program reads {FORMAT}")
    if values["spec_version"] != SPEC_VERSION:
        raise DataError(f"{file}: made under specification {values['spec_version']!r}; this program computes {SPEC_VERSION}")
    scheme = scheme_in(file, values["scheme"])
    about, sampling, command = values.get("about", {}), values["sampling"], values["command"]
    generated = command == "generate"
    tokens, prompt, chain = values["tokens"], values["prompt_tokens"], values["chain"]
    checks = {
        "command": command in COMMANDS,
        "model_sha256": _is_link(values["model_sha256"]),
        "n_ids": type(values["n_ids"]) is int and values["n_ids"] > 0 if generated else values["n_ids"] is None,
        "sampling": isinstance(sampling, dict) and sampling.keys() == Sampler.__dataclass_fields__.keys()
        if generated else sampling is None,
        "prompt_tokens": _are_tokens(prompt) and len(prompt) > 0,
        "tokens": _are_tokens(tokens) and (len(tokens) > 0) == generated,
        "about": isinstance(about, dict),
        "chain": isinstance(chain, list) and all(map(_is_link, chain)),
    }  # fmt: skip
    for entry, right in checks.items():
        if not right:
            raise DataError(f"{file}: the receipt's {entry} is not what docs/FORMAT.md asks for")
    if len(chain) != 1 + len(tokens if generated else prompt):
        raise DataError(f"{file}: the receipt's chain has {len(chain)} hashes; it has one more than tokens")
    if chain[0] != first_link({entry: values[entry] for entry in BOUND}):
        raise DataError(f"{file}: chain[0] is not the hash of the receipt's entries: they were changed after it was made")
    receipt = Receipt(
        command, values["model_sha256"], values["scheme"], Sampler(**sampling) if generated else None, values["n_ids"],
        prompt, tokens, chain, about,
    )  # fmt: skip
    return receipt, scheme


def _is_link(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and not set(value) - set("0123456789abcdef")


def _are_tokens(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= LARGEST_TOKEN for value in values)


@dataclass(frozen=True)
class Mismatch:
    """The first token that differs, from 1: what the receipt has, and what was computed."""

    number: int
    receipt_token: int
    token: int
    receipt_hash: str
    hash: str


def replay(receipt: Receipt, session: Session) -> Mismatch | None:
    """Compute a receipt's run again: the first token that differs, or None.

    Raises DataError where the model is another one or the backend is not exact, and whatever the runner raises.
    """
    session.check_exact("a receipt")
    if session.model_sha256 != receipt.model_sha256:
        cause = (
            ", or calibrated otherwise: name how with --calibrate and --percentile" if session.scheme.needs_calibration else ""
        )
        raise DataError(f"{session.opened.choice.model} under {session.scheme.name} is not the receipt's model: its content "
                        f"differs; name that with --model{cause}")  # fmt: skip
    link = receipt.chain[0]
    rows = zip(receipt.hashed_tokens, receipt.chain[1:], _computed(receipt, session), strict=True)
    for number, (receipt_token, receipt_hash, (token, logits)) in enumerate(rows, 1):
        link = next_link(link, logits, token)
        if (token, link) != (receipt_token, receipt_hash):
            return Mismatch(number, receipt_token, token, receipt_hash, link)
    return None


def _computed(receipt: Receipt, session: Session) -> Iterator[tuple[int, F32Array]]:
    prompt = np.array(receipt.prompt_tokens)
    if receipt.sampler is not None and receipt.n_ids is not None:
        (rows,), state = session.runner.prefill([prompt])
        written = choose_tokens(session.runner, [rows[-1]], state, [Chooser(receipt.sampler, receipt.n_ids)])
        yield from ((token, logits) for ((_, token, logits, _),) in islice(written, len(receipt.tokens)))
        return
    (rows,), _ = session.runner.prefill([prompt], logits="all")
    yield from zip(receipt.prompt_tokens, rows, strict=True)
