"""`import refmamba`: what it offers, that it is light, and that it gives what the command line gives."""

import doctest
import inspect
import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refmamba
from refmamba import errors
from refmamba.run import model as face
from refmamba.spec.scheme import parse_scheme

ROOT = Path(__file__).parents[1]
PROMPT = "The old man"
NAMES = {
    "load", "quantize", "Model", "Scheme", "SPEC_VERSION", "__version__",
    "RefmambaError", "SchemeError", "CheckpointError", "HubError", "TokenizerError", "DataError", "FileError", "BackendError",
    "NonFiniteError",
}  # fmt: skip


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def command(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "refmamba", *words], capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def model() -> refmamba.Model:
    return refmamba.load("small", scheme="int8")


def test_all_is_what_is_documented_and_every_name_is_there() -> None:
    assert set(refmamba.__all__) == NAMES
    assert len(refmamba.__all__) == len(NAMES)
    for name in NAMES:
        assert getattr(refmamba, name) is not None
    assert set(dir(refmamba)) >= NAMES
    with pytest.raises(AttributeError, match="module 'refmamba' has no attribute 'nonsense'"):
        refmamba.nonsense  # type: ignore[attr-defined]  # noqa: B018


def test_every_error_is_offered() -> None:
    """The base and its children; what is narrower is in refmamba.errors."""
    classes = {name: value for name, value in vars(errors).items() if inspect.isclass(value)}
    offered = {name for name, value in classes.items() if errors.RefmambaError in (value, *value.__bases__)}
    assert offered == {name for name in NAMES if name.endswith("Error")}
    for name in offered:
        assert issubclass(getattr(refmamba, name), refmamba.RefmambaError)


def test_a_star_import_gives_exactly_them() -> None:
    code = "before = set(globals()); from refmamba import *; print(*sorted(set(globals()) - before - {'before'}))"
    assert set(python(code).split()) == NAMES


def test_what_is_light_stays_light() -> None:
    """The errors and the versions need nothing; a name that is not there loads nothing either."""
    code = """if True:
        import sys, refmamba
        refmamba.RefmambaError, refmamba.SPEC_VERSION, refmamba.__version__, dir(refmamba), hasattr(refmamba, "nonsense")
        print(*[name for name in ("numpy", "numba", "torch", "click", "tokenizers") if name in sys.modules])
        refmamba.Scheme
        print(*[name for name in ("numpy", "torch", "click", "tokenizers") if name in sys.modules])
        refmamba.load
        print(*[name for name in ("torch",) if name in sys.modules])"""
    assert python(code).splitlines() == ["", "numpy", ""]


def test_type_checkers_see_what_it_offers(tmp_path: Path) -> None:
    file = tmp_path / "user.py"
    file.write_text("""import refmamba
reveal_type(refmamba.load("small", bits=8).generate("x").text)
reveal_type(refmamba.quantize("small", "folder", scheme=refmamba.Scheme("mine")))
refmamba.load("small", bitz=8)
refmamba.nonsense
""")
    words = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", str(file)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line.partition("user.py:")[2] for line in done.stdout.splitlines() if "defined in" not in line]
    assert lines == [
        '2: note: Revealed type is "str"',
        '3: note: Revealed type is "pathlib.Path"',
        '4: error: Unexpected keyword argument "bitz" for "load"  [call-arg]',
        '5: error: Module has no attribute "nonsense"  [attr-defined]',
    ]


@pytest.mark.parametrize("module", [refmamba, face])
def test_the_examples_of_the_docstrings_run(module: types.ModuleType) -> None:
    result = doctest.testmod(module, extraglobs={"refmamba": refmamba})
    assert result.attempted > 0
    assert result.failed == 0


def test_everything_that_is_offered_has_an_example() -> None:
    public = [refmamba.load, refmamba.quantize]
    public += [member for name, member in vars(refmamba.Model).items() if not name.startswith("_")]
    for member in public:
        assert ">>> " in (inspect.getdoc(member) or ""), member


