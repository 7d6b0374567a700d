"""However a command is run, it ends in one line and a status: closed or full outputs, NaN, Ctrl-C, odd surroundings."""

import os
import pty
import shutil
import signal
import sqlite3
import subprocess
import sys
import termios
import time
from pathlib import Path

import forks
import pytest
from click.testing import CliRunner

from refmamba.commands.main import COMMANDS, refmamba

ROOT = Path(__file__).resolve().parents[1]
TEXT = "Call me Ishmael. Some years ago, never mind how long precisely."
SILENT = ("logits", "step", "trace")  # which write a file, and say nothing
LOCAL = [command for command in COMMANDS if command != "push"]  # what needs no hub; tests/test_hub.py has that
NAN = {  # an option that takes a number, and what is said of NaN
    "ablate": "--sigma", "bench": "--prompt-len", "eval": "--limit", "export": "--type", "generate": "--temperature",
    "info": "--bits", "logits": "--tokens", "outliers": "--sigma", "perplexity": "--bits", "push": "--text",
    "quantize": "--bits", "replay": "--device", "reproduce": "--draws", "scheme": "--json", "smooth-search": "--act-bits",
    "step": "--scheme", "trace": "--bits", "verify": "--device",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _receipt(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A receipt beside the folders of all tests, for `replay`."""
    file = tmp_path_factory.getbasetemp() / "receipt.json"
    done = CliRunner().invoke(refmamba, ["generate", "--max-new-tokens", "1", "--receipt", str(file)])
    assert done.exit_code == 0, done.output


def words_of(command: str, folder: Path) -> list[str]:
    """The shortest work of a command."""
    text = folder / "text.txt"
    text.write_text(TEXT)
    more = {
        "ablate": ["--text", str(text), "--site", "in_proj", "--draws", "0"],
        "bench": ["--prompt-len", "2", "--gen-len", "2"],
        "eval": ["--tasks", "copa", "--limit", "1", "--results", str(folder / "r.sqlite")],
        "export": ["small", str(folder / "exported"), "--format", "hf"],
        "generate": ["--max-new-tokens", "2"],
        "info": ["small"],
        "logits": ["--tokens", "1,2", "--out", str(folder / "logits.npy")],
        "outliers": ["--text", str(text)],
        "perplexity": ["--text", str(text)],
        "push": [str(folder / "q"), "owner/name"],
        "quantize": ["small", str(folder / "q"), "--bits", "8"],
        "replay": [str(folder.parent / "receipt.json")],
        "reproduce": [str(folder / "out"), "--dry-run", "--schemes", "fp32"],
        "scheme": ["int8"],
        "smooth-search": ["--text", str(text)],
        "step": ["--scheme", "fp32", "--html", str(folder / "page.html")],
        "trace": ["--tokens", "1,2", "--out", str(folder / "trace.npz")],
        "verify": ["--quick", "--schemes", "fp32"],
    }[command]
    return [command, *more]


def python(*words: str) -> list[str]:
    return [sys.executable, "-m", "refmamba", *words]


def run(command: list[str], redirection: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """A command as a shell runs it, its outputs redirected."""
    shell = ["sh", "-c", f'exec "$@" {redirection}', "sh", *command]
    return subprocess.run(shell, capture_output=True, text=True, env=os.environ | env, check=False, timeout=300)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """What the command says in the end, which is all that it says besides its warnings."""
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("refmamba: ")
    assert len(line) <= 300
    return line


@pytest.mark.parametrize("command", [command for command in LOCAL if command not in SILENT])
def test_a_full_stdout_is_one_line(command: str, tmp_path: Path) -> None:
    done = forks.run(words_of(command, tmp_path), {1: "/dev/full"})
    assert done.returncode == 2
    assert last_line(done) == "refmamba: standard output cannot be written: No space left on device"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_closed_stdout_is_refused_before_the_work(command: str, tmp_path: Path) -> None:
    done = forks.run(words_of(command, tmp_path), {1: None})
    assert done.returncode == 2
    assert done.stderr == "refmamba: standard output is closed; send it to a file, or to /dev/null\n"
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize("command", LOCAL)
@pytest.mark.parametrize("streams", [{2: None}, {2: "/dev/full"}, {0: None, 2: None}], ids=["closed", "full", "stdin too"])
def test_without_stderr_the_work_is_done(command: str, streams: dict[int, str | None], tmp_path: Path) -> None:
    if streams != {2: None} and command not in ("generate", "eval", "quantize"):
        pytest.skip("one command of a kind is enough for the rarer redirections")
    done = forks.run(words_of(command, tmp_path), streams)
    assert done.returncode == 0, done.stdout
    if command not in SILENT:
        assert done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_nan_is_one_line(command: str, tmp_path: Path) -> None:
    done = forks.run([*words_of(command, tmp_path), NAN[command], "nan"])
    assert (done.returncode, done.stdout) == (2, "")
    assert "nan" in last_line(done)


@pytest.mark.parametrize(
    "words",
    [["generate", "--temperature", "inf"], ["generate", "--top-p", "nan"], ["generate", "--seed", "9" * 5000],
     ["generate", "--max-new-tokens", "9" * 23], ["generate", "--top-k", "9" * 23], ["logits", "--tokens", "9" * 23],
     ["bench", "--prompt-len", "1000000000000"], ["bench", "--gen-len", "1000000000000"], ["eval", "--workers", "9" * 9],
     ["eval", "--max-length", "9" * 23], ["ablate", "--draws", "9" * 23], ["generate", "--bits", "9" * 23],
     ["generate", "--backend", ":x"], ["generate", "--backend", "os:getcwd"], ["generate", "--backend", "os:name"],
     ["generate", "--backend", "..:x"], ["generate", "--model", "m" * 300], ["generate", "--model", "a\nb\x1b[31m"],
     ["generate", "--no\nsuch"], ["no\nsuch"], ["generate", "--scheme", "s" * 5000], ["perplexity", "--text", "t" * 300]],
    ids=lambda words: " ".join(words)[:40],
)  # fmt: skip
def test_odd_values_are_one_line(words: list[str], tmp_path: Path) -> None:
    more = ["--out", str(tmp_path / "x.npy")] if words[0] == "logits" else []
    done = forks.run([*words, *more])
    assert (done.returncode, done.stdout) == (2, "")
    assert last_line(done).isprintable()
    assert sum(line.startswith("refmamba: ") for line in done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_an_interrupt_at_the_start_is_one_line(command: str, tmp_path: Path) -> None:
    """While NumPy is imported, which this process can see from the outside in the files that it has mapped."""
    with subprocess.Popen(python(*words_of(command, tmp_path)), stderr=subprocess.PIPE, text=True) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        while "_multiarray_umath" not in maps.read_text():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == "refmamba: interrupted\n"


@pytest.mark.parametrize("delay", [0.03, 0.05, 0.08, 0.15, 0.3, 0.6, 1.0, 1.5, 2.0])
def test_an_interrupt_at_any_time_is_one_line(delay: float) -> None:
    command = python("generate", "--max-new-tokens", "100000")
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        status = Path(f"/proc/{process.pid}/status")
        while not int(status.read_text().split("SigCgt:")[1].split()[0], 16) & (1 << (signal.SIGTERM - 1)):
            assert process.poll() is None  # until our handlers stand, Python itself is starting
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "refmamba: interrupted"
    assert "Traceback" not in said


def test_a_new_process_ends_as_a_forked_one(tmp_path: Path) -> None:
    words = words_of("generate", tmp_path)
    redirections: dict[str, dict[int, str | None]] = {">/dev/full": {1: "/dev/full"}, ">&-": {1: None}, "2>&-": {2: None}}
    for redirection, streams in redirections.items():
        done, forked = run(python(*words), redirection), forks.run(words, streams)
        assert (done.returncode, done.stdout, done.stderr) == (forked.returncode, forked.stdout, forked.stderr)


def test_an_unexpected_error_is_said_to_be_a_bug() -> None:
    code = "from refmamba.commands import entry, main; main.refmamba.main = lambda **_: 1 // 0; entry.main()"
    done = run([sys.executable, "-c", code])
    assert done.returncode == 2
    assert last_line(done).startswith("refmamba: this is a bug: ZeroDivisionError: integer division or modulo by zero (")
    assert "report it" in done.stderr
    shown = run([sys.executable, "-c", code], REFMAMBA_DEBUG="1")
    assert "Traceback (most recent call last)" in shown.stderr
    assert shown.stderr.endswith(done.stderr)


def test_an_encoding_that_lacks_a_letter_is_one_line() -> None:
    done = run(python("generate", "中", "--max-new-tokens", "1"), PYTHONIOENCODING="latin-1")
    assert done.returncode == 2
    assert "PYTHONIOENCODING" in last_line(done)


def test_a_reader_that_goes_away_is_no_error() -> None:
    done = run(["sh", "-c", f"{sys.executable} -m refmamba generate --max-new-tokens 2000 | head -c 5"])
    assert done.stdout == "Once "
    assert "Traceback" not in done.stderr
    assert "refmamba:" not in done.stderr


@pytest.mark.parametrize("threads", ["0", "-1", "x", "1025", "99999999999999999999", "", "1024"])
def test_any_number_of_threads_is_a_line_or_works(threads: str) -> None:
    done = run(python("generate", "--max-new-tokens", "1"), NUMBA_NUM_THREADS=threads)
    if done.returncode != 0:
        assert done.returncode == 2
        assert "NUMBA_NUM_THREADS" in last_line(done)


def test_without_the_compiler_the_reference_works_and_the_other_says_so() -> None:
    assert run(python("generate", "--max-new-tokens", "1", "--backend", "reference"), NUMBA_DISABLE_JIT="1").returncode == 0
    done = run(python("generate", "--max-new-tokens", "1"), NUMBA_DISABLE_JIT="1")
    assert done.returncode == 2
    assert "--backend reference" in last_line(done)


@pytest.mark.ci
def test_no_home_and_no_cache_that_can_be_written_work_and_leave_nothing(tmp_path: Path) -> None:
    surroundings = {"HOME": "/proc/nowhere", "XDG_CACHE_HOME": "/proc/nowhere", "TMPDIR": str(tmp_path)}
    done = run(python("generate", "--max-new-tokens", "1"), **surroundings)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ci
def test_a_terminated_command_leaves_no_kernels(tmp_path: Path) -> None:
    surroundings = {"HOME": "/proc/nowhere", "XDG_CACHE_HOME": "/proc/nowhere", "TMPDIR": str(tmp_path)}
    command = python("generate", "--max-new-tokens", "100000")
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | surroundings) as process:
        assert process.stdout is not None
        process.stdout.read(20)  # more than the prompt: the kernels are there
        assert list(tmp_path.iterdir()) != []
        process.terminate()
        process.stdout.close()
    assert process.returncode == 143
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ci
def test_a_read_only_installation_works(tmp_path: Path) -> None:
    """Another user's, on a disk that is mounted read-only."""
    place = tmp_path / "place"
    place.mkdir()
    for name in ("refmamba", "backends", "eval_tasks"):
        shutil.copytree(ROOT / name, place / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    (place / "refmamba" / "vectors").unlink()
    mounted = subprocess.run(["mount", "--bind", str(place), str(place)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("nothing can be mounted here")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(place)], check=True)
        done = run(python("generate", "--max-new-tokens", "1"), PYTHONPATH=str(place), NUMBA_CACHE_DIR=str(tmp_path / "cache"))
        assert done.returncode == 0, done.stderr
        refused = run(python("quantize", "small", str(place / "q"), "--bits", "8"), PYTHONPATH=str(place))
        assert refused.returncode == 2
        assert "Read-only file system" in last_line(refused)
        refused = run(python("reproduce", str(place / "out")), PYTHONPATH=str(place))
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "Read-only file system" in last_line(refused)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_locked_results_file_is_told_and_waited_for(tmp_path: Path) -> None:
    words = words_of("eval", tmp_path)
    assert forks.run(words).returncode == 0
    other = sqlite3.connect(tmp_path / "r.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with subprocess.Popen(python(*words), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = next(line for line in process.stderr if "locked" in line)
        other.execute("ROLLBACK")
        rest = process.stderr.read()
    assert process.returncode == 0
    assert said == f"{tmp_path / 'r.sqlite'} is locked by another process; waiting for it, 60 seconds at most\n"
    assert "locked" not in rest
    other.close()


def test_workers_have_keys_and_leave_nothing(tmp_path: Path) -> None:
    code = """
import distributed
from refmamba.eval_tasks.cluster import cluster
if __name__ == "__main__":
    with cluster(1, None):
        address = distributed.default_client().scheduler.address
        print(address.partition(":")[0])
        try:
            distributed.Client(address.replace("tls", "tcp"), timeout="5s")
        except (OSError, TimeoutError):
            print("refused")
"""
    script, scratch = tmp_path / "script.py", tmp_path / "scratch"
    script.write_text(code)
    scratch.mkdir()
    done = run([sys.executable, str(script)], TMPDIR=str(scratch))
    assert done.stdout.split() == ["tls", "refused"], done.stderr
    assert list(scratch.iterdir()) == []


def test_longer_work_shows_the_time_left_on_a_terminal(tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_text("The old man went out of the house and into the garden. " * 120)
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    command = python("perplexity", "--text", str(text), "--backend", "reference")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:  # the terminal's other end is closed
        pass
    assert process.wait() == 0
    assert process.stdout is not None
    process.stdout.close()
    os.close(ours)
    assert b"scoring the text" in shown
    assert b"<00:" in shown
