"""From words to a running model: what is refused, in which order, and what is done only when it is asked for."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from refmamba import errors
from refmamba.backends.reference import Reference
from refmamba.commands.main import refmamba
from refmamba.errors import BackendError, DataError, RefmambaError, SchemeError, TokenizerError
from refmamba.eval_tasks.evaluate import subject
from refmamba.run.session import ModelChoice, open_model, open_session, quantize_folder
from refmamba.spec.parameters import QuantizedModel
from refmamba.spec.scheme import Scheme, parse_scheme

TEXT = "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse."


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model, saved under int8."""
    folder = tmp_path_factory.mktemp("session") / "saved"
    done = CliRunner().invoke(refmamba, ["quantize", "small", str(folder), "--scheme", "int8"])
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


def refused(*words: str) -> RefmambaError:
    done = CliRunner().invoke(refmamba, words)
    assert isinstance(done.exception, RefmambaError), done.output
    assert done.stdout == ""
    return done.exception


@pytest.mark.parametrize(
    "words",
    [["generate"], ["logits", "--tokens", "1", "--out", "x.npy"], ["perplexity", "--text", "TEXT"], ["bench"], ["outliers"],
     ["ablate"], ["smooth-search"], ["eval"]],
)  # fmt: skip
def test_a_saved_folder_has_one_scheme(words: list[str], saved: Path, text: str, tmp_path: Path) -> None:
    words = [text if word == "TEXT" else word for word in words]
    error = refused(*words, "--model", str(saved), "--scheme", "w4-all")
    assert isinstance(error, SchemeError)
    assert str(error) == f"{saved} is saved as int8; leave out the scheme w4-all"


def test_a_saved_folder_is_not_quantized_again_under_another_scheme(saved: Path, tmp_path: Path) -> None:
    error = refused("quantize", str(saved), str(tmp_path / "again"), "--bits", "4")
    assert str(error) == f"{saved} is saved as int8; leave out the scheme w4-all"
    assert not (tmp_path / "again").exists()


def test_a_saved_folder_may_be_named_by_its_own_scheme(saved: Path) -> None:
    model = open_model(ModelChoice(str(saved), "int8"))
    assert model.scheme == parse_scheme("int8")
    assert model.quantized(model.scheme) is model.checkpoint


@pytest.mark.parametrize("words", [["ablate", "--model"], ["reproduce", "OUT", "--models"], ["smooth-search", "--model"],
                                   ["bench", "--compare", "--model"]])  # fmt: skip
def test_what_needs_the_float_checkpoint_says_so(words: list[str], saved: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(refmamba, [str(tmp_path / "out") if word == "OUT" else word for word in words] + [str(saved)])
    assert isinstance(done.exception, DataError)
    assert str(done.exception) == f"{saved}: is saved quantized, as int8; this needs the float checkpoint"


def test_maxima_of_a_saved_folder_cannot_be_written(saved: Path, tmp_path: Path) -> None:
    words = ["quantize", str(saved), str(tmp_path / "q"), "--scheme", "int8", "--save-calibration", str(tmp_path / "m.json")]
    assert "this needs the float checkpoint" in str(refused(*words))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_calibrated_or_quantized_before_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    session = open_session(ModelChoice("small", "int8-static", backend="reference"))
    assert capsys.readouterr().err == ""
    first = session.runner
    assert "calibrating on the passage" in capsys.readouterr().err
    assert session.runner is first
    assert session.opened.calibration is session.opened.calibration
    assert capsys.readouterr().err == ""


class OnlyFp32(Reference):
    """A backend that knows one scheme and must never be given another."""

    name = "only-fp32"

    def supports(self, scheme: Scheme) -> str | None:
        return None if scheme.name == "fp32" else f"the scheme {scheme.name}"

    def load(self, model: QuantizedModel) -> Any:
        assert model.scheme.name == "fp32"
        return super().load(model)


def test_a_backend_that_does_not_know_the_scheme_is_told_before_any_work(capsys: pytest.CaptureFixture[str]) -> None:
    choice = ModelChoice("small", "int8-static", backend="test_session:OnlyFp32")
    ways: list[Callable[[], object]] = [lambda: open_session(choice), lambda: subject(choice, 2048)]
    for way in ways:
        with pytest.raises(BackendError, match="does not know the scheme int8-static"):
            way()
    assert capsys.readouterr().err == ""
    assert open_session(ModelChoice("small", "fp32", backend="test_session:OnlyFp32")).runner


def test_a_tokenizer_that_is_not_the_model_s_is_refused_before_it_is_quantized(tmp_path: Path) -> None:
    small = Path(errors.__file__).with_name("small_model")
    model = shutil.copytree(small, tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text("utf-8"))
    tokenizer["model"]["vocab"]["more than all rows"] = 100_000
    (model / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        quantize_folder(ModelChoice(str(model), scheme="int8"), tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (ModelChoice("nobody/nothing", "int8", "nonsense"), "unknown backend 'nonsense'"),
        (ModelChoice("nobody/nothing", "nonsense"), "unknown scheme 'nonsense'"),
        (ModelChoice("nobody/nothing", ""), "unknown scheme ''"),
    ],
)
def test_a_wrong_name_is_told_before_the_hub_is_asked(choice: ModelChoice, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refmamba.run.session.resolve_model", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(RefmambaError, match=words):
        open_session(choice)


def test_a_scheme_may_be_a_name_a_file_or_itself(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(parse_scheme("w4-mlp").to_json()))
    for scheme in ("w4-mlp", str(file), parse_scheme("w4-mlp")):
        assert open_model(ModelChoice("small", scheme)).scheme == parse_scheme("w4-mlp")
    assert open_model(ModelChoice("small"), "fp32").scheme.name == "fp32"


def search(*words: str) -> Mapping[str, Any]:
    done = CliRunner().invoke(refmamba, ["smooth-search", "--json", *words])
    assert done.exit_code == 0, done.output
    found: Mapping[str, Any] = json.loads(done.stdout)
    return found


def test_the_search_calibrates_on_what_is_named_or_else_on_its_text(text: str, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("ONE TWO THREE! 1, 2, 3, 4.\n\n\n= 5 + 6 = 11; and so on, and on, and on.")
    alone, named = search("--text", text), search("--text", text, "--calibrate", text)
    elsewhere, scheme = search("--text", text, "--calibrate", str(other)), tmp_path / "best.json"
    assert alone["tried"] == named["tried"]
    assert alone["tried"] != elsewhere["tried"]
    scheme.write_text(json.dumps({**parse_scheme("int8-smooth").to_json(), "smooth": elsewhere["best"]["alpha"]}))
    words = ["perplexity", "--json", "--text", text, "--scheme", str(scheme), "--calibrate", str(other)]
    assert json.loads(CliRunner().invoke(refmamba, words).stdout)["bits_per_byte"] == elsewhere["best"]["bits_per_byte"]


def test_the_search_calibrates_once(text: str) -> None:
    done = CliRunner().invoke(refmamba, ["smooth-search", "--text", text])
    assert done.stderr.count("calibrating on") == 1
