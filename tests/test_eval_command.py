"""`refmamba eval` as its users run it: real processes, killed, interrupted, resumed, spread over workers."""

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from refmamba.commands.main import refmamba
from refmamba.errors import DataError
from refmamba.eval_tasks.cluster import _absolute, _inputs, _on_own_device, _on_worker
from refmamba.eval_tasks.evaluate import Job
from refmamba.eval_tasks.tasks import TASKS
from refmamba.formats.folder import open_checkpoint
from refmamba.formats.hub import resolve_model
from refmamba.formats.tokenizer import load_tokenizer
from refmamba.run.session import ModelChoice
from refmamba.spec import SPEC_VERSION
from refmamba.spec.scheme import parse_scheme

TWO = ("--schemes", "int8,w8-all")
WAIT = 60.0  # seconds, on a busy machine


def heed_interrupts() -> None:
    """A job in a shell's background begins with interrupts ignored, and so would the commands of its tests."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(
    folder: Path, *words: str, group: bool = False, stderr: int = subprocess.PIPE, variables: Mapping[str, str] | None = None
) -> "subprocess.Popen[str]":
    """The command, in a folder of its own, with a results file there."""
    command = [sys.executable, "-m", "refmamba", "eval", "--results", "r.sqlite", *words]
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "PYTHONWARNINGS": "default"} | dict(variables or {})
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True, encoding="utf-8",
        start_new_session=group, preexec_fn=heed_interrupts if os.name == "posix" else None,
    )  # fmt: skip


def run(folder: Path, *words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    process = start(folder, *words, variables=variables)
    out, err = process.communicate(timeout=4 * WAIT)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def count(folder: Path) -> int:
    """Documents in the results file, read as another process may."""
    file = folder / "r.sqlite"
    if not file.exists():
        return 0
    with closing(sqlite3.connect(file, timeout=WAIT)) as database:
        try:
            found: int = database.execute("SELECT count(*) FROM result").fetchone()[0]
        except sqlite3.OperationalError:  # the tables are not there yet
            return 0
    return found


def saved(folder: Path) -> list[tuple[str, int, str, str]]:
    """What the results file has of each document, and under which key; log-likelihoods are texts that lose no bit."""
    with closing(sqlite3.connect(folder / "r.sqlite")) as database:
        return database.execute(
            "SELECT key, doc_id, loglikelihoods, greedy FROM result JOIN run ON run.id = run ORDER BY key, doc_id"
        ).fetchall()


def wait_until_more_than(folder: Path, before: int, process: "subprocess.Popen[str]") -> None:
    until = time.monotonic() + WAIT
    while count(folder) <= before and process.poll() is None:
        assert time.monotonic() < until, "no document was finished"
        time.sleep(0.01)


def only(samples: str, words: str) -> str:
    """The lines that have these words."""
    return "".join(line for line in samples.splitlines(keepends=True) if words in line)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An unbroken run of six tasks under two schemes: its samples, its JSON, and how long it took."""
    folder = tmp_path_factory.mktemp("whole")
    run(tmp_path_factory.mktemp("compiler"), "--limit", "1")  # the kernels are compiled before the clock starts
    started = time.monotonic()
    done = run(folder, *TWO, "--samples", "s.jsonl", "--json")
    assert done.returncode == 0, done.stderr
    seconds = time.monotonic() - started
    return {"samples": (folder / "s.jsonl").read_text("utf-8"), "json": json.loads(done.stdout), "seconds": seconds}


def test_json_has_the_harness_s_layout_and_names_everything(whole: dict[str, Any]) -> None:
    assert list(whole["json"]["schemes"]) == ["int8", "w8-all"]
    for scheme, one in whole["json"]["schemes"].items():
        assert list(one["results"]) == [
            "lambada", "hellaswag", "piqa", "winogrande", "rte", "copa", "arc_easy", "arc_challenge"
        ]  # fmt: skip
        assert set(one["results"]["piqa"]) == {
            "alias", "sample_len", "acc,none", "acc_stderr,none", "acc_norm,none", "acc_norm_stderr,none"
        }  # fmt: skip
        assert set(one["results"]["lambada"]) >= {"perplexity,none", "perplexity_stderr,none", "acc,none"}
        assert one["n-samples"]["rte"] == {"original": 20, "effective": 20}
        assert one["config"]["documents_asked_for"]["rte"] == 20
        assert one["higher_is_better"]["lambada"] == {"perplexity": False, "acc": True}
        config = one["config"]
        assert (config["model"], config["scheme"], config["backend"], config["spec_version"]) == (
            "small",
            scheme,
            "cpu",
            SPEC_VERSION,
        )
        assert config["scheme_map"]["weights"]["in_proj.weight"]["bits"] == 8
        assert len(config["data"]["piqa"]["sha256"]) == len(config["model_sha256"]) == 64
        assert "not the benchmark" in config["data"]["piqa"]["note"]


