"""The page in a real browser: its bits, what clicks and keys change, what it looks for and what it says."""

import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import RandomSource
from safetensors.numpy import save_file

import refmamba
from refmamba.conformance.models import SCHEMES
from refmamba.conformance.vectors import read_vectors
from refmamba.formats.weights import file_shape
from refmamba.run.session import ModelChoice, open_model
from refmamba.spec.codes import Codes
from refmamba.spec.config import MambaConfig
from refmamba.spec.operations import OPERATIONS
from refmamba.spec.scheme import parse_scheme
from refmamba.teach.forwards import follow
from refmamba.teach.pages import PAGE_SCHEMES

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="the page's tests need playwright: pip install 'refmamba[test]'")
pytestmark = [
    pytest.mark.ci,
    pytest.mark.skipif(
        CHROMIUM is None, reason="the page's tests need a Chromium: `apt-get install chromium`, or a `chromium` on the PATH"
    ),
]
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
LIMIT = 60_000  # milliseconds
MOST_BYTES = 11_500_000
PROMPT = "Once upon a time"


@pytest.fixture(scope="session")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page, written by the command."""
    page = tmp_path_factory.mktemp("page") / "page.html"
    subprocess.run([sys.executable, "-m", "refmamba", "step", PROMPT, "--html", page], check=True, capture_output=True)
    return page


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        playwright.expect.set_options(timeout=LIMIT)
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


def opened(browser: Any, file: Path, fragment: str = "", **options: Any) -> Any:
    """The page, when it is ready. `page.complaints` are what the console and the network would be blamed for."""
    page = browser.new_page(**{"viewport": {"width": 1440, "height": 1000}} | options)
    page.complaints = []
    page.on("console", lambda message: page.complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on(
        "request", lambda request: request.url.startswith(("file:", "blob:", "data:")) or page.complaints.append(request.url)
    )
    page.goto(file.as_uri() + fragment)
    page.wait_for_selector("body[data-ready=yes]", timeout=LIMIT)
    return page


@pytest.fixture(scope="session")
def page(browser: Any, file: Path) -> Iterator[Any]:
    """One page for many tests, each of which goes to where it needs to be."""
    shown = opened(browser, file)
    yield shown
    assert shown.complaints == []


def go(page: Any, **place: Any) -> None:
    """Open a number by its address."""
    fragment = "#" + "&".join(f"{name}={value}" for name, value in place.items())
    site = f"layers.{place['layer']}.{place['op']}" if "layer" in place else place["op"]
    page.evaluate("fragment => { location.hash = fragment; }", fragment)
    expect_heading(page, f"{site} [token {place['token']}, channel {place['channel']}]")


def expect_heading(page: Any, words: str) -> None:
    playwright.expect(page.locator("#number h3")).to_have_text(words)


def fact(page: Any, name: str) -> str:
    """What stands beside a name in the followed number's box."""
    words: str = page.locator(f"#number dt:text-is('{name}') + dd").inner_text()
    return words


def value(words: str) -> float:
    """A number as the page writes it."""
    return float(words.replace("\u202f", ""))


def changes(page: Any, selector: str, action: Any) -> None:
    """Do something, and wait until the text of an element is another."""
    before = page.locator(selector).inner_text()
    action()
    playwright.expect(page.locator(selector)).not_to_have_text(before)


@cache
def model(scheme: str) -> refmamba.Model:
    return refmamba.load("small", scheme=scheme, backend="reference")


# ------------------------------------------------------------------------------------------------------------ bits


def test_the_page_passes_every_vector_and_every_frozen_hash(page: Any) -> None:
    result = page.evaluate("refmamba.verify()")
    rows = {row["check"]: row for row in result["rows"]}
    assert [row for row in result["rows"] if row["failed"]] == []
    assert {operation: rows[operation]["cases"] for operation in OPERATIONS} == {
        operation: len(read_vectors(operation)) for operation in OPERATIONS
    }
    assert {f"{title}, {scheme}" for title in ("tiny model", "this model") for scheme in SCHEMES} <= set(rows)
    assert result["ok"]


