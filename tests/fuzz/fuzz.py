"""Changes the files in tests/fuzz/seeds in every way, and reads them as refmamba's users would: `make fuzz`.

Each case ends in a value or in a RefmambaError of one printable line, within 20 seconds and 3 GB; all else is a finding, which
is printed and kept. Every kind of file is read in a process of its own, so that one that dies is a finding too. Hypothesis
draws the changes: the same seed, the same cases.
"""

import argparse
import contextlib
import importlib
import io
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import click
import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from refmamba.commands.main import COMMANDS, refmamba
from refmamba.conformance.against import compare_model, compare_operation
from refmamba.conformance.dumps import SUFFIXES, read_dump
from refmamba.errors import LONGEST, RefmambaError
from refmamba.eval_tasks.load import load_tasks
from refmamba.eval_tasks.results import Key, Result, Results
from refmamba.eval_tasks.score import Score
from refmamba.formats.calibration import load_calibration
from refmamba.formats.folder import content_hash, open_checkpoint
from refmamba.formats.gguf import ARRAY, NUMBERS, TEXT, GGUFCheckpoint, _Bytes, _entry
from refmamba.formats.hub import ModelFiles
from refmamba.formats.scheme import open_scheme
from refmamba.formats.state import open_state
from refmamba.formats.text import read_text
from refmamba.formats.tokenizer import Tokenizer, load_tokenizer
from refmamba.run.receipt import BOUND, first_link, read_receipt, replay
from refmamba.run.session import ModelChoice, open_model, open_session
from refmamba.spec.calibrate import calibrate
from refmamba.spec.config import MambaConfig
from refmamba.spec.mamba1 import Mamba
from refmamba.spec.parameters import QuantizedModel, quantize_model
from refmamba.spec.scheme import parse_scheme

SEEDS = Path(__file__).parent / "seeds"
GIGABYTES, SECONDS = 3, 20  # of a case
CHECKS = list(HealthCheck)  # of hypothesis, which are about tests
KEY = Key("m" * 64, "{}", "", "copa", "d" * 64, "1.0", 2048)  # of the results in the seeds
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**53 + 1, 2**63, -(2**63) - 1, 10**30, 1e308, 1e-320, -0.0, float("nan"),
    float("inf"), "", "a", "a" * 6000, "\ud800", "a\nb\x1b[31m", "../../etc/passwd", "\0", [], {}, [[]], {"": None}, [None],
    "NaN",
)  # fmt: skip
# Of a GGUF file: keys that are read and that the seed does not have, and values of texts and numbers that mean something.
OTHER_KEYS = ("split.count", "general.alignment", "tokenizer.chat_template", "mamba.expert_count")
OTHER_VALUES = (
    "mamba",
    "mamba2",
    "jamba",
    "llama",
    "gpt2",
    "none",
    "gpt-2",
    "mpt",
    "a b",
    " a",
    "the",
    2,
    4,
    6,
    8,
    16,
    32,
    64,
    260,
)
ALIGNMENT = 32  # of its tensors
BYTES = (b"\0", b"\xff", b"\xef\xbb\xbf", b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b"\r", b"\n\n", b"\t", b"NaN", b"\\ud800",
         b"<!DOCTYPE a [<!ENTITY b 'c'>]>", b"&b;", b"\x80\x02", b"PK\x03\x04", b"PAR1", b"\xc3", b"\xed\xa0\x80")  # fmt: skip


class Enough(KeyboardInterrupt):
    """The time is up: hypothesis lets it through at once."""


class TooLong(BaseException):
    """A case that takes more than SECONDS. No `except Exception` takes it for its own."""


def json_changes(rng: Random, content: bytes) -> bytes:
    """A JSON file with some of its values, keys or entries changed."""
    values = json.loads(content)
    for _ in range(rng.randint(1, 3)):
        values = _changed(rng, values)
    return json.dumps(values, indent=rng.choice([None, 1])).encode()