def test_samples_give_the_metrics_again(whole: dict[str, Any]) -> None:
    lines = [json.loads(line) for line in whole["samples"].splitlines()]
    assert len(lines) == 320
    for scheme, one in whole["json"]["schemes"].items():
        for task, entry in one["results"].items():
            rows = [line for line in lines if (line["scheme"], line["task"]) == (scheme, task)]
            assert [row["doc_id"] for row in rows] == list(range(20))
            assert sum(row["acc"] for row in rows) / 20 == pytest.approx(entry["acc,none"])
            for row in rows:
                assert row["scheme_map"] == one["config"]["scheme_map"]
                assert row["data_sha256"] == one["config"]["data"][task]["sha256"]
                assert (row["model"], row["backend"], row["spec_version"]) == ("small", "cpu", SPEC_VERSION)
                assert len(row["contexts"]) == len(row["continuations"]) == len(row["loglikelihoods"]) == len(row["greedy"])
                if task in ("hellaswag", "piqa"):
                    per_character = [x / (len(c) - 1) for x, c in zip(row["loglikelihoods"], row["continuations"], strict=True)]
                    assert row["acc_norm"] == float(per_character.index(max(per_character)) == row["gold"])


def test_kill_nine_at_ten_moments_loses_nothing_and_changes_nothing(whole: dict[str, Any], tmp_path: Path) -> None:
    rng = random.Random(0)
    before = 0
    for moment in range(10):
        process = start(tmp_path, *TWO, "--samples", "s.jsonl")
        if moment % 2:  # some time after a block; else at any time, while Python starts or the model is read
            wait_until_more_than(tmp_path, before, process)
        time.sleep(rng.uniform(0, 0.08 if moment % 2 else 0.25 * whole["seconds"]))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was done before it was killed"
        now = count(tmp_path)
        assert now >= before, "finished documents were lost"
        before = now
    assert 0 < before < 320
    done = run(tmp_path, *TWO, "--samples", "s.jsonl", "--json")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "s.jsonl").read_text("utf-8") == whole["samples"]
    assert json.loads(done.stdout) == whole["json"]
    assert count(tmp_path) == 320


def test_two_runs_at_once_into_one_file(whole: dict[str, Any], tmp_path: Path) -> None:
    both = [start(tmp_path, *TWO, "--samples", f"{i}.jsonl") for i in range(2)]
    for process in both:
        _, err = process.communicate(timeout=4 * WAIT)
        assert process.returncode == 0, err
    assert [(tmp_path / f"{i}.jsonl").read_text("utf-8") for i in range(2)] == [whole["samples"]] * 2
    assert count(tmp_path) == 320


def test_an_interrupt_prints_what_there_is_and_ends_with_130(tmp_path: Path) -> None:
    process = start(tmp_path, *TWO)
    wait_until_more_than(tmp_path, 0, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=WAIT)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "refmamba: interrupted" in err
    assert "| int8 " in out
    assert count(tmp_path) > 0