@pytest.mark.parametrize(
    ("right", "wrong", "check"),
    [
        ("f(f(f(p * f(r * r)) + r) + 1)", "f(f(p * f(r * r) + r) + 1)", "exp"),  # fused
        ("const rint = (x) => x + 6755399441055744 - 6755399441055744;", "const rint = Math.round;", "quantize"),
        ("x < EXP_LOW ? 0 : NaN", "0", "exp"),  # NaN dropped
        ("y > high ? high : y < -high ? -high : y", "y", "quantize"),
    ],
)
def test_a_fault_in_the_engine_is_found(browser: Any, file: Path, tmp_path: Path, right: str, wrong: str, check: str) -> None:
    text = file.read_text("utf-8")
    assert text.count(right) == 1
    faulty = tmp_path / "faulty.html"
    faulty.write_text(text.replace(right, wrong), "utf-8")
    page = browser.new_page()
    page.goto(faulty.as_uri())
    result = page.evaluate("refmamba.ready.then(() => refmamba.verify({ schemes: [] }))")
    page.close()
    assert not result["ok"]
    assert next(row["check"] for row in result["rows"] if row["failed"]) == check


CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("fp32", PROMPT, {}),
    ("w8-all", PROMPT, {}),
    ("w3-mlp", "The old man", {}),
    ("w8a8-all", "She said", {}),
    ("w4a16-mlp", "", {}),
    ("int8", "L'été, 'sé naïve\u0085\ufeff don't 12 ½", {}),
    ("int8-static", "<|endoftext|>A king", {}),
    ("int4", "The old man", {}),
    ("int4-all", "The old man", {}),
    ("int8-hadamard", "The old man", {}),
    ("llm-int8", "The old man", {}),
    ("flatten-int8", "The old man", {}),
    ("int8-smooth", "A king \U0001f451", {}),
    ("int8", PROMPT, {"temperature": 0.8, "seed": 7}),
    ("w4-all", PROMPT, {"temperature": 1.5, "seed": 2**70 + 5}),
    ("fp32", PROMPT, {"temperature": 0.9, "seed": 3, "top_k": 40, "top_p": 0.9}),
]


@pytest.mark.parametrize(("scheme", "prompt", "sampling"), CASES)
def test_generation_is_the_command_lines(page: Any, scheme: str, prompt: str, sampling: dict[str, Any]) -> None:
    expected = model(scheme).generate(prompt, max_new_tokens=12, **sampling)
    names = {"top_k": "topK", "top_p": "topP"}
    options = {names.get(name, name): str(v) if name == "seed" else v for name, v in sampling.items()}
    result = page.evaluate(
        "options => refmamba.generate(options)", {"prompt": prompt, "scheme": scheme, "maxNewTokens": 12} | options
    )
    assert result == {"tokens": expected.tokens, "text": expected.text, "logits_sha256": expected.logits_sha256}


def test_every_scheme_writes_what_the_command_line_writes(page: Any) -> None:
    options = page.locator("#scheme option").all_inner_texts()
    assert tuple(options) == PAGE_SCHEMES
    for scheme in PAGE_SCHEMES[::9]:
        expected = model(scheme).generate("A king", max_new_tokens=3)
        result = page.evaluate(f"refmamba.generate({{ prompt: 'A king', scheme: '{scheme}', maxNewTokens: 3 }})")
        assert (scheme, result["logits_sha256"]) == (scheme, expected.logits_sha256)


def test_the_hash_on_the_page_is_the_command_lines(page: Any) -> None:
    page.locator("#scheme").select_option("int8")
    page.locator("#prompt").fill("She said 'no'")
    page.locator("#count").fill("9")
    changes(page, "#hash", page.locator("#generate").click)
    command = page.locator("#command").inner_text()
    assert command == ("refmamba generate 'She said '\\''no'\\''' --model small --scheme int8 --max-new-tokens 9 --json")
    done = subprocess.run(
        command.replace("refmamba", f"{sys.executable} -m refmamba", 1), shell=True, check=True, capture_output=True
    )
    assert page.locator("#hash").inner_text() == json.loads(done.stdout)["logits_sha256"]
    page.locator("#prompt").fill(PROMPT)


def texts() -> list[str]:
    """Texts with what byte-level tokenizers stumble over, the same at every run."""
    dice = random.Random(0)
    pieces = [
        "'s", "'sé", "'s²", "'re_", "'ll", "don't", " ", "  ", "\n", "\n\n", "\t", "\r\n", "\u0085", "\ufeff", "\u00a0",
        "\u2028", "\u3000", "\u200b", "é", "e\u0301", "Ⅷ", "½", "²", "١", "漢字", "한", "🙂",
        "👩‍👩‍👧", "<|endoftext|>", "<|endoftext", "_", "A", "king", "12", "?!",
    ]  # fmt: skip
    return ["".join(dice.choice(pieces) for _ in range(dice.randint(1, 12))) for _ in range(400)]