def _changed(rng: Random, value: Any) -> Any:
    """One change, somewhere in a value."""
    if not isinstance(value, dict | list) or not value or rng.randrange(10) == 0:
        return rng.choice([*ODD, rng.randint(-300, 300), rng.gauss(0, 10), chr(rng.randrange(0x110000))])
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = rng.choice(keys)
    what = rng.choice(["go on", "go on", "go on", "remove", "repeat", "rename"])
    changed = value.copy()
    if what == "go on":
        changed[key] = _changed(rng, value[key])
    elif what == "remove":
        del changed[key]
    elif isinstance(changed, list):
        changed += [value[key]] * rng.choice([1, 2, 50])
    else:
        changed[rng.choice([*(odd for odd in ODD if isinstance(odd, str)), *keys])] = value[key]
    return changed


def byte_changes(rng: Random, content: bytes) -> bytes:
    """A file with some of its bytes changed, doubled, left out or put in."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, min(len(content), rng.choice([16, 200, len(content)])))
        what = rng.choice(["flip", "cut", "leave out", "put in", "double", "number"])
        length = rng.choice([1, 2, 8, 100])
        if what == "flip" and at < len(content):
            content = content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
        elif what == "cut":
            content = content[:at]
        elif what == "leave out":
            content = content[:at] + content[at + length :]
        elif what == "put in":
            content = content[:at] + rng.choice([*BYTES, rng.randbytes(rng.randrange(9))]) + content[at:]
        elif what == "double":
            content = content[: at + length] + content[at:]
        else:
            number = rng.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1])
            content = content[:at] + number.to_bytes(8, "little") + content[at + 8 :]
    return content


def header_changes(rng: Random, content: bytes) -> bytes:
    """A safetensors file whose JSON header is changed, its length told rightly."""
    length = int.from_bytes(content[:8], "little")
    header = json_changes(rng, content[8 : 8 + length])
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def receipt_changes(rng: Random, content: bytes) -> bytes:
    """A receipt that was changed by somebody who knows the chain's first link."""
    values = json.loads(json_changes(rng, content))
    if isinstance(values, dict) and isinstance(values.get("chain"), list) and values["chain"]:
        with contextlib.suppress(UnicodeEncodeError):
            values["chain"][0] = first_link({entry: values.get(entry) for entry in BOUND})
    return json.dumps(values).encode()


