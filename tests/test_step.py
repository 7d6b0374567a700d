"""`refmamba step` in the terminal: the numbers that it shows are the record's, and its errors those of exact arithmetic."""

import fcntl
import json
import math
import os
import pty
import re
import select
import struct
import sys
import termios
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import refmamba
from refmamba.commands.main import refmamba as command
from refmamba.spec.codes import Codes
from refmamba.spec.scheme import NAMED

PROMPT = "She said"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command, ["step", PROMPT, *arguments])


def elements(*arguments: str) -> list[dict[str, Any]]:
    done = run("--json", *arguments)
    assert done.exit_code == 0, done.output
    listed: list[dict[str, Any]] = json.loads(done.stdout)["elements"]
    return listed


@pytest.mark.parametrize("scheme", [*NAMED, "w8-all", "w8a4-all"])
def test_every_value_of_a_layer_is_the_records(scheme: str) -> None:
    trace = refmamba.load("small", scheme=scheme, backend="reference").trace(PROMPT)
    plain = refmamba.load("small", scheme="fp32", backend="reference").trace(PROMPT)
    shown = elements("--scheme", scheme, "--layer", "2", "--channel", "5")
    assert [e["site"] for e in shown] == [s for s in trace.layer(2).sites if not s.endswith("_state")]
    for e in shown:
        array = getattr(trace[e["site"]], "q", trace[e["site"]])
        assert e["value"] == array[1, 5], e["site"]
        if not e["operation"].startswith(("code", "fixed_point")):  # those lose what a step of the code is
            assert abs(e["error_added"]) <= 2e-6 * max(1.0, abs(e["value"])), e["site"]
    if scheme == "fp32":
        assert all(e["error_so_far"] == 0 for e in shown)
    if scheme == "int8":
        for e in shown:
            if plain.step(e["site"]).operation not in ("fixed_point", "integer_product"):
                assert e["error_so_far"] == pytest.approx(
                    float(trace[e["site"]][1, 5]) - float(plain[e["site"]][1, 5]), abs=1e-12
                )


def test_smoothing_is_taken_out_of_the_error() -> None:
    (e,) = elements("--scheme", "int8-smooth", "--layer", "0", "--op", "norm", "--channel", "9")
    (plain,) = elements("--scheme", "fp32", "--layer", "0", "--op", "norm", "--channel", "9")
    assert math.log2(abs(plain["value"] / e["value"])) == pytest.approx(
        round(math.log2(abs(plain["value"] / e["value"]))), abs=0.1
    )
    assert abs(e["error_so_far"]) < 0.05 * abs(plain["value"])  # of the embedding's codes alone


def test_a_code_and_its_rounding_by_hand() -> None:
    step = refmamba.load("small", scheme="int8", backend="reference").trace(PROMPT).step("layers.1.x_proj.in_codes")
    x, codes = step.arguments[0], step.result
    assert isinstance(codes, Codes)
    (e,) = elements("--layer", "1", "--op", "x_proj.in_codes", "--token", "0", "--channel", "200")
    scale = Fraction(float(codes.scale[0, 0]))
    assert e["rounding"]["before"] == float(np.float32(x[0, 200] * codes.scale[0, 0]))
    assert e["rounding"]["after"] == e["value"] == codes.q[0, 200]
    assert e["rounding"]["to_the_tie"] == pytest.approx(0.5 - abs(e["rounding"]["before"] - e["value"]))
    assert e["error_added"] == pytest.approx(float(int(codes.q[0, 200]) / scale - Fraction(float(x[0, 200]))), rel=1e-12)
    assert int(e["bits"], 2) - (256 if e["bits"][0] == "1" else 0) == e["value"]
    assert e["notes"][0].startswith(f"the scale is taken by token 0, channel {int(np.argmax(np.abs(x[0])))}: ")


def test_a_saturated_value_is_named() -> None:
    text = "Zzz xq @@ }{ é"  # unlike the passage of the calibration
    trace = refmamba.load("small", scheme="int8-static", backend="reference").trace(text)
    beyond = [
        (step.sites[0], np.argwhere(np.abs(step.arguments[0] * step.result.scale) > 127.5))
        for step in trace.operation("code_static")
    ]
    site, places = next((site, places) for site, places in beyond if len(places))
    (token, channel), (_, layer, op) = places[0], site.split(".", 2)
    where = ["--layer", layer, "--op", op, "--token", str(token), "--channel", str(channel)]
    done = CliRunner().invoke(command, ["step", text, "--scheme", "int8-static", *where])
    assert "is beyond the largest code: it saturates" in done.output


def test_the_accumulators_products_add_up() -> None:
    (e,) = elements("--layer", "3", "--op", "dt_proj.acc", "--channel", "7")
    head, *rows = e["rows"]
    assert head == ["channel", "input", "weight", "product", "sum until here"]
    assert all(product == q * w for _, q, w, product, _ in rows)
    assert [abs(row[3]) for row in rows] == sorted((abs(row[3]) for row in rows), reverse=True)
    last = [row for row in rows if row[0] == 15]
    assert all(row[4] == e["value"] for row in last)


