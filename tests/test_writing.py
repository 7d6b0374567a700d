"""What is written is whole or as it was, whatever it is written to and however the writing ends."""

import errno
import json
import math
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import forks
import numpy as np
import pytest
from click.testing import CliRunner

from refmamba.commands.main import refmamba
from refmamba.errors import CheckpointError, DataError, RefmambaError
from refmamba.formats.writing import check_file, check_folder, json_text, new_folder, write_file, write_text

ROOT = Path(__file__).resolve().parents[1]
LEFT = 2**22 + 1  # larger than any process's number


def refused(*words: str) -> str:
    """The line with which a command refuses, having written nothing to stdout."""
    done = forks.run(words)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("compiling")]
    assert line.startswith("refmamba: ")
    return line


def test_a_file_is_replaced_and_nothing_stays_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for text in ("old", "new"):
        write_text(file, text)
        assert file.read_text() == text
    assert list(tmp_path.iterdir()) == [file]


def test_a_write_that_fails_leaves_the_old(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")

    def broken(stream: BinaryIO) -> None:
        stream.write(b"new")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DataError, match=r"file: cannot be written: No space left on device"):
        write_file(file, broken)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_the_content_is_on_the_disk_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, synced = tmp_path / "file", list[int]()
    real = os.fsync

    def fsync(number: int) -> None:
        assert not file.exists()
        synced.append(os.fstat(number).st_size)
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(file, "content")
    assert synced == [7]