def test_the_tokenizer_is_the_librarys(page: Any) -> None:
    tokens = page.evaluate("texts => Promise.all(texts.map(refmamba.encode))", texts())
    tokenizer = model("int8").tokenizer
    for text, ids in zip(texts(), tokens, strict=True):
        assert (text, ids) == (text, tokenizer.encode(text))


def test_half_a_character_is_refused(page: Any) -> None:
    assert page.evaluate(r"refmamba.encode('a\ud83d').catch(error => error.message)") == (
        "the text has half of a character; give valid text"
    )


# ------------------------------------------------------------------------------------------- the numbers that it shows


@pytest.mark.parametrize(
    "scheme", ["int8", "w8a4-all", "int8-smooth", "fp32", "int4-all", "int8-hadamard", "llm-int8", "flatten-int8"]
)
def test_numbers_are_the_references_trace(page: Any, scheme: str) -> None:
    small = open_model(ModelChoice("small"))
    follower = follow(small, parse_scheme(scheme), small.tokenizer.encode_array(PROMPT))
    trace, dice = follower.trace, np.random.default_rng(1)
    for site in trace.sites:
        if site.endswith("_state") or not site.startswith(("layers.2.", "embedding", "norm_f", "lm_head")):
            continue
        array = getattr(trace[site], "q", trace[site])
        token, channel = int(dice.integers(array.shape[0])), int(dice.integers(array.shape[1]))
        layer = {"layer": 2, "op": site.removeprefix("layers.2.")} if site.startswith("layers") else {"op": site}
        go(page, **layer, token=token, channel=channel, scheme=scheme)
        playwright.expect(page.locator("#number h4").first).to_have_text("Result")
        name = "code" if hasattr(trace[site], "q") else "sum" if ".acc" in site else "value"
        shown, expected = value(fact(page, name)), array[token, channel]
        assert np.float64(shown).astype(array.dtype) == expected, (site, token, channel)
        element = follower.at(site, token, channel)  # the terminal's, which shares no code with the page
        if ".acc" not in site:
            assert value(fact(page, "added by this operation")) == pytest.approx(element.added, rel=1e-5, abs=1e-12), site
        if element.so_far is not None:
            assert value(fact(page, "error so far")) == pytest.approx(element.so_far, rel=1e-5, abs=1e-12), site


def test_a_code_shows_its_bits_its_rounding_and_its_error(page: Any) -> None:
    step = model("int8").trace(PROMPT).step("layers.4.out_proj.in_codes")
    x, codes = step.arguments[0], step.result
    assert isinstance(codes, Codes)
    go(page, layer=4, op="out_proj.in_codes", token=1, channel=33, scheme="int8")
    scale, code = codes.scale[1, 0], int(codes.q[1, 33])
    assert page.locator("#number .bitrow").inner_text().split() == list(f"{code & 255:08b}")
    assert np.float32(value(fact(page, "before"))) == x[1, 33] * scale
    assert value(fact(page, "after")) == code
    assert value(fact(page, "added by this operation")) == pytest.approx(code / float(scale) - float(x[1, 33]), rel=1e-7)
    widest = int(np.argmax(np.abs(x[1])))
    assert fact(page, "the scale is taken by").startswith(f"token 1, channel {widest}: ")


def test_the_accumulator_shows_its_products(page: Any) -> None:
    step = model("int8").trace(PROMPT).step("layers.1.x_proj.acc")
    x, w = step.arguments
    products = x.q[3].astype(int) * w.q[10].astype(int)
    go(page, layer=1, op="x_proj.acc", token=3, channel=10, scheme="int8")
    rows = [[value(cell) for cell in row.split("\t")] for row in page.locator("#number tbody tr").all_inner_texts()]
    largest = sorted(np.abs(products), reverse=True)[:8]
    assert [abs(row[3]) for row in rows] == largest
    for channel, q, p, product, until in rows:
        k = int(channel)
        assert (q, p, product, until) == (x.q[3, k], w.q[10, k], products[k], products[: k + 1].sum())


