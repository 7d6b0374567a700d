"""The options of the command line: what several commands share is the same everywhere, and stands in one order."""

import itertools
import json
import re
import shlex
from collections.abc import Sequence
from graphlib import TopologicalSorter
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from refmamba.commands.main import COMMANDS, refmamba
from refmamba.errors import DataError, RefmambaError, SchemeError
from refmamba.run.session import choose_scheme

MODEL = ["--model", "--revision", "--scheme", "--bits", "--act-bits", "--calibrate", "--percentile", "--backend",
         "--device"]  # fmt: skip
RUNS_A_MODEL = ("ablate", "bench", "eval", "generate", "logits", "outliers", "perplexity", "smooth-search")
# Whose meaning depends on the command, and so its words.
OWN_WORDS = {"--text", "--out", "--schemes", "--tasks", "--draws", "--seed", "--sigma", "--over", "--tokens"}

OWN_MODEL = {("verify", "--model"), ("replay", "--model"), ("step", "--scheme")}  # where none means something else


def options(command: str) -> dict[str, str]:
    """The options of a command in the order of its --help, each with its words there."""
    shown = CliRunner().invoke(refmamba, [command, "--help"], terminal_width=1000)
    assert shown.exit_code == 0, shown.output
    lines = re.findall(r"^  (--[a-z-]+)(.*)$", shown.output, re.MULTILINE)
    return {name: " ".join(words.split()) for name, words in lines}


HELP = {command: options(command) for command in COMMANDS}


def test_every_command_that_runs_a_model_begins_with_the_same_options() -> None:
    assert {command for command in COMMANDS if list(HELP[command])[: len(MODEL)] == MODEL} == set(RUNS_A_MODEL)


def test_the_shared_options_stand_in_one_order() -> None:
    """Each --help gives an order of its options; together they must not contradict each other."""
    before: dict[str, set[str]] = {}
    for names in HELP.values():
        for first, second in itertools.pairwise(names):
            before.setdefault(second, set()).add(first)
    order = list(TopologicalSorter(before).static_order())  # raises CycleError, which names the options
    assert order[-1] == "--help"


