"""Files and folders that the user may not read or write end a command in one line, before its work."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from refmamba.commands.main import COMMANDS, refmamba
from refmamba.errors import RefmambaError
from refmamba.formats.folder import open_checkpoint
from refmamba.formats.hub import resolve_model

NOBODY = 65534
READING = [
    ["generate", "--model", "closed/small"],
    ["generate", "--model", "closed"],
    ["generate", "--model", "weights"],
    ["generate", "--file", "closed/text"],
    ["generate", "--batch", "closed/prompts.jsonl"],
    ["generate", "--load-state", "closed/state.safetensors"],
    ["info", "closed/small"],
    ["scheme", "closed/scheme.json"],
    ["generate", "--scheme", "closed/scheme.json"],
    ["generate", "--scheme", "int8-static", "--calibrate", "closed/text"],
    ["perplexity", "--text", "closed/text"],
    ["ablate", "--score", "closed/text"],
    ["verify", "--against", "closed/dump.npz"],
    ["replay", "closed/receipt.json"],
    ["eval", "--data", "closed"],
    ["eval", "--tasks", "copa", "--data", "copa=closed/copa.jsonl"],
]
WRITING = [
    ["ablate", "--tasks", "copa", "--limit", "1", "--results", "{}/results.sqlite"],
    ["eval", "--tasks", "copa", "--limit", "1", "--results", "{}/results.sqlite"],
    ["eval", "--tasks", "copa", "--limit", "1", "--samples", "{}/samples.jsonl"],
    ["export", "small", "{}/folder", "--format", "hf"],
    ["export", "small", "{}/folder", "--format", "gguf"],
    ["generate", "--receipt", "{}/receipt.json"],
    ["generate", "--save-state", "{}/state.safetensors"],
    ["logits", "--tokens", "1", "--out", "{}/logits.npy"],
    ["logits", "--tokens", "1", "--out", "logits.npy", "--receipt", "{}/receipt.json"],
    ["outliers", "--plot", "{}/plot.png"],
    ["outliers", "--save-calibration", "{}/maxima.json"],
    ["quantize", "small", "{}/folder", "--bits", "8"],
    ["quantize", "small", "{}/a/b/folder", "--bits", "8"],
    ["quantize", "small", "folder", "--scheme", "int8-static", "--save-calibration", "{}/maxima.json"],
    ["reproduce", "{}"],
    ["reproduce", "{}/folder"],
    ["smooth-search", "--out", "{}/best.json"],
    ["step", "--html", "{}/page.html"],
    ["trace", "--tokens", "1", "--out", "{}/trace.npz"],
]


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of a user without privileges, who this process is meanwhile, with folders that are closed to that user."""
    for name in COMMANDS:  # what Python itself reads, it reads before
        refmamba.get_command(click.Context(refmamba), name)
    open_checkpoint(resolve_model("small").folder)
    pytest.importorskip("matplotlib.figure")
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    for name in ("closed", "unwritable"):
        (folder / name).mkdir()
    shutil.copytree(resolve_model("small").folder, folder / "weights")
    (folder / "weights" / "model.safetensors").chmod(0)
    (folder / "closed").chmod(0)
    (folder / "unwritable").chmod(0o555)
    monkeypatch.chdir(folder)
    privileged = os.geteuid() == 0
    if privileged:
        os.seteuid(NOBODY)
    try:
        yield folder
    finally:
        if privileged:
            os.seteuid(0)
        for path in (folder / "closed", folder / "unwritable"):
            path.chmod(0o777)
        shutil.rmtree(folder)


def assert_denied(words: list[str], place: Path) -> None:
    before = sorted(place.iterdir())
    done = CliRunner().invoke(refmamba, words, standalone_mode=False)
    assert isinstance(done.exception, RefmambaError | click.ClickException), done.output
    message = done.exception.format_message() if isinstance(done.exception, click.ClickException) else str(done.exception)
    assert any(word in message for word in ("Permission denied", "is not readable", "unable to open database file")), message
    assert done.stdout == ""
    assert sorted(place.iterdir()) == before


@pytest.mark.parametrize("words", READING, ids=" ".join)
def test_what_may_not_be_read_is_one_line(words: list[str], place: Path) -> None:
    assert_denied(words, place)


@pytest.mark.parametrize("closed", ["closed", "unwritable"])
@pytest.mark.parametrize("words", WRITING, ids=" ".join)
def test_what_may_not_be_written_is_one_line_before_the_work(words: list[str], closed: str, place: Path) -> None:
    assert_denied([word.format(closed) for word in words], place)
