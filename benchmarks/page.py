"""The page's speed in a headless Chromium: `refmamba step --html page.html && python benchmarks/page.py page.html`.

Prints a table. Each time is the best of some openings or runs, each rate the best of some runs: on a shared machine the others
say more of the neighbours. Of the main thread there are two figures: the longest time without an answer to a message while
the page opens, and the longest task's time on the processor, which neighbours do not lengthen.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
CODED = ("int8", "int8-static", "int4", "int4-all", "llm-int8", "int8-hadamard", "w8-all", "w8a8-all")
LIMIT = 300_000  # milliseconds
# Messages to oneself, as fast as they are answered; and when the text was first longer than the prompt.
WATCH = """
window.watched = { gap: 0, first: null };
const channel = new MessageChannel();
let last = performance.now();
channel.port1.onmessage = () => {
  const now = performance.now(), text = document.getElementById("text");
  watched.gap = Math.max(watched.gap, now - last);
  last = now;
  if (watched.first === null && text?.childNodes.length > 1) watched.first = now;
  if (document.body?.dataset.ready !== "yes") setTimeout(() => channel.port2.postMessage(0));
};
channel.port2.postMessage(0);
"""


def opened(browser: Browser, file: Path) -> Page:
    """The page, once it has written its first text and drawn its numbers."""
    page = browser.new_page()
    page.add_init_script(WATCH)
    page.goto(file.resolve().as_uri(), wait_until="commit")
    page.wait_for_selector("body[data-ready=yes]", timeout=LIMIT)
    return page


def opening(browser: Browser, file: Path) -> dict[str, float]:
    """Milliseconds to the first paint and token, and of the longest gap, of one opening."""
    page = opened(browser, file)
    times: dict[str, float] = page.evaluate(
        "({ paint: performance.getEntriesByType('paint')[0].startTime, token: watched.first, gap: watched.gap })"
    )
    page.close()
    return times


def longest_task(browser: Browser, file: Path) -> float:
    """Milliseconds on the processor of the page's longest task while it opens, from Chromium's own trace."""
    page = browser.new_page()
    browser.start_tracing(page=page, categories=["toplevel", "devtools.timeline"])
    page.goto(file.resolve().as_uri(), wait_until="commit")
    page.wait_for_selector("body[data-ready=yes]", timeout=LIMIT)
    events: list[dict[str, Any]] = json.loads(browser.stop_tracing())["traceEvents"]
    page.close()
    threads = {(e["pid"], e["tid"]) for e in events if e["name"] == "ParseHTML" and "page.html" in json.dumps(e.get("args"))}
    tasks: list[float] = [
        e["tdur"] / 1000 for e in events if "RunTask" in e["name"] and "tdur" in e and (e["pid"], e["tid"]) in threads
    ]
    return max(tasks)


def generate(page: Page, scheme: str, tokens: int) -> dict[str, float]:
    """Tokens a second, and seconds from the call to the first token."""
    result: dict[str, float] = page.evaluate(
        """async ([scheme, maxNewTokens]) => {
            const started = performance.now();
            let first = null;
            const request = { prompt: "Once upon a time", scheme, maxNewTokens };
            const done = await ask("generate", request, () => { first = first ?? performance.now(); });
            return { rate: done.tokens_per_second, first: first - started };
        }""",
        [scheme, tokens],
    )
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="Written by refmamba step --html.")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        times = [opening(browser, options.file) for _ in range(options.rounds)]
        task = min(longest_task(browser, options.file) for _ in range(2))
        page = opened(browser, options.file)
        runs = {name: [generate(page, name, 100) for _ in range(options.rounds)] for name in (*CODED, "fp32")}
        # Three models are kept: each of these has to be quantized again.
        again = [{name: generate(page, name, 1)["first"] for name in CODED} for _ in range(options.rounds)]
        browser.close()
    rates = {name: max(run["rate"] for run in several) for name, several in runs.items()}
    switches = {name: min(each[name] for each in again) for name in CODED}
    slowest, longest = min(CODED, key=rates.__getitem__), max(switches, key=switches.__getitem__)
    print(f"| of {options.rounds} | best |\n| --- | ---: |")
    print(f"| first paint | {min(t['paint'] for t in times):.0f} ms |")
    print(f"| first token | {min(t['token'] for t in times):.0f} ms |")
    print(f"| main thread, longest gap at opening | {min(t['gap'] for t in times):.0f} ms |")
    print(f"| main thread, longest task on the processor | {task:.0f} ms |")
    print(f"| another scheme, to its first token | {min(switches.values()):.0f} to {switches[longest]:.0f} ms ({longest}) |")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.1f} tokens/s{' (the slowest of the coded)' if name == slowest else ''} |")


if __name__ == "__main__":
    main()