def test_a_shared_option_has_the_same_words_everywhere() -> None:
    for name in {name for names in HELP.values() for name in names} - OWN_WORDS:
        words = {HELP[command][name] for command in COMMANDS if name in HELP[command] and (command, name) not in OWN_MODEL}
        assert len(words) == 1, (name, words)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_examples_that_parse(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the options go: the files that they name are there, and nothing is run."""
    shown = CliRunner().invoke(refmamba, [command, "--help"], terminal_width=1000)
    examples = re.findall(r"^  (refmamba .*)$", shown.output.partition("Examples:")[2], re.MULTILINE)
    assert examples
    monkeypatch.chdir(tmp_path)
    for example in examples:
        for name in ("book.txt", "prompts.jsonl", "receipt.json", "theirs.npz"):
            (tmp_path / name).write_text("a")
        _, name, *words = shlex.split(example.partition(" > ")[0])
        assert name == command
        found = refmamba.get_command(click.Context(refmamba), name)
        assert found is not None
        with found.make_context(name, words):
            pass


def test_every_default_is_shown() -> None:
    for name in COMMANDS:
        found = refmamba.get_command(click.Context(refmamba), name)
        assert isinstance(found, click.Command)
        for param in found.params:
            default = param.get_default(click.Context(found))
            if isinstance(param, click.Option) and isinstance(default, str | int | float) and not param.is_flag:
                assert f"[default: {default}" in HELP[name][param.opts[0]], (name, param.opts)


def refused(words: Sequence[str]) -> RefmambaError:
    done = CliRunner().invoke(refmamba, words)
    assert isinstance(done.exception, RefmambaError), done.output
    assert done.stdout == ""
    assert "\n" not in str(done.exception)
    return done.exception


@pytest.mark.parametrize("command", ["eval", "reproduce", "verify"])
@pytest.mark.parametrize("names", ["", " , "])
def test_a_list_that_names_nothing_is_refused(command: str, names: str, tmp_path: Path) -> None:
    folder = [str(tmp_path / "out")] if command == "reproduce" else []
    error = refused([command, *folder, "--schemes", names])
    assert isinstance(error, DataError)
    assert f"--schemes '{names}': names nothing" in str(error)


def test_all_tasks_are_those_without_a_name(tmp_path: Path) -> None:
    words = ["reproduce", str(tmp_path / "out"), "--dry-run", "--schemes", "fp32", "--sites", ""]
    plans = [
        CliRunner().invoke(refmamba, [*words, *more]).stdout for more in ([], ["--tasks", "all"], ["--tasks", "copa, copa"])
    ]
    assert "Time for 160 documents" in plans[0]
    assert "Time for 160 documents" in plans[1]
    assert "Time for 20 documents" in plans[2]


@pytest.mark.parametrize(
    "words",
    [["quantize", "small", "q", "--bits", "8", "--save-calibration"], ["outliers", "--save-calibration"],
     ["smooth-search", "--out"]],
)  # fmt: skip
def test_a_json_that_would_not_be_known_again_is_refused(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(refused([*words, "maxima.txt"])) == f"{words[-1]} maxima.txt: the name must end in .json"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "scheme"),
    [(["--bits", "4"], "w4-all"), (["--bits", "8", "--act-bits", "8"], "w8a8-all"), (["--scheme", "w4-mlp"], "w4-mlp")],
)  # fmt: skip
def test_quantize_takes_bits_as_the_other_commands_do(words: list[str], scheme: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(refmamba, ["quantize", "small", str(tmp_path / "q"), *words])
    assert done.stdout == f"{tmp_path / 'q'}: small as {scheme}\n"


def test_few_bits_say_what_is_for_use(capsys: pytest.CaptureFixture[str]) -> None:
    for bits, act_bits in ((8, None), (4, None), (2, 8)):
        choose_scheme(None, bits, act_bits)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["--bits 4", "--bits 2"]
    assert all("int4" in line for line in lines)


def test_the_percentile_is_said_wherever_its_maxima_go(tmp_path: Path) -> None:
    """In --json, in the calibration's file, and from the file again with the same bits; 1 cuts nothing."""
    text, maxima = tmp_path / "text.txt", tmp_path / "maxima.json"
    text.write_text("The wolf went down to the river, and the fox went after him.", "utf-8")

    def scored(*words: str) -> tuple[float | None, float]:
        done = CliRunner().invoke(refmamba, ["perplexity", "--text", str(text), "--json", *words])
        assert done.exit_code == 0, done.output
        values = json.loads(done.stdout)
        return values["percentile"], values["bits_per_byte"]

    static = ["--scheme", "int8-static", "--calibrate"]
    cut, whole = scored(*static, str(text), "--percentile", "0.99"), scored(*static, str(text))
    assert (cut[0], whole[0]) == (0.99, 1.0)
    assert cut[1] != whole[1]
    folder = str(tmp_path / "q")
    made = ["quantize", "small", folder, *static, str(text), "--percentile", "0.99", "--save-calibration", str(maxima)]
    assert CliRunner().invoke(refmamba, made).exit_code == 0
    assert json.loads(maxima.read_text())["percentile"] == 0.99
    assert scored(*static, str(maxima)) == cut
    assert scored("--model", folder) == (None, cut[1])  # the scales are made already
    assert scored("--scheme", "int8", "--percentile", "0.99")[0] is None


@pytest.mark.parametrize("percentile", ["nan", "0", "-0.5", "1.5", "99.9", "inf"])
def test_a_percentile_is_a_share(percentile: str) -> None:
    error = refused(["generate", "She", "--scheme", "int8-static", "--percentile", percentile])
    assert isinstance(error, DataError)
    assert "above 0 and at most 1" in str(error)


def test_a_percentile_does_not_go_with_maxima() -> None:
    error = refused(["generate", "She", "--scheme", "int8-static", "--percentile", "0.9", "--calibrate", "m.json"])
    assert str(error).startswith("--percentile goes with a text")


def test_quantize_needs_a_scheme(tmp_path: Path) -> None:
    error = refused(["quantize", "small", str(tmp_path / "q")])
    assert isinstance(error, SchemeError)
    assert "--scheme NAME, or --bits N" in str(error)
    assert not (tmp_path / "q").exists()
