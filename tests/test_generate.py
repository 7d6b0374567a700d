"""Writing text: from files and pipes, many at once, up to a stop string, with log-probabilities, and on from a saved state."""

import json
import os
import re
import shlex
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import refmamba
from refmamba.commands.main import refmamba as commands
from refmamba.formats.state import ENTRY
from refmamba.run.stops import Stops

PROMPT = "The old man"
SCHEMES = ("int8", "fp32", "w8a8-all")  # the last: a scale spans a call
LIMIT = 0.2  # seconds


@pytest.fixture(scope="module")
def models() -> Callable[..., refmamba.Model]:
    """The small model, each way of running it loaded once."""
    loaded: dict[tuple[str, str], refmamba.Model] = {}

    def load(scheme: str = "int8", backend: str = "cpu") -> refmamba.Model:
        if (scheme, backend) not in loaded:
            loaded[scheme, backend] = refmamba.load("small", scheme=scheme, backend=backend)
        return loaded[scheme, backend]

    return load


def command(*words: str, text: str | None = None) -> Result:
    return CliRunner().invoke(commands, ["generate", *words], input=text)


def objects(done: Result) -> list[dict[str, Any]]:
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.splitlines()]


# To go on from a state


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("backend", ["cpu", "reference", "torch"])
def test_a_state_goes_on_with_the_bits_of_the_unbroken_run(
    scheme: str, backend: str, models: Callable[..., refmamba.Model], tmp_path: Path
) -> None:
    """Drawn at random, so that a draw too many or too few would show; saved by `cpu`, and gone on from elsewhere."""
    draw: dict[str, Any] = {"temperature": 0.8, "seed": 3}
    seen: list[bytes] = []
    whole = (
        models(scheme).stream(PROMPT, max_new_tokens=9, look=lambda logits, _: seen.append(logits.tobytes()), **draw).finish()
    )
    first = models(scheme).generate(PROMPT, max_new_tokens=4, **draw)
    file = tmp_path / "state.safetensors"
    models(scheme).save_state(first.context, file)
    again: list[bytes] = []
    model = models(scheme, backend)
    rest = model.stream(
        "", max_new_tokens=5, after=model.load_state(file), look=lambda logits, _: again.append(logits.tobytes()), **draw
    ).finish()
    assert first.tokens + rest.tokens == whole.tokens
    assert again == seen[4:]
    assert rest.context.tokens.tolist() == whole.context.tokens.tolist()
    assert [x.tobytes() for x in rest.context.state.arrays()] == [x.tobytes() for x in whole.context.state.arrays()]


@pytest.mark.parametrize("scheme", ["int8", "w8a8-all"])
def test_a_new_text_after_a_state_is_one_call(scheme: str, models: Callable[..., refmamba.Model]) -> None:
    """The same calls by hand: the prompt, each token, then the last token and the new text."""
    model = models(scheme)
    first = model.generate(PROMPT, max_new_tokens=3)
    more = model.generate(" came", max_new_tokens=1, after=first.context)
    tokens = model.tokenizer.encode(PROMPT)
    _, state = model.prefill([tokens])
    for token in first.tokens[:2]:
        _, state = model.step([token], state)
    came = model.tokenizer.encode(" came", special=False)
    (rows,), _ = model.prefill([[first.tokens[2], *came]], state)
    assert more.tokens == [int(rows[0].argmax())]
    if scheme == "int8":  # whatever the calls
        assert rows[0].tobytes() == model.logits([*tokens, *first.tokens, *came])[-1].tobytes()


@pytest.mark.parametrize("prompt", [PROMPT, "a"])
def test_a_prompt_is_only_read(prompt: str, models: Callable[..., refmamba.Model], tmp_path: Path) -> None:
    """One token leaves the state of zeros."""
    model = models()
    read = model.generate(prompt, max_new_tokens=0)
    assert (read.text, read.tokens) == ("", [])
    model.save_state(read.context, tmp_path / "s")
    more = model.generate("", max_new_tokens=5, after=model.load_state(tmp_path / "s"))
    assert more.logits_sha256 == model.generate(prompt, max_new_tokens=5).logits_sha256