def array_changes(rng: Random, content: bytes) -> bytes:
    """A .npz whose arrays and words are changed, and which is whole."""
    with np.load(io.BytesIO(content)) as entries:
        arrays: dict[str, Any] = {name: entries[name] for name in entries.files}
    for _ in range(rng.randint(1, 3)):
        name, what = rng.choice(list(arrays)), rng.choice(["value", "dtype", "shape", "rename", "remove", "about"])
        array = arrays[name]
        with np.errstate(all="ignore"):
            if what == "value" and array.size and array.dtype.kind in "fiu":
                arrays[name] = array.copy()
                arrays[name].flat[rng.randrange(array.size)] = rng.choice(
                    [0, 1, 127, *([np.nan, np.inf] if array.dtype.kind == "f" else [])]
                )
            elif what == "dtype" and array.dtype.kind in "fiu":
                kinds = ["f2", "f4", "f8", "g", "i1", "i4", "i8", "u1", "u8", "?", "c8", "S3", "U2", "M8[s]", ">f4"]
                arrays[name] = array.astype(rng.choice(kinds))
            elif what == "shape":
                arrays[name] = (
                    rng.choice([array[None], array[:0], array.reshape(-1), array[:1], array.T, np.array(1.0)])
                    if array.ndim
                    else array[None]
                )
            elif what == "rename":
                arrays[
                    rng.choice([*arrays, "", "logits", "a" * 600, "a\nb", "arguments.0", "arguments.9", "layers.0.in_proj"])
                ] = array
            elif what == "remove" and len(arrays) > 1:
                del arrays[name]
            elif what == "about" and "about" in arrays:
                with contextlib.suppress(ValueError):  # after another change it need not be JSON
                    arrays["about"] = np.array(json_changes(rng, str(arrays["about"]).encode()).decode())
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def gguf_changes(rng: Random, content: bytes) -> bytes:
    """A GGUF file whose keys, values and table of tensors are changed, and whose lengths and counts are told rightly."""
    start = _Bytes(Path("seed"), np.frombuffer(content, np.uint8))
    start.take(8)
    n_tensors, n_keys = start.number("<Q"), start.number("<Q")
    keys = [(start.text(), kind := start.number("<I"), _plain(start.value(kind))) for _ in range(n_keys)]
    tensors: list[tuple[str, int, Sequence[int], int]] = [_entry(start) for _ in range(n_tensors)]
    data = content[-(-start.at // ALIGNMENT) * ALIGNMENT :]
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(keys))
        key, kind, value = keys[at]
        what = rng.choice(["value", "value", "type", "rename", "remove", "repeat", "tensor"])
        if what == "value":
            keys[at] = (key, kind, _changed_value(rng, value))
        elif what == "type":
            keys[at] = (key, rng.choice([*NUMBERS, TEXT, ARRAY, 13, 255]), rng.choice([value, *ODD]))
        elif what == "rename":
            names = [name for name, *_ in keys]
            keys[at] = (rng.choice([*names, *OTHER_KEYS, *(odd for odd in ODD if isinstance(odd, str))]), kind, value)
        elif what == "remove":
            del keys[at]
        elif what == "repeat":
            keys.insert(rng.randrange(len(keys)), (rng.choice([key, *OTHER_KEYS]), kind, _changed_value(rng, value)))
        else:
            at = rng.randrange(len(tensors))
            name, number, shape, offset = tensors[at]
            sizes = [0, 1, 2**31, 2**63, 2**64 - 1, *shape]
            tensors[at] = rng.choice([
                (rng.choice([tensor[0] for tensor in tensors]), number, shape, offset),
                (name, rng.randrange(45), shape, offset),
                (name, number, rng.choice([shape[::-1], [*shape, 1], [], rng.choices(sizes, k=rng.randint(1, 5))]), offset),
                (name, number, shape, rng.choice([0, 1, 32, 2**63, 2**64 - 32, tensors[0][3], len(data)])),
            ])  # fmt: skip
    out = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(keys))
    out += b"".join(_packed(TEXT, key) + struct.pack("<I", kind) + _packed(kind, value) for key, kind, value in keys)
    for name, number, shape, offset in tensors:
        out += _packed(TEXT, name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], number, offset)
    return out + b"\0" * (-len(out) % ALIGNMENT) + data


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _changed_value(rng: Random, value: Any) -> Any:
    """A key's value, or an element or the length of an array, changed."""
    if isinstance(value, list) and value and rng.randrange(8):
        at, other = rng.randrange(len(value)), rng.choice(value)
        return rng.choice([
            [*value[:at], _changed_value(rng, other), *value[at + 1 :]], [*value[:at], other, *value[at + 1 :]],
            value[:at], value[at:], value + value[:at], value[::-1], [],
        ])  # fmt: skip
    return rng.choice([*ODD, *OTHER_VALUES, rng.randint(-300, 300), rng.gauss(0, 10), chr(rng.randrange(0x110000))])


def _packed(kind: int, value: Any) -> bytes:
    """A value's bytes as a type, as near as the type has it."""
    if kind in NUMBERS:
        number, dtype = value if isinstance(value, int | float) else len(str(value)), NUMBERS[kind]
        if dtype.kind == "f":
            with np.errstate(over="ignore"):
                return np.array(number, dtype).tobytes()
        whole = int(number) if math.isfinite(number) else 0
        return (whole % (1 << 8 * dtype.itemsize)).to_bytes(dtype.itemsize, "little")
    if kind != ARRAY:
        text = str(value).encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(text)) + text
    elements = value if isinstance(value, list) else [value]
    element = TEXT if any(isinstance(x, str) for x in elements) else 6 if any(isinstance(x, float) for x in elements) else 5
    return struct.pack("<IQ", element, len(elements)) + b"".join(_packed(element, x) for x in elements)