def test_python_m_refmamba_is_the_command() -> None:
    assert command("--version").endswith(f"version {refmamba.__version__}\n")
    unknown = subprocess.run([sys.executable, "-m", "refmamba", "nonsense"], capture_output=True, text=True, check=False)
    assert unknown.returncode == 2
    assert "No such command 'nonsense'" in unknown.stderr


@pytest.mark.parametrize("seed", [None, 1])
def test_generate_gives_the_bits_of_the_command(seed: int | None, model: refmamba.Model) -> None:
    words = [] if seed is None else ["--temperature", "1", "--top-k", "50", "--top-p", "0.95", "--seed", str(seed)]
    expected = json.loads(command("generate", PROMPT, "--scheme", "int8", "--max-new-tokens", "12", "--json", *words))
    sampling = {} if seed is None else {"temperature": 1.0, "top_k": 50, "top_p": 0.95, "seed": seed}
    written = model.generate(PROMPT, max_new_tokens=12, **sampling)  # type: ignore[arg-type]
    for key in ("text", "tokens", "logits_sha256"):
        assert getattr(written, key) == expected[key]
    assert str(written) == expected["text"]
    assert (
        repr(written) == f"Generation(text={written.text!r}, tokens={written.tokens}, logits_sha256='{written.logits_sha256}')"
    )


def test_the_prompt_may_be_tokens(model: refmamba.Model) -> None:
    tokens = model.tokenizer.encode(PROMPT)
    hashes = [
        model.generate(prompt, max_new_tokens=3).logits_sha256 for prompt in (PROMPT, tokens, np.array(tokens, np.uint16))
    ]
    assert len(set(hashes)) == 1


def test_a_stream_is_the_text_in_pieces() -> None:
    """Hot enough to give tokens that are one byte of a character; cut behind one, the rest comes as one more piece."""
    model = refmamba.load("small", bits=3)
    pieces = list(model.stream("é", max_new_tokens=60, temperature=5.0))
    assert len(pieces) == 60
    cut = pieces.index("") + 1
    whole, stream = (write("é", max_new_tokens=cut, temperature=5.0) for write in (model.generate, model.stream))
    assert stream.tokens == []
    seen = []
    for number, piece in enumerate(stream, 1):
        seen.append(piece)
        assert len(stream.tokens) == min(number, cut)
    assert seen == [*pieces[:cut], "\ufffd"]
    assert "".join(seen) == stream.text == whole.text == model.tokenizer.decode(whole.tokens)
    assert stream.logits_sha256 == whole.logits_sha256