def test_ctrl_c_reaches_workers_too_and_is_as_quiet(tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    process = start(tmp_path, "--scheme", "fp32", "--workers", "2", group=True)
    wait_until_more_than(tmp_path, 0, process)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    out, err = process.communicate(timeout=WAIT)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "| fp32 " in out


def test_a_terminal_shows_a_bar_for_the_task_and_one_for_all(tmp_path: Path) -> None:
    pty, termios, fcntl = (pytest.importorskip(name) for name in ("pty", "termios", "fcntl"))
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    process = start(tmp_path, "--scheme", "int8", "--tasks", "piqa,copa", stderr=end)
    os.close(end)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal says that nobody writes any more
        while piece := os.read(terminal, 4096):
            shown += piece
    os.close(terminal)
    process.communicate(timeout=WAIT)
    text = shown.decode("utf-8")
    assert re.search(r"int8 piqa: +80%.* 16/20 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+doc/s\]", text)
    assert re.search(r"all: +40%.* 16/40 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+doc/s\]", text)
    assert re.search(r"all: 100%.* 40/40 ", text)


def test_the_table_and_its_footnotes(tmp_path: Path) -> None:
    done = run(tmp_path, "--scheme", "w8a8-mlp", "--tasks", "copa,winogrande", "--limit", "2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == [
        "Scheme", "Task", "Version", "Documents", "Metric", "Value", "Stderr"
    ]  # fmt: skip
    assert set(lines[1]) == {"|", "-"}
    assert [[cell.strip() for cell in line.split("|")[1:5]] for line in lines[2:4]] == [
        ["w8a8-mlp", "winogrande (sample)", "1.0", "2"],
        ["w8a8-mlp", "copa (sample)", "1.0", "2"],
    ]
    assert "each context + continuation was one call" in done.stdout
    assert "a sample, not the benchmark" in done.stdout
    assert "weight in_proj.weight" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "squad"], "refmamba: unknown task 'squad'"),
        (["--schemes", "int8,fp33"], "refmamba: unknown scheme 'fp33'"),
        (["--data", "piqa=bad.jsonl"], "refmamba: bad.jsonl:2: no field 'sol2'"),
        (["--schemes", "int8,copy.json"], "refmamba: --schemes int8,copy.json: two of them have the same name"),
        (["--schemes", ","], "refmamba: --schemes ',': names nothing"),
        (["--tasks", " "], "refmamba: --tasks ' ': names nothing"),
        (["--schemes", "int8", "--bits", "4"], "give either --schemes, or --scheme"),
        (["--samples", "nowhere/s.jsonl"], "refmamba: nowhere/s.jsonl: cannot be written: there is no folder nowhere"),
        (["--model", "."], "refmamba: config.json: no such file; a model folder has a config.json"),
        (["--model", "broken"], "refmamba: broken/config.json: not JSON"),
        (["--dask", "tcp://127.0.0.1:9"], "no dask scheduler answers at tcp://127.0.0.1:9"),
    ],
)
def test_wrong_input_is_one_line_and_exit_status_2(words: Sequence[str], message: str, tmp_path: Path) -> None:
    if "--dask" in words:
        pytest.importorskip("distributed")
    row = {"goal": "a", "sol1": "b", "sol2": "c", "label": 0}
    (tmp_path / "broken").mkdir()
    (tmp_path / "copy.json").write_text(json.dumps(parse_scheme("int8").to_json()))
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "broken" / name).write_text('{"model_type": ')
    (tmp_path / "bad.jsonl").write_text(json.dumps(row) + '\n{"sol1": "b"}\n')
    done = run(tmp_path, *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_an_error_in_the_middle_keeps_and_prints_what_was_before(tmp_path: Path) -> None:
    row = {"goal": "a", "sol1": "b", "sol2": "c", "label": 0}
    too_long = {**row, "sol1": "b " * 40}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [row] * 20 + [too_long]))
    words = (
        "--scheme",
        "int8",
        "--data",
        "sample",
        "--data",
        "piqa=rows.jsonl",
        "--tasks",
        "lambada,piqa",
        "--max-length",
        "30",
    )
    done = run(tmp_path, *words)
    assert done.returncode == 2
    assert "rows.jsonl:21: the continuation has" in done.stderr
    assert "| int8   | lambada (sample) | 1.0     | 20 " in done.stdout
    assert count(tmp_path) == 20


NAN = """
from refmamba.backends.cpu.backend import Cpu
from refmamba.backends.cpu.runner import CpuRunner


class Nan(Cpu):
    def load(self, model):
        runner = super().load(model)
        runner.__class__ = Poisoned
        return runner


class Poisoned(CpuRunner):
    def prefill(self, sequences, state=None, **options):
        logits, after = super().prefill(sequences, state, **options)
        for tokens, rows in zip(sequences, logits):
            if tuple(tokens[-3:]) == POISON and len(rows):
                rows[-1, 7] = float("nan")
        return logits, after
"""