def command_lines(rng: Random, content: bytes) -> bytes:
    """A command, its own options and odd words, one in a line."""
    name = rng.choice(COMMANDS)
    command = refmamba.get_command(click.Context(refmamba), name)
    assert command is not None
    words = [word for param in command.params for word in param.opts if word.startswith("-") and word != "--help"]
    words += [str(odd).replace("\n", " ") for odd in ODD] + [".", "/", "F.json", "F.png", "/dev/null", "small", "1,2", "int8"]
    return "\n".join([name, *rng.choices(words, k=rng.randrange(7))]).encode("utf-8", "surrogatepass")


Change = Callable[[Random, bytes], bytes]


@dataclass(frozen=True)
class Target:
    """A kind of file. folder: of the seeds, copied; file: what is changed in it; read: what is given the folder."""

    folder: str
    file: str
    changes: tuple[Change, ...]
    read: Callable[[Path], object]


def read_model(folder: Path) -> object:
    """Open a model, read every tensor, and run it where it is whole."""
    model = open_checkpoint(folder)
    content_hash(model)
    return Mamba(model).prefill([np.array([1, 2])]) if isinstance(model, QuantizedModel) else None


def work(tokenizer: Tokenizer) -> bytes:
    """Let a tokenizer encode a text, decode it, and decode it piece by piece."""
    ids = tokenizer.encode("The old man,\nnaïve 中文 🙂 the.")
    stream = tokenizer.stream()
    text = "".join([*map(stream.put, ids), stream.flush()])
    assert text == tokenizer.decode(ids), f"{ids} stream as {text!r}"
    return text.encode()


def read_tokenizer(folder: Path) -> object:
    """Load a tokenizer and let it work."""
    config = MambaConfig(8, 1, 600, d_state=4, d_conv=4, expand=2)
    return work(load_tokenizer(ModelFiles(folder, folder / "tokenizer.json"), config))


def read_gguf_file(folder: Path) -> object:
    """The same of a GGUF file, its model too."""
    file = folder / "model.gguf"
    model = open_checkpoint(file)
    assert isinstance(model, GGUFCheckpoint)
    return (
        work(load_tokenizer(ModelFiles(file, file.with_name("tokenizer.json")), model.config)),
        content_hash(model),
        model.types(),
    )


def read_calibration(folder: Path) -> object:
    """Load maxima, and quantize with them."""
    source = open_checkpoint(SEEDS / "hf")
    assert not isinstance(source, QuantizedModel)
    maxima = load_calibration(folder / "calibration.json", source.config).absmax
    return dict(quantize_model(source, parse_scheme("int8-smooth"), maxima).params)


def read_scheme(folder: Path) -> object:
    """Open a scheme, and run a model under it."""
    (file,) = (path for path in folder.iterdir() if path.suffix == ".json")
    scheme, source = open_scheme(str(file)), open_checkpoint(SEEDS / "hf")
    assert not isinstance(source, QuantizedModel)
    maxima = calibrate(source, np.arange(5)) if scheme.needs_calibration else None
    return Mamba(quantize_model(source, scheme, maxima)).prefill([np.array([1, 2])])


def read_state_file(folder: Path) -> object:
    """Read a state of the model in the seeds, and go on from it."""
    source = open_checkpoint(SEEDS / "hf")
    assert not isinstance(source, QuantizedModel)
    saved, model = (
        open_state(folder / "state.safetensors", source.config),
        Mamba(quantize_model(source, parse_scheme("w8-all"))),
    )
    return model.step(saved.tokens[-1:], model.restore_state(saved.conv[None], saved.ssm[None]))


def read_receipt_file(folder: Path) -> object:
    """Read a receipt, and compute its run again on a small model."""
    receipt, scheme = read_receipt(folder / "receipt.json")
    session = open_session(ModelChoice(str(SEEDS / "hf"), scheme, "reference", calibrate=SEEDS / "calibration.json"))
    few = replace(receipt, model_sha256=content_hash(session.opened.quantized(scheme)))
    return replay(few, session)