def test_the_commands_save_and_load_a_state(tmp_path: Path) -> None:
    """As processes, and on another backend; the file is replaced by the one that was loaded from it."""
    file = str(tmp_path / "s.safetensors")
    process = [sys.executable, "-m", "refmamba", "generate", "--scheme", "int8", "--save-state", file]
    run: dict[str, Any] = {"capture_output": True, "text": True, "check": True}
    subprocess.run([*process, PROMPT, "--max-new-tokens", "3"], **run)
    more = subprocess.run([*process, "--load-state", file, "--max-new-tokens", "4", "--backend", "torch"], **run)
    (whole,) = objects(command(PROMPT, "--max-new-tokens", "7", "--json", "--scheme", "int8"))
    (first,) = objects(command(PROMPT, "--max-new-tokens", "3", "--json", "--scheme", "int8"))
    assert first["text"] + more.stdout.removesuffix("\n") == whole["text"]
    prompt = refmamba.load("small", scheme="int8").tokenizer.encode(PROMPT)
    assert load_file(file)["tokens"].tolist() == [*prompt, *whole["tokens"]]


@pytest.fixture
def saved(models: Callable[..., refmamba.Model], tmp_path: Path) -> Path:
    file = tmp_path / "state.safetensors"
    models().save_state(models().generate(PROMPT, max_new_tokens=2).context, file)
    return file


def test_a_state_of_another_scheme_or_model_is_refused_by_name(saved: Path, tmp_path: Path) -> None:
    done = command("--load-state", str(saved), "--scheme", "w4-all")
    assert isinstance(done.exception, refmamba.SchemeError)
    assert "saved under the scheme int8, and this model runs under w4-all" in str(done.exception)
    other = tmp_path / "other"
    refmamba.quantize("small", other, scheme="int8")
    arrays = load_file(other / "model.safetensors")
    arrays["norm_f.weight"] = arrays["norm_f.weight"] * np.float32(1.001)
    save_file(arrays, other / "model.safetensors")
    done = command("--load-state", str(saved), "--model", str(other))
    assert isinstance(done.exception, refmamba.DataError)
    assert f"saved of small, and {other} has other content" in str(done.exception)


def changed(file: Path, arrays: dict[str, Any] | None = None, **entries: Any) -> None:
    """The file with some arrays or entries changed; None leaves one out."""
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    entry = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][ENTRY]) | entries
    entry = {key: value for key, value in entry.items() if value is not None}
    held = {key: value for key, value in (load_file(file) | (arrays or {})).items() if value is not None}
    save_file(held, file, metadata={ENTRY: json.dumps(entry)})