@pytest.mark.parametrize("words", [(), ("--workers", "1")])
def test_a_nan_logit_names_its_row_and_keeps_the_others(words: Sequence[str], tmp_path: Path) -> None:
    if words:
        pytest.importorskip("distributed")
    rows = [{"text": f"{'The old man went on and on. ' * (60 - i)}He sat"} for i in range(40)]
    rows[37] = {"text": "The blue ship sailed on"}  # among the last that are scored, as the longest come first
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = resolve_model("small")
    tokenizer = load_tokenizer(files, open_checkpoint(files.folder).config)
    (tmp_path / "stranger.py").write_text(f"POISON = {tuple(tokenizer.encode('The blue ship sailed')[-3:])}\n{NAN}")
    python = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    done = run(
        tmp_path, "--data", "lambada=rows.jsonl", "--scheme", "int8", "--backend", "stranger:Nan", *words, PYTHONPATH=python
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "refmamba: rows.jsonl:38: the model gives a NaN or an infinity for this document"
    assert "Traceback" not in done.stderr
    assert "| 32 of 40 " in done.stdout
    assert count(tmp_path) == 32


def test_a_model_without_sense_is_told_in_short_numbers_and_in_json(tmp_path: Path) -> None:
    """Log-likelihoods of -10^2 to -10^17, as a model gives them whose last norm is far too large."""
    small, norm = resolve_model("small").folder, "backbone.norm_f.weight"
    folder, text = tmp_path / "model", tmp_path / "text"
    shutil.copytree(small, folder)
    tensors = load_file(small / "model.safetensors")
    text.write_text("Call me Ishmael.")
    for factor in (16.0, 1e16):
        save_file(tensors | {norm: tensors[norm].astype(np.float32) * np.float32(factor)}, folder / "model.safetensors")
        for words in (["eval", "--tasks", "lambada", "--limit", "2", "--results", str(tmp_path / "r.sqlite")],
                      ["perplexity", "--text", str(text)]):  # fmt: skip
            words += ["--model", str(folder), "--scheme", "fp32"]
            shown = CliRunner().invoke(refmamba, words)
            assert shown.exit_code == 0, shown.output
            assert not re.findall("[0-9.]{20,}", shown.stdout)
            assert "e+" in shown.stdout or "inf" in shown.stdout
            values = CliRunner().invoke(refmamba, [*words, "--json"])
            json.loads(values.stdout, parse_constant=pytest.fail)


def test_the_hub_s_files_are_fetched_at_their_revision_and_checked(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = (Path(__file__).parents[1] / "eval_tasks" / "samples" / "copa.jsonl").read_text("utf-8").splitlines()
    parquet.write_table(pyarrow.Table.from_pylist([json.loads(row) for row in rows * 5]), tmp_path / "copa.parquet")
    files = {hub_path("copa"): (tmp_path / "copa.parquet").read_bytes(), hub_path("lambada"): b'{"text": "not LAMBADA"}'}
    with Datasets(files) as endpoint:
        hub = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
        good = run(tmp_path, "--data", "hub", "--tasks", "copa", "--limit", "2", "--scheme", "int8", "--json", **hub)
        wrong = run(tmp_path, "--data", "hub", "--tasks", "lambada", "--scheme", "int8", **hub)
        missing = run(tmp_path, "--data", "hub", "--tasks", "rte", "--scheme", "int8", **hub)
    assert good.returncode == 0, good.stderr
    result = json.loads(good.stdout)
    assert result["n-samples"]["copa"] == {"original": 100, "effective": 2}
    assert result["config"]["data"]["copa"]["source"].startswith(f"aps/super_glue@{TASKS['copa'].hub.revision}/")
    assert (wrong.returncode, missing.returncode) == (2, 2)
    assert "is not data/lambada_test.jsonl of EleutherAI/lambada_openai at 900124bf3b82" in wrong.stderr
    assert "refmamba: rte: nyu-mll/glue cannot be fetched" in missing.stderr


def hub_path(task: str) -> str:
    hub = TASKS[task].hub
    return f"/datasets/{hub.repo}/resolve/{hub.revision}/{hub.file}"


class Datasets:
    """As much of the hub as a download of a data set's file needs, on this machine."""

    def __init__(self, files: dict[str, bytes]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                content = files.get(self.path)
                self.send_response(404 if content is None else 200)
                if content is None:
                    self.send_header("X-Error-Code", "EntryNotFound")
                else:
                    self.send_header("ETag", hashlib.sha256(content).hexdigest())
                self.send_header("X-Repo-Commit", self.path.split("/")[5])
                self.send_header("Content-Length", str(len(content or b"")))
                self.end_headers()
                if self.command == "GET" and content:
                    self.wfile.write(content)

            do_HEAD = do_GET

            def log_message(self, format: str, *args: object) -> None:
                """Nothing on stderr."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def __enter__(self) -> str:
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return f"http://127.0.0.1:{self._server.server_port}"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def test_workers_give_the_same_results(whole: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    done = run(tmp_path, *TWO, "--workers", "2", "--tasks", "copa", "--samples", "s.jsonl")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "s.jsonl").read_text("utf-8") == only(whole["samples"], '"task": "copa"')


def test_a_worker_of_our_own_that_dies_costs_its_block_only(whole: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    psutil = pytest.importorskip("psutil")
    process = start(tmp_path, "--scheme", "int8", "--workers", "2", "--samples", "s.jsonl")
    wait_until_more_than(tmp_path, 0, process)
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]
    assert len(workers) == 2
    workers[0].kill()
    _, err = process.communicate(timeout=4 * WAIT)
    assert process.returncode == 0, err
    assert (tmp_path / "s.jsonl").read_text("utf-8") == only(whole["samples"], '"scheme": "int8"')
    assert count(tmp_path) == 20 * len(TASKS)


def test_a_worker_with_another_scheme_file_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    (tmp_path / "s.json").write_text("{}")
    job = Job(ModelChoice("small", str(tmp_path / "s.json")), 2048, "model", "")
    here = _inputs(job)
    (tmp_path / "s.json").write_text("{ }")
    with pytest.raises(DataError, match=r"has another .*s\.json"):
        _on_worker(job, here, [])
    (tmp_path / "s.json").unlink()
    with pytest.raises(DataError, match=r"on .*: .*s\.json: no such file"):
        _on_worker(job, here, [])


def test_a_worker_elsewhere_gets_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder or a GGUF file by its whole path; the package's model by its name, also beside a folder that is called so."""
    monkeypatch.chdir(tmp_path)
    for folder in ("mine", "small"):
        Path(folder).mkdir()
    Path("blob").touch()
    Path("mine.gguf").symlink_to("blob")  # as in the hub's cache
    names = ("mine", "mine.gguf", "small", "owner/name")
    models = [_absolute(Job(ModelChoice(name), 2048, "model", "")).choice.model for name in names]
    assert models == [str(tmp_path.resolve() / "mine"), str(tmp_path.resolve() / "mine.gguf"), "small", "owner/name"]


@contextmanager
def background(module: str, *words: str, **variables: str) -> Iterator["subprocess.Popen[bytes]"]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "NUMBA_NUM_THREADS": "1"} | variables
    process = subprocess.Popen(
        [sys.executable, "-m", module, *words], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def scheduler_with_workers(
    folder: Path, workers: int, **variables: str
) -> Iterator[tuple[str, list["subprocess.Popen[bytes]"]]]:
    """Its address, and the processes: the scheduler's, then the workers'."""
    file = folder / "scheduler.json"
    options = ("--scheduler-file", str(file), "--no-dashboard")
    worker = ("distributed.cli.dask_worker", *options, "--nthreads", "1", "--no-nanny", "--local-directory", str(folder))
    with ExitStack() as stack:
        processes = [stack.enter_context(background("distributed.cli.dask_scheduler", *options, "--port", "0", **variables))]
        until = time.monotonic() + WAIT
        while not file.exists():
            assert time.monotonic() < until, "the scheduler did not start"
            time.sleep(0.05)
        processes += [stack.enter_context(background(*worker, **variables)) for _ in range(workers)]
        yield json.loads(file.read_text())["address"], processes


def test_a_dask_worker_that_dies_costs_its_block_only(whole: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    with scheduler_with_workers(tmp_path, 2) as (address, processes):
        process = start(tmp_path, "--scheme", "int8", "--dask", address, "--samples", "s.jsonl")
        wait_until_more_than(tmp_path, 0, process)
        processes[1].kill()
        _, err = process.communicate(timeout=4 * WAIT)
    assert process.returncode == 0, err
    assert (tmp_path / "s.jsonl").read_text("utf-8") == only(whole["samples"], '"scheme": "int8"')
    assert count(tmp_path) == 20 * len(TASKS)


def test_a_scheduler_that_dies_is_one_line_and_what_was_finished_is_kept(tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    with scheduler_with_workers(tmp_path, 1) as (address, processes):
        process = start(tmp_path, "--scheme", "fp32", "--dask", address)
        wait_until_more_than(tmp_path, 0, process)
        processes[0].kill()
        out, err = process.communicate(timeout=WAIT)
    assert process.returncode == 2, err
    assert err.splitlines()[-1].startswith("refmamba: the connection to the dask scheduler is lost")
    assert "Traceback" not in err
    assert "| fp32 " in out


def test_a_scheduler_without_workers_is_said_to_have_none(tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    with scheduler_with_workers(tmp_path, 0) as (address, _):
        process = start(tmp_path, "--scheme", "int8", "--dask", address)
        assert process.stderr is not None
        until = time.monotonic() + WAIT
        while "the scheduler has no worker" not in process.stderr.readline():
            assert time.monotonic() < until
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=WAIT)
    assert process.returncode == 130


def test_each_worker_has_a_cuda_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    job = Job(ModelChoice("model", device="cuda"), 10, "", "")
    devices = [_on_own_device(job, worker).choice.device for worker in (0, 1, 2, "tcp://10.0.0.1:1")]
    assert devices == ["cuda:0", "cuda:1", "cuda:0", "cuda"]