def read_dump_file(folder: Path) -> object:
    """Compare a dump with the specification."""
    (file,) = (path for path in folder.iterdir() if path.suffix in SUFFIXES)
    dump = read_dump(file)
    if "operation" in dump.about:
        return compare_operation(dump, None)
    tokens = None if "tokens" in dump.arrays else np.arange(3)
    return compare_model(dump, open_model(ModelChoice(str(SEEDS / "hf"), "int8")), tokens, None)


def read_task(folder: Path) -> object:
    """Load the rows of a task."""
    (file,) = (path for path in folder.iterdir() if path.suffix in (".jsonl", ".parquet", ".xml", ".tsv"))
    return load_tasks([file.stem], [f"{file.stem}={file}"])


def read_results(folder: Path) -> object:
    """Read a results file, and write into it."""
    with Results(folder / "results.sqlite") as results:
        found = results.load(KEY)
        results.save(KEY, [Result(7, (Score(-1.0, True),))])
        return found


def read_text_file(folder: Path) -> object:
    """Read a text."""
    return read_text(folder / "text.txt")


def read_options(folder: Path) -> object:
    """The words of a command line, one in each line of a file; the command itself is not run."""
    content = (folder / "options").read_bytes().replace(b"\0", b"")  # which no word of a process can hold
    words = content.decode("utf-8", "surrogateescape").split("\n")
    command = refmamba.get_command(click.Context(refmamba), words[0] if words[0] in COMMANDS else "eval")
    assert command is not None
    os.chdir(folder)
    with command.make_context(words[0], words[1:]) as context:
        return context.params


JSON, ANY, HEADER = json_changes, byte_changes, header_changes
DUMP_CHANGES: dict[str, tuple[Change, ...]] = {
    ".npz": (array_changes, array_changes, ANY),
    ".safetensors": (HEADER, ANY),
    ".npy": (ANY,),
}
SCHEMES = ("int8-smooth", "int4-all", "int8-hadamard", "llm-int8", "flatten-int8")
TASKS = [file.name for file in sorted(SEEDS.iterdir()) if file.suffix in (".jsonl", ".parquet", ".xml", ".tsv")]
TARGETS = {
    "config": Target("hf", "config.json", (JSON, JSON, ANY), read_model),
    "safetensors": Target("hf", "model.safetensors", (HEADER, ANY), read_model),
    "index": Target("shards", "model.safetensors.index.json", (JSON, ANY), read_model),
    "bin": Target("bin", "pytorch_model.bin", (ANY,), read_model),
    "quantized config": Target("int8-smooth", "config.json", (JSON, JSON, ANY), read_model),
    **{f"quantized {name}": Target(name, "model.safetensors", (HEADER, ANY), read_model)
       for name in ("int8-smooth", "w4-all", "int4-all", "flatten-int8")},
    **{f"tokenizer {name}": Target("", f"tokenizer-{name}.json", (JSON, JSON, ANY), read_tokenizer)
       for name in ("bpe", "bytes", "wordpiece", "unigram")},
    "tokenizer_config": Target("hf", "tokenizer_config.json", (JSON, ANY), read_tokenizer),
    "generation_config": Target("hf", "generation_config.json", (JSON, ANY), read_tokenizer),
    "gguf": Target("gguf", "model.gguf", (ANY,), read_gguf_file),
    "gguf keys": Target("gguf", "model.gguf", (gguf_changes,), read_gguf_file),
    "calibration": Target("", "calibration.json", (JSON, JSON, ANY), read_calibration),
    **{f"scheme {name}": Target("", f"{name}.json", (JSON, JSON, ANY), read_scheme) for name in SCHEMES},
    **{f"task {name}": Target("", name, (ANY,), read_task) for name in TASKS},
    "results": Target("", "results.sqlite", (ANY,), read_results),
    "receipt": Target("", "receipt.json", (receipt_changes, JSON, ANY), read_receipt_file),
    **{f"dump {name}": Target("", name, DUMP_CHANGES[Path(name).suffix], read_dump_file)
       for name in ("forward.npz", "operation.npz", "forward.safetensors", "logits.npy")},
    "state": Target("", "state.safetensors", (HEADER, ANY), read_state_file),
    "text": Target("", "text.txt", (ANY,), read_text_file),
    "options": Target("", "options", (command_lines,), read_options),
}  # fmt: skip