def test_the_scan_shows_its_states(page: Any) -> None:
    trace = model("int8").trace(PROMPT)
    u, delta, A, B, _, _, h = trace.step("layers.5.scan").arguments
    state = h[77].astype(np.float64)
    for t in range(4):  # float64: the page shows four digits
        state = np.exp(np.float64(delta[t, 77]) * A[77]) * state + np.float64(delta[t, 77]) * u[t, 77] * B[t]
    go(page, layer=5, op="scan", token=3, channel=77, scheme="int8")
    rows = [row.split("\t") for row in page.locator("#number tbody tr").all_inner_texts()]
    assert [float(row[4]) for row in rows] == pytest.approx(state.tolist(), rel=1e-3)


# ------------------------------------------------------------------------------------------ what clicks and keys change


def test_keys_step_to_the_next_operation_layer_token_and_channel(page: Any) -> None:
    go(page, layer=3, op="in_proj.in_codes", token=1, channel=7, scheme="int8")
    page.locator("#number").focus()
    for key, heading in [
        ("ArrowRight", "layers.3.in_proj.acc [token 1, channel 7]"),
        ("ArrowRight", "layers.3.in_proj.result [token 1, channel 7]"),
        ("ArrowDown", "layers.4.in_proj.result [token 1, channel 7]"),
        ("ArrowUp", "layers.3.in_proj.result [token 1, channel 7]"),
        ("]", "layers.3.in_proj.result [token 2, channel 7]"),
        ("[", "layers.3.in_proj.result [token 1, channel 7]"),
        (".", "layers.3.in_proj.result [token 1, channel 8]"),
        (",", "layers.3.in_proj.result [token 1, channel 7]"),
        ("ArrowLeft", "layers.3.in_proj.acc [token 1, channel 7]"),
    ]:
        page.keyboard.press(key)
        expect_heading(page, heading)
    assert "layer=3&op=in_proj.acc&token=1&channel=7" in page.url


def test_a_number_is_followed_back_to_the_embedding_by_clicks(page: Any) -> None:
    go(page, layer=1, op="u", token=2, channel=5, scheme="int8")
    for _ in range(40):
        heading = page.locator("#number h3").inner_text()
        if heading.startswith("embedding"):
            return
        changes(page, "#number h3", page.locator("#number h4:text('Read from') + p button").first.click)
    pytest.fail("the embedding was not reached")


def test_the_strip_and_the_tokens_choose_what_is_followed(page: Any) -> None:
    go(page, layer=0, op="norm", token=0, channel=0, scheme="int8")
    changes(page, "#number h3", lambda: page.locator("#number canvas").click(position={"x": 300, "y": 1}))
    assert re.search(r"\[token 0, channel (?!0\b)\d+\]", page.locator("#number h3").inner_text())
    changes(page, "#number h3", page.locator("#tokens button").nth(2).click)
    assert "token 2" in page.locator("#number h3").inner_text()


def test_a_tile_of_the_state_shows_its_sum(page: Any) -> None:
    page.locator("#state-layer").fill("2")
    changes(page, "#state-word", lambda: page.locator("#state-token").fill("2"))
    page.locator("#tiles").hover(position={"x": 200, "y": 40})
    page.wait_for_timeout(500)
    channel, state = map(int, re.findall(r"Channel (\d+), state (\d+)", page.locator("#tile").inner_text())[0])
    assert channel > 0
    page.locator("#tiles").focus()
    page.keyboard.press("ArrowRight")
    channel += 1
    playwright.expect(page.locator("#tile")).to_contain_text(f"Channel {channel}, state {state}")
    changes(page, "#number h3", page.locator("#tile button").click)
    expect_heading(page, f"layers.2.scan [token 2, channel {channel}]")
    shown = page.locator("#number tbody tr").nth(state).inner_text().split("\t")
    assert float(shown[4]) == pytest.approx(float(shown[1]) * float(shown[2]) + float(shown[3]), rel=1e-2, abs=1e-9)


def error_of(words: str) -> float:
    return float(re.findall(r"[Rr]elative error[^:\d]*:? ?([\d.]+) %", words)[0])