def test_the_end_token_ends_the_text(model: refmamba.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever token comes third is made the end token."""
    free = model.generate(PROMPT, max_new_tokens=6)
    monkeypatch.setattr(model.tokenizer, "end_token_ids", {free.tokens[2]})
    ended = model.generate(PROMPT, max_new_tokens=6)
    assert ended.tokens == free.tokens[:3]
    assert ended.text == model.tokenizer.decode(free.tokens[:2])


def test_logits_and_perplexity_are_those_of_the_commands(tmp_path: Path, model: refmamba.Model) -> None:
    command("logits", "--text", PROMPT, "--scheme", "int8", "--out", str(tmp_path / "logits.npy"))
    expected = np.load(tmp_path / "logits.npy")
    for text in (PROMPT, model.tokenizer.encode(PROMPT)):
        found = model.logits(text)
        assert found.dtype == np.float32
        assert found.tobytes() == expected.tobytes()
        assert found.shape == (3, model.config.vocab_size)
    (tmp_path / "text.txt").write_text("The old man went out of the house.")
    values = json.loads(command("perplexity", "--text", str(tmp_path / "text.txt"), "--scheme", "int8", "--json"))
    result = model.perplexity("The old man went out of the house.")
    assert (result.bits_per_byte, result.per_token, result.tokens) == (
        values["bits_per_byte"], values["perplexity"], values["tokens"])  # fmt: skip


def test_backends_give_the_same_bits(model: refmamba.Model) -> None:
    reference = refmamba.load("small", scheme="int8", backend="reference")
    assert reference.generate(PROMPT, max_new_tokens=4).logits_sha256 == model.generate(PROMPT, max_new_tokens=4).logits_sha256
    assert repr(reference) == "<refmamba.Model small under int8 on reference, cpu>"


def test_a_batch_steps_and_forks(model: refmamba.Model) -> None:
    """Expected logits are those of whole sequences."""
    logits, state = model.prefill([[1, 2, 3], [4]], logits="all")
    assert [rows.shape[0] for rows in logits] == [3, 1]
    stepped, _ = model.step([5, 6, 7], state.take([0, 0, 1]))
    expected = [model.logits(tokens)[-1] for tokens in ([1, 2, 3, 5], [1, 2, 3, 6], [4, 7])]
    assert stepped.tobytes() == np.stack(expected).tobytes()
    none, _ = model.prefill([np.array([1])], logits="none")
    assert none[0].shape == (0, model.config.vocab_size)


def test_a_trace_ends_with_the_logits_whatever_the_backend(model: refmamba.Model) -> None:
    trace = model.trace(PROMPT)
    assert trace["lm_head.result"].tobytes() == model.logits(PROMPT).tobytes()
    steps = [(step.operation, step.sites) for step in trace.layer(7)]
    assert steps[0] == ("rms_norm", ("layers.7.norm",))
    assert trace.step("layers.7.u").operation == "silu"
    assert len(trace.operation("selective_scan")) == model.config.n_layer


def test_a_scheme_is_a_name_a_file_or_itself(tmp_path: Path) -> None:
    scheme = refmamba.Scheme("mine", parse_scheme("w4-all").weights)
    (tmp_path / "mine.json").write_text(json.dumps(scheme.to_json()))
    hashes = set()
    for given in ("w4-all", str(tmp_path / "mine.json"), tmp_path / "mine.json", scheme):
        loaded = refmamba.load("small", scheme=given)
        hashes.add(loaded.generate(PROMPT, max_new_tokens=2).logits_sha256)
        assert loaded.scheme.weights == scheme.weights
    assert len(hashes) == 1
    assert refmamba.load(bits=8, act_bits=8).scheme == parse_scheme("w8a8-all")
    assert refmamba.load().scheme == parse_scheme("w8-all")


def test_a_quantized_folder_loads_with_the_same_bits(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Call me Ishmael. Some years ago, never mind how long precisely.")
    choice = {"scheme": "int8-smooth", "calibrate": tmp_path / "text.txt"}
    folder = refmamba.quantize("small", str(tmp_path / "saved"), **choice)  # type: ignore[arg-type]
    assert folder == tmp_path / "saved"
    saved, direct = refmamba.load(folder), refmamba.load("small", **choice)  # type: ignore[arg-type]
    assert saved.scheme == parse_scheme("int8-smooth")
    assert saved.logits(PROMPT).tobytes() == direct.logits(PROMPT).tobytes()
    assert saved.logits(PROMPT).tobytes() != refmamba.load("small", scheme="int8-smooth").logits(PROMPT).tobytes()


Call = Callable[[refmamba.Model], object]


def as_any(value: Any) -> Any:
    """A value that a type checker would refuse."""
    return value


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda _: refmamba.load("nowhere"), refmamba.HubError, "model nowhere: no such folder"),
        (lambda _: refmamba.load("small", scheme="nonsense"), refmamba.SchemeError, "unknown scheme 'nonsense'"),
        (lambda _: refmamba.load("small", scheme=as_any(8)), refmamba.SchemeError, "unknown scheme '8'"),
        (lambda _: refmamba.load("small", scheme="int8", bits=8), refmamba.SchemeError, "leave out --bits"),
        (lambda _: refmamba.load("small", bits=9), refmamba.SchemeError, "2 to 8 bits"),
        (lambda _: refmamba.load("small", bits=as_any("8")), refmamba.SchemeError, "2 to 8 bits"),
        (lambda _: refmamba.load("small", act_bits=8), refmamba.SchemeError, "--act-bits needs --bits"),
        (lambda _: refmamba.load("small", backend="nonsense"), refmamba.BackendError, "unknown backend 'nonsense'"),
        (lambda _: refmamba.load("small", backend=as_any(None)), refmamba.BackendError, "unknown backend 'None'"),
        (lambda _: refmamba.load("small", device="cuda"), refmamba.BackendError, "'cuda'"),
        (lambda _: refmamba.load("small", revision="main"), refmamba.HubError, "has no revision main"),
        (lambda _: refmamba.load("small", scheme="int8-static", calibrate="no.txt"), refmamba.FileError, "no.txt"),
        (lambda _: refmamba.quantize("small", "q"), refmamba.SchemeError, "name what to save the model as"),
        (lambda _: refmamba.quantize("small", ROOT, scheme="int8"), refmamba.CheckpointError, "not an empty folder"),
        (lambda model: model.generate("x", max_new_tokens=-1), refmamba.DataError, "max_new_tokens is -1"),
        (lambda model: model.generate("x", max_new_tokens=1.5), refmamba.DataError, "max_new_tokens is 1.5"),
        (lambda model: model.generate("x", temperature=-1), refmamba.DataError, "temperature is -1"),
        (lambda model: model.generate("x", temperature=float("nan")), refmamba.DataError, "temperature is nan"),
        (lambda model: model.generate("x", temperature=1e-60), refmamba.DataError, "temperature is 1e-60"),
        (lambda model: model.generate("x", temperature=1e39), refmamba.DataError, "temperature is 1e"),
        (lambda model: model.generate("x", temperature="hot"), refmamba.DataError, "temperature is 'hot'"),
        (lambda model: model.generate("x", top_p=0), refmamba.DataError, "top_p is 0"),
        (lambda model: model.stream("x", top_p=1.1), refmamba.DataError, "top_p is 1.1"),
        (lambda model: model.stream("x", top_k=-1), refmamba.DataError, "top_k is -1"),
        (lambda model: model.stream("x", seed=-1), refmamba.DataError, "seed is -1"),
        (lambda model: model.stream("x", seed=None), refmamba.DataError, "seed is None"),
        (lambda model: model.generate("\ud800"), refmamba.TokenizerError, "half of a character"),
        (lambda model: model.logits([]), refmamba.DataError, "whole numbers in one row, at least one"),
        (lambda model: model.logits([1.5]), refmamba.DataError, "whole numbers in one row"),
        (lambda model: model.logits(["The"]), refmamba.DataError, "whole numbers in one row"),
        (lambda model: model.logits([[1, 2], [3]]), refmamba.DataError, "whole numbers in one row"),
        (lambda model: model.logits([[1, 2]]), refmamba.DataError, "whole numbers in one row"),
        (lambda model: model.logits(None), refmamba.DataError, "whole numbers in one row"),
        (lambda model: model.logits([1, 4096]), refmamba.DataError, "tokens are 0 to 4095"),
        (lambda model: model.prefill([[1], [-1]]), refmamba.DataError, "tokens are 0 to 4095"),
        (lambda model: model.prefill([]), refmamba.DataError, "at least one sequence"),
        (lambda model: model.prefill([[1]], logits=as_any("first")), refmamba.DataError, "not as 'first'"),
        (lambda model: model.step([1, 2], model.prefill([[1]])[1]), refmamba.DataError, "as many states"),
        (lambda model: model.perplexity(""), refmamba.DataError, "the text is empty"),
        (lambda model: model.trace([99999]), refmamba.DataError, "tokens are 0 to 4095"),
    ],
)
def test_a_wrong_argument_is_an_error_of_one_line(
    call: Call, error: type[Exception], words: str, model: refmamba.Model
) -> None:
    with pytest.raises(error) as raised:
        call(model)
    assert error in (type(raised.value), type(raised.value).__base__)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not Path("q").exists()