def _stop(number: int, frame: FrameType | None) -> None:
    raise TooLong(f"more than {SECONDS} seconds")


def wrong(read: Callable[[Path], object], folder: Path) -> str:
    """What is wrong with how a case ends; empty where nothing is."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        read(folder)
    except RefmambaError as error:
        message = str(error)
        if not message.isprintable() or len(message) > LONGEST or not message:
            return f"a message that is not one printable line: {message[:400]!r}"
    except (click.ClickException, click.exceptions.Exit):
        pass
    except BaseException as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "refmamba" in frame.filename]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        return f"{type(error).__name__} at {place}: {str(error)[:200]!r}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return ""


def fuzz(name: str, cases: int, seconds: float, start: int, kept: Path) -> None:
    """Run the cases of a kind, in this process. kept: a folder for the findings, the count of cases, and the case that runs."""
    target, count, seen = TARGETS[name], 0, set[str]()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _stop)
    place = kept / "place"
    shutil.copytree(SEEDS / target.folder, place) if target.folder else place.mkdir()
    seeds = SEEDS / target.folder / target.file
    base = seeds.read_bytes() if seeds.exists() else b""  # command lines need no seed
    changed = place / ("tokenizer.json" if target.file.startswith("tokenizer-") else target.file)
    if base:
        changed.write_bytes(base)
        target.read(place)  # the seed itself is read, and what is compiled is compiled
    until, pages = time.monotonic() + seconds, int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + GIGABYTES * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))

    @seed(start)
    @settings(max_examples=cases, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=CHECKS)
    @given(st.randoms(use_true_random=True))
    def case(rng: Random) -> None:
        nonlocal count
        if time.monotonic() > until:
            raise Enough
        content = rng.choice(target.changes)(rng, base)
        (kept / "running").write_bytes(content)
        changed.write_bytes(content)
        found, count = wrong(target.read, place), count + 1
        (kept / "count").write_text(str(count))
        kind = found.partition(":")[0] + found.partition(":")[2][:12]
        if found and kind not in seen:
            seen.add(kind)
            (kept / f"finding-{len(seen)}").write_bytes(content)
            print(f"{name}: {found}\n    {kept / f'finding-{len(seen)}'}", flush=True)

    with contextlib.suppress(Enough):
        case()
    (kept / "running").unlink(missing_ok=True)


def main() -> None:
    """Every kind of file in turn; exit status 1 where something was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000, help="in all")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="kinds whose names begin so")
    arguments = parser.parse_args()
    names = [name for name in TARGETS if name.startswith(arguments.only or "")]
    where, total, findings, began = Path(tempfile.mkdtemp(prefix="refmamba-fuzz-")), 0, 0, time.monotonic()
    for package in ("torch", "pyarrow.parquet"):  # once, before the processes fork
        with contextlib.suppress(ImportError):
            importlib.import_module(package)
    print(f"{'kind':<24}{'cases':>8}{'seconds':>9}{'findings':>10}")
    for number, name in enumerate(names):
        kept, start = where / name.replace(" ", "-"), time.monotonic()
        kept.mkdir()
        left = (arguments.seconds - (start - began)) / (len(names) - number)
        cases = -(-arguments.cases // len(names))
        process = multiprocessing.get_context("fork").Process(target=fuzz, args=(name, cases, left, arguments.seed, kept))
        process.start()
        process.join()
        found = len(list(kept.glob("finding-*")))
        if process.exitcode != 0:
            found += 1
            print(f"{name}: the process ended with {process.exitcode}\n    {kept / 'running'}")
        count = int((kept / "count").read_text()) if (kept / "count").exists() else 0
        print(f"{name:<24}{count:>8}{time.monotonic() - start:>9.0f}{found:>10}", flush=True)
        total, findings = total + count, findings + found
    print(f"{'all':<24}{total:>8}{time.monotonic() - began:>9.0f}{findings:>10}")
    if not findings:
        shutil.rmtree(where)
    sys.exit(findings > 0)


if __name__ == "__main__":
    main()