def test_bits_and_scales_change_the_codes_and_the_paragraph(page: Any) -> None:
    words = page.locator("#histogram-words")
    page.locator("#bits-scale").select_option("per_tensor")
    changes(page, "#histogram-words", lambda: page.locator("#bits-bits").fill("4"))
    assert "of 15 codes are used" in words.inner_text()
    assert page.locator("#histogram rect").count() == 15
    whole = error_of(words.inner_text())
    changes(page, "#histogram-words", lambda: page.locator("#bits-scale").select_option("per_row"))
    rows = error_of(words.inner_text())
    changes(page, "#histogram-words", lambda: page.locator("#bits-scale").select_option("groups"))
    assert whole > rows > error_of(words.inner_text())
    page.locator("#bits-scale").select_option("per_tensor")
    playwright.expect(page.locator("#paragraph-words")).to_contain_text("bits a byte")
    page.locator("#bits-bits").fill("2")
    playwright.expect(page.locator("#paragraph-words")).to_contain_text("in 2 bits")
    coded, plain = map(float, re.findall(r"\d+\.\d+", page.locator("#paragraph-words").inner_text()))
    assert coded > plain + 0.5


def test_an_outlier_ruins_codes_and_each_remedy_brings_them_back(page: Any) -> None:
    words = page.locator("#outlier-words")
    changes(page, "#outlier-words", lambda: page.locator("#outlier-power").fill("8"))
    ruined = error_of(words.inner_text())
    assert ruined > 50
    for remedy in ("smooth", "hadamard"):
        changes(page, "#outlier-words", page.locator(f"[name=remedy][value={remedy}]").check)
        assert error_of(words.inner_text()) < ruined / 2
    changes(page, "#outlier-words", page.locator("[name=remedy][value=per_token]").check)
    assert error_of(words.inner_text()) < ruined
    page.locator("[name=remedy][value=none]").check()


def test_two_schemes_part_where_the_reference_does(page: Any) -> None:
    a, b = model("int8").trace(PROMPT), model("int8-static").trace(PROMPT)
    first = next(site for site in a.sites if not np.array_equal(getattr(a[site], "q", a[site]), getattr(b[site], "q", b[site])))
    page.locator("#two-a").select_option("int8")
    page.locator("#two-b").select_option("int8-static")
    page.locator("#two-run").click()
    playwright.expect(page.locator("#two-words")).to_contain_text("They part at")
    assert page.locator("#two-words").inner_text().startswith(f"They part at {first} (")
    assert page.locator("#two-table tr.first").inner_text().split("\t")[0] == first


def test_a_flipped_bit_breaks_the_hash_or_is_rounded_away(page: Any) -> None:
    page.locator("#scheme").select_option("int8")
    page.locator("#flip-name").select_option("layers.3.x_proj.weight")
    for name, index in (("row", "4"), ("column", "9")):
        page.locator(f"#flip-{name}").fill(index)
        page.locator(f"#flip-{name}").press("Enter")
    weight = open_model(ModelChoice("small")).float_checkpoint().read("layers.3.x_proj.weight")[4, 9]
    playwright.expect(page.locator("#flip-words")).to_have_text(f"The weight is {weight!s}.")
    bits = page.locator("#flip-bits button")
    bits.nth(15).click()
    playwright.expect(page.locator("#flip-words")).to_contain_text("no bit of any value differs")
    bits.nth(0).click()
    playwright.expect(page.locator("#flip-words")).to_contain_text("the first other bits are in layers.3.x_proj.acc [token")


def test_what_the_reader_predicts_is_answered(page: Any) -> None:
    go(page, layer=0, op="out_proj.in_codes", token=1, channel=7, scheme="int8")
    code = int(value(fact(page, "code")))
    page.locator("#predict").check()
    playwright.expect(page.locator("#question")).to_be_visible()
    assert page.locator("#number dt").count() == 0  # the answer is not shown yet
    page.locator("#question input").fill(str(code))
    page.locator("#question button").click()
    playwright.expect(page.locator("#question .right")).to_be_visible()
    assert value(fact(page, "code")) == code
    go(page, layer=0, op="out_proj.acc", token=1, channel=7, scheme="int8")
    page.locator("#question button").first.click()
    playwright.expect(page.locator("#question")).to_contain_text("the sum is")
    assert re.fullmatch(r"You predicted [12] of 2 rightly\.", page.locator("#score").inner_text())
    page.locator("#predict").uncheck()


# ---------------------------------------------------------------------------------------- models that it cannot run