def test_a_symlink_stays_and_what_it_names_is_written(tmp_path: Path) -> None:
    real, link, dangling = tmp_path / "real", tmp_path / "link", tmp_path / "dangling"
    real.write_text("old")
    link.symlink_to("real")
    dangling.symlink_to("born")
    write_text(link, "new")
    write_text(dangling, "first")
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert (tmp_path / "born").read_text() == "first"


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
def test_the_mode_of_a_file_stays(mode: int, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    file.chmod(mode)
    write_text(file, "new")
    assert stat.S_IMODE(file.stat().st_mode) == mode


def test_a_pipe_is_written_into_and_stays_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = list[bytes]()
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write_file(pipe, lambda stream: np.save(stream, np.arange(100_000)))  # more than a pipe holds
    reader.join(10)
    assert pipe.is_fifo()
    assert len(read[0]) == 128 + 8 * 100_000


def test_a_device_stays_a_device(tmp_path: Path) -> None:
    device = tmp_path / "null"
    try:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        device.write_bytes(b"")
    except OSError:
        pytest.skip("no device can be made here")
    for _ in range(2):
        write_text(device, "gone")
        assert stat.S_ISCHR(device.stat().st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["null"]


def test_commands_write_into_a_pipe(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "refmamba", "logits", "--tokens", "1,2,3", "--out", "/dev/stdout"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"\x93NUMPY")
    assert len(done.stdout) == 128 + 4 * 3 * 4096


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    file, folder, alive = tmp_path / "a[1].json", tmp_path / "model", os.getppid()
    left, theirs = tmp_path / f".a[1].json.{LEFT}.tmp", tmp_path / f".a[1].json.{alive}.tmp"
    others = tmp_path / f".a1.json.{LEFT}.tmp"
    for path in (left, theirs, others):
        path.touch()
    left_folder = tmp_path / f".model.{LEFT}.tmp"
    left_folder.mkdir()
    (left_folder / "model.safetensors").touch()
    check_file(file)
    assert not left.exists()
    assert theirs.exists()
    assert others.exists()
    check_folder(folder)
    assert not left_folder.exists()


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"

    def fill(fails: bool) -> None:
        with new_folder(folder) as aside:
            (aside / "file").write_text("content")
            assert not folder.exists()
            if fails:
                raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left on device"):
        fill(fails=True)
    assert list(tmp_path.iterdir()) == []
    fill(fails=False)
    assert (folder / "file").read_text() == "content"
    assert list(folder.parent.iterdir()) == [folder]
    with pytest.raises(CheckpointError, match="not an empty folder"):
        fill(fails=False)


@pytest.mark.parametrize("folder", [".", "/", "..", "README.md"])
def test_quantize_refuses_a_folder_that_is_there(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert "not an empty folder" in refused("quantize", "small", folder, "--bits", "8")


def test_quantize_refuses_to_replace_the_folder_that_it_runs_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "name one inside it" in refused("quantize", "small", ".", "--bits", "8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["quantize", "small", "q", "--bits", "8", "--save-calibration", ""], "--save-calibration '': names nothing"),
        (["logits", "--tokens", "1", "--out", ""], "--out '': names nothing"),
        (["logits", "--tokens", "1", "--out", "."], "is a folder"),
        (["logits", "--tokens", "1", "--out", "no/folder.npy"], "there is no folder"),
        (["logits", "--tokens", "1", "--out", "n" * 300], "File name too long"),
        (["eval", "--results", "one", "--samples", "./one"], "--results and --samples name one file"),
        (["outliers", "--plot", "one.json", "--save-calibration", "one.json"], "name one file"),
        (["outliers", "--plot", "one.jpg"], "must end in .png or .svg"),
        (["outliers", "--text", "text.json", "--save-calibration", "text.json"], "name one file"),
        (["reproduce", "text.json"], "is a file"),
        (["reproduce", "text.json/inside"], "Not a directory"),
    ],
)
def test_a_target_that_cannot_be_written_is_refused_before_the_work(
    words: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.json").write_text("a text")
    done = forks.run(words)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert line in done.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["text.json"]


def test_sigterm_removes_what_is_half_written(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from refmamba.commands import entry, main\n"
        "from refmamba.formats.writing import write_file\n"
        "def slow(stream):\n    stream.write(b'half'); print('writing', flush=True); time.sleep(60)\n"
        "main.refmamba.main = lambda **_: write_file(Path(sys.argv[1]), slow)\n"
        "entry.main()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "file")], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        assert len(list(tmp_path.iterdir())) == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 143
    assert list(tmp_path.iterdir()) == []


def test_a_killed_quantize_leaves_no_folder_and_the_next_tidies_up(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "refmamba", "quantize", "small", str(tmp_path / "q"), "--scheme", "w8-all"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while not (left := list(tmp_path.glob(".q.*.tmp/config.json"))) and process.poll() is None:
            time.sleep(0.001)
        process.kill()
    assert left, "it ended too early to be killed"
    assert not (tmp_path / "q").exists()
    assert forks.run(command[3:]).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_what_json_cannot_hold_is_null_or_escaped() -> None:
    values = {"a": math.nan, "b": (math.inf, [-math.inf, 1.5]), "c": "naïve", "d": os.fsdecode(b"\xff.txt")}
    text = json_text(values)
    assert text == '{"a": null, "b": [null, [null, 1.5]], "c": "naïve", "d": "\\udcff.txt"}'
    assert json.loads(text)["d"] == values["d"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


TEXT = "Call me Ishmael. Some years ago, never mind how long precisely."
WRITERS = {  # and the last word is what is written
    "ablations": "ablate --text {}/text --site in_proj --draws 0 --tasks copa --limit 1 --results {}/r.sqlite",
    "results": "eval --tasks copa --limit 1 --results {}/r.sqlite",
    "samples": "eval --tasks copa --limit 1 --results {}/r.sqlite --samples {}/samples.jsonl",
    "exported": "export small --format hf {}/exported",
    "gguf": "export small --format gguf --type F16 {}/exported",
    "state": "generate --max-new-tokens 1 --save-state {}/state.safetensors",
    "receipt": "generate --max-new-tokens 64 --receipt {}/receipt.json",
    "logits": "logits --tokens " + ",".join(["1"] * 600) + " --out {}/logits.npy",
    "receipt of logits": "logits --tokens 1,2 --out {}/logits.npy --receipt {}/receipt.json",
    "plot": "outliers --text {}/text --plot {}/plot.png",
    "maxima": "outliers --text {}/text --save-calibration {}/maxima.json",
    "quantize": "quantize small --scheme w8-all {}/q",
    "tables": "reproduce --schemes fp32 --sites in_proj --draws 0 --tasks copa --limit 1 --text {}/text {}/out",
    "best": "smooth-search --text {}/text --out {}/best.json",
    "page": "step --scheme fp32 --html {}/page.html",
    "trace": "trace --tokens 1,2,3 --out {}/trace.npz",
    "tensors": "trace --tokens 1,2,3 --out {}/trace.safetensors",
}
FOLDERS, DATABASES = ("exported", "gguf", "quantize", "tables"), ("ablations", "results")
LARGER = ("exported", "gguf", "page")  # than the disk
FREE = (0, 4096, 40_000, 200_000)  # bytes
BESIDE = ("r.sqlite", "r.sqlite-wal", "r.sqlite-shm", "logits.npy")  # of another option, or SQLite's own


def assert_whole(file: Path) -> None:
    """A file of a folder that is filled one by one."""
    content = file.read_bytes()
    ends = {".json": b"}\n", ".md": b"(figure2.png)\n", ".svg": b"</svg>\n", ".png": b"IEND\xaeB`\x82"}
    assert content.endswith(ends[file.suffix])


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_old_or_the_new(name: str, small_disk: Path) -> None:
    words = WRITERS[name].replace("{}", str(small_disk)).split()
    target, old, ends = Path(words[-1]), name not in FOLDERS + DATABASES, set[bool]()
    (small_disk / "text").write_text(TEXT)
    for free in FREE if name not in LARGER else (40_000,):
        for left in BESIDE:
            (small_disk / left).unlink(missing_ok=True)
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        if old:
            target.write_text("old")
        filling = small_disk / "filling"
        filling.unlink(missing_ok=True)
        filling.write_bytes(bytes(shutil.disk_usage(small_disk).free - free))
        done = CliRunner().invoke(refmamba, words)
        assert done.exit_code == 0 or isinstance(done.exception, RefmambaError | OSError), (free, done.exception)
        ends.add(done.exit_code == 0)
        if old:
            assert (target.read_bytes() != b"old") == (done.exit_code == 0)
        elif name in ("exported", "quantize"):
            assert target.exists() == (done.exit_code == 0)
        elif name == "gguf":
            assert not any(target.glob("*"))
        elif name == "tables":
            for file in target.glob("[!r]*"):  # not the results, of which the next run goes on
                assert_whole(file)
        there = {path.name for path in small_disk.rglob("*") if path.is_file()}
        assert not [left for left in there if left.endswith(".tmp")]
        assert {path.name for path in small_disk.iterdir()} <= {"text", "filling", *BESIDE, target.name}
    assert False in ends