def test_plain_text_in_a_pipe() -> None:
    done = run("--layer", "3", "--op", "in_proj", "--token", "1", "--channel", "7")
    assert done.exit_code == 0
    headings = [line for line in done.output.splitlines() if line and line[0] != " "]
    assert headings == [f"layers.3.in_proj.{name} [token 1, channel 7]" for name in ("in_codes", "acc", "result")]
    assert "equation (7, 8)" in done.output
    assert "q = rint(clamp(x · s, −Q, Q))" in done.output


def test_what_belongs_to_no_layer() -> None:
    assert [e["site"] for e in elements("--op", "lm_head", "--channel", "4")] == [
        "lm_head.in_codes",
        "lm_head.acc",
        "lm_head.result",
    ]
    assert [e["site"] for e in elements("--op", "embedding")] == ["embedding"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--layer", "8"), "the model has no layer 8; there are 0 to 7"),
        (("--op", "nothing"), "--op nothing: no operation has this name; there are norm, "),
        (("--op", "norm", "--token", "2"), "layers.0.norm has no token 2; there are 0 to 1"),
        (("--op", "norm", "--channel", "256"), "layers.0.norm has no channel 256; there are 0 to 255"),
        (("--scheme", "int8,fp32"), "several schemes are for --html; name one"),
        (("--html", "page.html", "--op", "norm"), "--html writes the whole page; leave out --op and --json"),
    ],
)
def test_what_is_not_there_is_said(arguments: tuple[str, ...], words: str) -> None:
    assert words in str(run(*arguments).exception)


class Terminal:
    """`refmamba step` on a terminal of its own, and what stands on its screen."""

    def __init__(self, columns: int, lines: int, *arguments: str) -> None:
        pytest.importorskip("prompt_toolkit", reason="pip install 'refmamba[teach]'")
        pyte = pytest.importorskip("pyte", reason="pip install 'refmamba[test]'")
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            os.environ["TERM"] = "xterm"
            os.execv(sys.executable, [sys.executable, "-m", "refmamba", "step", *arguments])
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self._screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self._screen)

    def press(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def lines(self) -> list[str]:
        return [line.rstrip() for line in self._screen.display]

    def until(self, *lines: str) -> None:
        """Wait for lines that stand one after the other."""
        while "\n".join(lines) not in "\n".join(self.lines()):
            ready, _, _ = select.select([self._terminal], [], [], 60)
            assert ready, "\n".join(self.lines())
            self._stream.feed(os.read(self._terminal, 65536))

    def quit(self) -> int:
        """Press q. Gives the exit status."""
        self.press("q")
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


RIGHT, LEFT, UP, DOWN = "\x1b[C", "\x1b[D", "\x1b[A", "\x1b[B"


def test_keys_step_through_a_forward_in_a_terminal() -> None:
    terminal = Terminal(120, 40, PROMPT, "--layer", "3", "--channel", "7")
    terminal.until("layers.3.norm [token 1, channel 7]")
    for keys, heading in [
        (RIGHT, "layers.3.in_proj.in_codes [token 1, channel 7]"),
        (RIGHT, "layers.3.in_proj.acc [token 1, channel 7]"),
        (DOWN, "layers.4.in_proj.acc [token 1, channel 7]"),
        (UP, "layers.3.in_proj.acc [token 1, channel 7]"),
        (LEFT, "layers.3.in_proj.in_codes [token 1, channel 7]"),
        ("[.", "layers.3.in_proj.in_codes [token 0, channel 8]"),
        ("],", "layers.3.in_proj.in_codes [token 1, channel 7]"),
        (",,,,,,,,,", "layers.3.in_proj.in_codes [token 1, channel 0]"),
    ]:
        terminal.press(keys)
        terminal.until(heading)
    assert terminal.quit() == 0


def test_the_recordings_are_what_a_terminal_shows() -> None:
    """docs/TEACHING.md and README.md: recorded in a tmux pane; here a terminal of the same size, and the same keys."""
    root = Path(__file__).parents[1]
    text = (root / "docs" / "TEACHING.md").read_text("utf-8")
    size = re.search(r"In a terminal of (\d+) by (\d+), after `refmamba step ([^`]*)` and → once, and again:", text)
    assert size is not None
    screens = re.findall(r"^```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(screens) == 2
    readme = (root / "README.md").read_text("utf-8")
    begin = re.escape(f"`refmamba step {size[3]}` in a terminal, after the key → once")
    shown = re.search(begin + r".*?\n\n```text\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    assert shown is not None
    assert screens[0].endswith("\n\n" + shown[1])
    terminal = Terminal(int(size[1]), int(size[2]), *size[3].split())
    terminal.until("layers.3.norm [token 2, channel 7]")
    for screen in screens:
        terminal.press(RIGHT)
        terminal.until(*screen.splitlines(), "", "")  # and nothing below it
    assert terminal.quit() == 0