def folder(to: Path, config: MambaConfig, tokenizer: dict[str, Any]) -> Path:
    """A model of random float16 weights."""
    source = RandomSource(config)
    tensors = {
        name: source.read(name).astype(np.float16).reshape(file_shape(name, shape)) for name, shape in config.shapes().items()
    }
    to.mkdir()
    save_file(tensors, to / "model.safetensors")
    sizes = {"hidden_size": config.d_model, "num_hidden_layers": config.n_layer, "vocab_size": config.vocab_size}
    (to / "config.json").write_text(json.dumps({"model_type": "mamba"} | sizes), "utf-8")
    (to / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    return to


def small_tokenizer() -> dict[str, Any]:
    tokenizer: dict[str, Any] = json.loads(open_model(ModelChoice("small")).files.tokenizer.read_text("utf-8"))
    return tokenizer


def step_command(*arguments: str | Path) -> str:
    """stderr of `refmamba step`."""
    done = subprocess.run([sys.executable, "-m", "refmamba", "step", *arguments], check=True, capture_output=True, text=True)
    return done.stderr


def test_of_a_large_model_the_page_holds_the_recorded_prompt(browser: Any, tmp_path: Path) -> None:
    large = folder(tmp_path / "large", MambaConfig(d_model=1600, n_layer=1, vocab_size=4096), small_tokenizer())
    file = tmp_path / "page.html"
    said = step_command("--model", large, "--scheme", "int8-smooth", "--html", file, PROMPT)
    assert "holds the recorded prompt" in said
    assert "more than the 40 MB that a page may hold" in said
    page = opened(browser, file)
    assert not page.locator("#generate").is_visible()
    assert page.locator("#scheme").input_value() == "int8-smooth"
    trace = refmamba.load(large, scheme="int8-smooth", backend="reference").trace(PROMPT)
    for site in trace.sites:
        if not site.endswith("_state"):
            array = getattr(trace[site], "q", trace[site])
            go(page, **({"layer": 0, "op": site[9:]} if site.startswith("layers.0.") else {"op": site}), token=3, channel=41)
            name = "code" if hasattr(trace[site], "q") else "sum" if ".acc" in site else "value"
            assert np.float64(value(fact(page, name))).astype(array.dtype) == array[3, 41], site
    assert page.evaluate("refmamba.verify()")["ok"]
    assert page.complaints == []
    page.close()


def test_a_tokenizer_that_the_page_does_not_have_is_named(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    tokenizer["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    other = folder(tmp_path / "other", MambaConfig(d_model=32, n_layer=1, vocab_size=4096), tokenizer)
    said = step_command("--model", other, "--scheme", "fp32", "--html", tmp_path / "page.html")
    assert "its tokenizer is not of the kind that the page has" in said


# ---------------------------------------------------------------------------------------------- for every reader


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 768, 360])
def test_nothing_is_cut_off_and_nothing_serious_is_inaccessible(browser: Any, file: Path, width: int, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install 'refmamba[test]'")
    options = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
    page = opened(browser, file, "#layer=1&op=in_proj.acc&token=2&channel=3&scheme=int8", **options)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    found = axe.Axe().run(page).response["violations"]
    assert [(v["id"], [node["html"] for node in v["nodes"]]) for v in found if v["impact"] in ("serious", "critical")] == []
    assert page.complaints == []
    page.close()


def test_an_address_opens_a_number(browser: Any, file: Path) -> None:
    page = opened(browser, file, "#layer=6&op=dt_proj.in_codes&token=3&channel=11&scheme=w8-all")
    expect_heading(page, "layers.6.dt_proj.in_codes [token 3, channel 11]")
    assert page.locator("#scheme").input_value() == "w8-all"
    playwright.expect(page.locator("#number")).to_be_in_viewport()
    page.close()


def test_an_address_opens_a_part(browser: Any, file: Path) -> None:
    page = opened(browser, file, "#outlier")
    playwright.expect(page.locator("#outlier h2")).to_be_in_viewport()
    page.close()


def test_every_control_is_reached_by_tab_alone(browser: Any, file: Path) -> None:
    page = opened(browser, file)
    reached = set()
    for _ in range(120):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
    controls = page.evaluate(
        "[...document.querySelectorAll('main [id]:is(input, select, button, textarea, canvas, [tabindex])')].map(e => e.id)"
    )
    assert [name for name in controls if name not in reached] == []
    page.close()


def test_the_page_is_one_file_of_a_size_to_pass_on(file: Path) -> None:
    text = file.read_text("utf-8")
    assert file.stat().st_size < MOST_BYTES
    assert text.isascii()  # a browser decodes it at once, and twice as fast
    assert not re.search(r"\\U000", text)  # which JavaScript does not have
    assert re.findall(r"(?:src|href)=\"(?!#|data:)[^\"]*", text) == []