@pytest.mark.parametrize(
    ("arrays", "entries", "words"),
    [
        ({}, {"spec_version": "1.1"}, "saved under specification '1.1'; this program computes 1.2"),
        ({}, {"format": 2}, "a state of format 2; this program reads 1"),
        ({}, {"drawn": None}, "has no entry drawn"),
        ({}, {"more": 1}, "has an entry more"),
        ({}, {"drawn": 10**18}, "drawn is not what"),
        ({}, {"drawn": True}, "drawn is not what"),
        ({}, {"about": []}, "about is not what"),
        ({}, {"scheme": {"name": "x", "bits": 8}}, "scheme"),
        ({}, {"model_sha256": 3}, "model_sha256 is not what"),
        ({"tokens": np.array([4096], np.int32)}, {}, "tokens is not what"),
        ({"tokens": np.array([-1], np.int32)}, {}, "tokens is not what"),
        ({"tokens": np.array([], np.int32)}, {}, "tokens is not what"),
        ({"tokens": np.array([[1]], np.int32)}, {}, "the array tokens is int32 (1, 1)"),
        ({"tokens": np.array([1.0], np.float32)}, {}, "the array tokens is float32"),
        ({"conv": np.zeros((8, 512, 2), np.float32)}, {}, "the array conv is float32 (8, 512, 2)"),
        ({"ssm": np.zeros((8, 512), np.float32)}, {}, "the array ssm is float32 (8, 512)"),
        ({"ssm": None}, {}, "has no array ssm"),
        ({"more": np.zeros(1, np.float32)}, {}, "an array beside tokens, conv and ssm"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_broken_state_is_one_line(
    arrays: dict[str, Any], entries: dict[str, Any], words: str, saved: Path, models: Callable[..., refmamba.Model]
) -> None:
    changed(saved, arrays, **entries)
    with pytest.raises(refmamba.RefmambaError) as raised:
        models().load_state(saved)
    assert words in str(raised.value)


def test_a_file_that_is_no_state_is_one_line(models: Callable[..., refmamba.Model], tmp_path: Path) -> None:
    save_file({"tokens": np.zeros(1, np.int32)}, tmp_path / "other")
    (tmp_path / "short").write_bytes(b"\xff\0")
    for name, words in {"other": "is no saved state", "short": "not safetensors", "missing": "no such file"}.items():
        with pytest.raises(refmamba.RefmambaError, match=words):
            models().load_state(tmp_path / name)


def test_a_state_with_a_nan_ends_in_an_error(saved: Path, models: Callable[..., refmamba.Model]) -> None:
    changed(saved, {"ssm": np.full_like(load_file(saved)["ssm"], np.nan)})
    for backend in ("cpu", "reference", "torch"):
        with pytest.raises(refmamba.NonFiniteError):
            models("int8", backend).generate("", after=models("int8", backend).load_state(saved))


def test_after_a_long_prompt_a_state_is_loaded_at_once(models: Callable[..., refmamba.Model], tmp_path: Path) -> None:
    """100,000 tokens: loading it and the next token take less than 0.2 s of this thread's and its helpers' time."""
    model = models()
    read = model.generate([1, 2, 3, 4] * 25_000, max_new_tokens=0)
    model.save_state(read.context, tmp_path / "s")
    model.generate("", max_new_tokens=1, after=model.load_state(tmp_path / "s"))  # what is made once, is made
    began = time.process_time()
    after = model.load_state(tmp_path / "s")
    next_token = model.generate("", max_new_tokens=1, after=after).tokens
    assert time.process_time() - began < LIMIT
    assert len(after.tokens) == 100_000
    assert next_token == model.generate([1, 2, 3, 4] * 25_000, max_new_tokens=1).tokens


# Prompts from elsewhere


def test_a_prompt_comes_from_a_pipe_and_from_a_file(tmp_path: Path) -> None:
    """One end of a line at the end is the file's, not the text's; a byte order mark is none of it either."""
    (tmp_path / "a").write_bytes("\ufeffTwo\nlines\n".encode())
    (tmp_path / "b").write_bytes(b"Two\nlines\r\n")
    (tmp_path / "c").write_bytes(b"Two\nlines\n\n")
    quick = ("--max-new-tokens", "1", "--json")
    prompts = [objects(command("--file", str(tmp_path / name), *quick))[0]["prompt"] for name in "abc"]
    assert prompts == ["Two\nlines", "Two\nlines", "Two\nlines\n"]
    assert objects(command("-", *quick, text="Two\nlines\n"))[0]["prompt"] == "Two\nlines"
    long = "word " * 60_000  # more than a process's argument can hold
    assert objects(command("-", *quick, text=long))[0]["prompt"] == long


def test_a_pipe_that_is_not_asked_for_is_told_and_not_waited_for() -> None:
    """Nothing is ever written into it, and it stays open."""
    read, write = os.pipe()
    words = [sys.executable, "-m", "refmamba", "generate", PROMPT, "--max-new-tokens", "1"]
    done = subprocess.run(words, stdin=read, capture_output=True, text=True, timeout=120, check=True)
    os.close(read)
    os.close(write)
    line = "refmamba: standard input is a pipe, and is not read; to read it give - as the prompt\n"
    assert done.stderr.count(line) == 1
    assert done.stdout.startswith(PROMPT)
    again = subprocess.run(
        [*words[:-3], "-", "--no-echo", *words[-2:]], input="The", capture_output=True, text=True, check=True
    )
    assert line not in again.stderr
    assert not again.stdout.startswith("The")


def test_standard_input_that_is_not_utf_8_is_one_line() -> None:
    done = CliRunner().invoke(commands, ["generate", "-"], input=b"a\n\xff")
    assert isinstance(done.exception, refmamba.FileError)
    assert str(done.exception).startswith("standard input: byte 0xff in line 2 is not UTF-8")


# Many at once


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_batch_has_the_bits_of_each_alone(scheme: str, models: Callable[..., refmamba.Model]) -> None:
    """Eighteen prompts, so two groups; of several lengths, and some end earlier than others."""
    model = models(scheme)
    prompts = [PROMPT[:length] for length in range(1, 10)] * 2
    batch = list(model.generate_batch(prompts, max_new_tokens=6, stop=["e", "\n"]))
    assert len({len(generation.tokens) for generation in batch}) > 2
    for prompt, generation in zip(prompts, batch, strict=True):
        alone = model.generate(prompt, max_new_tokens=6, stop=["e", "\n"])
        assert (generation.text, generation.tokens) == (alone.text, alone.tokens)
        assert generation.logits_sha256 == alone.logits_sha256
    with pytest.raises(refmamba.DataError, match="written in a batch"):
        assert batch[0].context


def test_samples_are_what_each_seed_gives_alone(models: Callable[..., refmamba.Model]) -> None:
    """Eighteen of one prompt, and so two groups; two of each of several prompts; and after a context."""
    model, draw = models(), {"temperature": 1.0, "max_new_tokens": 5}
    after = model.generate("It was a", max_new_tokens=2).context
    for prompts, n, context in ((["It was a"], 18, None), (["She", "He", "The"], 2, None), ([" came", ""], 2, after)):
        samples = list(model.generate_batch(prompts, n=n, seed=5, after=context, **draw))  # type: ignore[arg-type]
        expected = [model.generate(p, seed=5 + i, after=context, **draw) for p in prompts for i in range(n)]  # type: ignore[arg-type]
        assert [s.logits_sha256 for s in samples] == [e.logits_sha256 for e in expected]
        assert [s.text for s in samples] == [e.text for e in expected]


def test_samples_are_made_when_they_are_needed(models: Callable[..., refmamba.Model]) -> None:
    model = models()
    expected = model.generate("It was a", max_new_tokens=1, temperature=1.0, seed=3).tokens
    tracemalloc.start()
    first = next(model.generate_batch(["It was a"], n=100_000, max_new_tokens=1, temperature=1.0, seed=3))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert first.tokens == expected
    assert peak < 20e6  # bytes


def test_the_batch_command_writes_a_line_for_each(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    prompts = ["The old", "naïve 中\n", "", "x"]
    file.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts) + "\n\n", "utf-8")
    found = objects(command("--batch", str(file), "--max-new-tokens", "4"))
    assert [values["prompt"] for values in found] == prompts
    for prompt, values in zip(prompts, found, strict=True):
        (alone,) = objects(command("--json", "--max-new-tokens", "4", "--", prompt))
        assert alone.keys() == values.keys()
        assert {**alone, "timings": None} == {**values, "timings": None}


def test_the_samples_command_prints_each(models: Callable[..., refmamba.Model]) -> None:
    words = (PROMPT, "--n", "2", "--temperature", "1", "--max-new-tokens", "4", "--scheme", "int8", "--seed", "7")
    found = objects(command(*words, "--json"))
    assert [values["seed"] for values in found] == [7, 8]
    expected = [models().generate(PROMPT, temperature=1, max_new_tokens=4, seed=seed).text for seed in (7, 8)]
    assert [values["text"] for values in found] == expected
    assert command(*words).stdout == f"{PROMPT}{expected[0]}\n\n{PROMPT}{expected[1]}\n"
    assert command(*words, "--no-echo").stdout == f"{expected[0]}\n\n{expected[1]}\n"


@pytest.mark.parametrize(
    ("line", "words"),
    [("[]", "not a JSON object"), ("{", "not JSON"), ("{}", "is not of the form"), ('{"prompt": 3}', "is not of the form"),
     ('{"prompt": "a", "n": 1}', "is not of the form"), ('{"prompt": "\\ud800"}', "surrogate")],
)  # fmt: skip
def test_a_wrong_line_of_a_batch_is_told_before_anything_is_written(line: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(f'{{"prompt": "a"}}\n{line}\n')
    done = command("--batch", str(tmp_path / "p.jsonl"))
    assert isinstance(done.exception, refmamba.RefmambaError)
    assert str(done.exception).startswith(f"{tmp_path / 'p.jsonl'}, line 2: ")
    assert words in str(done.exception)
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a", "--file", "f"], "one of PROMPT, --file and --batch"),
        (["--batch", "f", "--file", "f"], "one of PROMPT, --file and --batch"),
        (["--logprobs", "1"], "give --json too"),
        (["--n", "2", "--save-state", "s"], "--save-state is of one text"),
        (["--batch", "f", "--receipt", "r.json"], "--receipt is of one text"),
        (["--load-state", "s", "--receipt", "r.json"], "--receipt is of a whole text"),
        (["--max-new-tokens", "0"], "only reads a prompt"),
        (["--max-new-tokens", "0", "--save-state", "s", "--receipt", "r.json"], "tokens that are written"),
        (["--stop", ""], "a stop string is ''"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_do_not_go_together_are_one_line(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = command(*words)
    assert isinstance(done.exception, refmamba.DataError)
    assert said in str(done.exception)
    assert list(tmp_path.iterdir()) == []


# Stop strings


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.lists(st.integers(0, 4)))
def test_a_text_ends_before_the_stop_string_that_ends_first(text: str, stops: list[str], cuts: list[int]) -> None:
    """Whatever the pieces; against a search of the whole text, prefix by prefix. What is held back could be a beginning."""
    ends = [end for end in range(1, len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    expected = text
    if ends:
        expected = min((text[: ends[0]].removesuffix(stop) for stop in stops), key=len)
    watched, passed, seen = Stops(stops), "", 0
    for cut in [*cuts, len(text)]:
        passed += watched.put(text[seen : seen + cut])
        seen = min(len(text), seen + cut)
        if watched.reached:
            break
        held = text[len(passed) : seen]
        assert held == "" or any(stop.startswith(held) for stop in stops)
        assert not any(stop.startswith(text[start:seen]) for stop in stops for start in range(len(passed)))
    assert passed + watched.flush() == expected
    assert watched.reached == bool(ends)


def test_a_stop_string_spans_tokens_and_nothing_of_it_is_streamed(models: Callable[..., refmamba.Model]) -> None:
    model = models()
    free = model.generate("She said", max_new_tokens=12)
    stop = free.text[3:9]
    assert len(model.tokenizer.encode(stop)) > 1
    stream = model.stream("She said", max_new_tokens=12, stop=["never", stop])
    pieces = list(stream)
    assert "".join(pieces) == stream.text == free.text[:3]
    assert stream.tokens == free.tokens[: len(stream.tokens)]
    assert len(stream.tokens) < 12
    held = model.generate("She said", max_new_tokens=3, stop=free.text[5:] + "more")  # the text ends inside of it
    assert held.text == model.generate("She said", max_new_tokens=3).text
    done = command("She said", "--max-new-tokens", "12", "--scheme", "int8", "--stop", "never", "--stop", stop, "--no-echo")
    assert done.stdout == free.text[:3] + "\n"


# Log-probabilities


def test_logprobs_are_those_of_the_softmax(models: Callable[..., refmamba.Model]) -> None:
    """Against NumPy's in float64, of the same logits."""
    seen: list[Any] = []
    model = models()
    written = model.stream(
        PROMPT, max_new_tokens=4, temperature=1.5, logprobs=3, look=lambda logits, token: seen.append((logits.copy(), token))
    ).finish()
    assert [chosen.token for chosen in written.logprobs] == written.tokens
    for (logits, token), chosen in zip(seen, written.logprobs, strict=True):
        wide = logits.astype(np.float64)
        expected = wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())
        assert chosen.logprob == pytest.approx(expected[token], abs=1e-5)
        assert [likely.token for likely in chosen.top] == np.argsort(-wide, kind="stable")[:3].tolist()
        assert [likely.logprob for likely in chosen.top] == pytest.approx(np.sort(expected)[::-1][:3], abs=1e-5)
        assert chosen.text == model.tokenizer.decode([token])
    (values,) = objects(command(PROMPT, "--max-new-tokens", "1", "--logprobs", "2", "--json", "--scheme", "int8"))
    (first,) = values["logprobs"]
    assert first["token"] == first["top"][0]["token"] == values["tokens"][0]
    assert (len(first["top"]), first["text"]) == (2, values["text"])
    assert model.generate(PROMPT, max_new_tokens=1).logprobs == []


def test_the_document_shows_what_is_printed() -> None:
    """docs/GENERATE.md's log-probabilities."""
    text = (Path(__file__).parents[1] / "docs" / "GENERATE.md").read_text("utf-8")
    shown = re.search(r"    \$ refmamba generate (.*)\n    {... (\"logprobs\".*\n.*), ...}", text)
    assert shown is not None
    (values,) = objects(command(*shlex.split(shown[1])))
    assert values["logprobs"] == json.loads(f"{{{shown[2]}}}")["logprobs"]
