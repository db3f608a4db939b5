"""How fast a page of many pairs opens and answers in a real Chromium; writes ``results/report_page.json``.

    python -m experiments.benchmarks.report_page [--pairs 100000] [--chromium /usr/bin/chromium]

The pairs are made: heavy-tailed scores, categories, texts of natural lengths. Each reaction is measured in the page,
from the event to the frame after it is drawn, by the clock and by the processor time of the page's main thread; the
second says what the page costs where other programs share the machine.
"""

import argparse
import importlib
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from ches_jax.data.sources import Record
from ches_jax.report.page import report
from ches_jax.scores.table import write_part
from experiments.benchmarks.measure import keep, usage

WORDS = ["the", "hot", "word", "some", "answer", "question", "of", "perhaps", "harm", "recipe", "never", "because"]
DRAWN = "await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));"
"""Until the frame after next: what was requested is on the screen by then."""
REACTIONS = {
    "search": "const box = document.querySelector('#query'); box.value = 'word hot %d'; "
    "box.dispatchEvent(new Event('input'));",
    "filter": "const one = document.querySelector('select[data-filter]'); one.selectedIndex = 1 + %d; "
    "one.dispatchEvent(new Event('change'));",
    "sort": "document.querySelectorAll('.box thead th button')[%d + 1].click();",
    "show all": "const all = [...document.querySelectorAll('#table-controls button')]; "
    "all.find((b) => b.textContent == 'show all').click(); %d;",
    "scroll": "document.querySelector('.box').scrollTop = 200000 * (1 + %d);",
    "unfold": "document.querySelectorAll('tr.pair button')[%d].click();",
}
"""What a reader does, by name; the number differs from turn to turn."""
TURNS = 5


def made_run(folder: Path, pairs: int) -> list[Record]:
    """A score run of made pairs; returns its rows."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(3.6, 0.7, (2, pairs)), 2, 600).astype(int)
    head = -np.exp(rng.normal(8, 1.2, pairs))
    columns = {
        "row_id": [f"{i:032x}" for i in range(pairs)],
        "index": np.arange(pairs),
        "ches": -(head**2) / 1e3,
        "ln_ches": rng.standard_t(2, pairs) * 50,
        "head_score": head,
        "cosine": rng.uniform(0, 1, pairs),
        "edit_distance": rng.uniform(0, 1, pairs),
        "chosen_tokens": lengths[0],
        "rejected_tokens": lengths[1],
        "prompt_tokens": lengths[0] + 20,
        "logp_chosen": -2.0 * lengths[0],
        "logp_rejected": -2.1 * lengths[1],
        "flags": [["truncated_chosen"] if i % 97 == 0 else [] for i in range(pairs)],
        "category": [("help", "harm", "code", "chat")[i % 4] for i in range(pairs)],
    }
    write_part(folder / "scores.parquet", columns, {"verb": "score", "model": "made"})
    picks = rng.integers(0, len(WORDS), 4096)
    text = " ".join(WORDS[i] for i in picks)
    starts = rng.integers(0, len(text) - 3200, (3, pairs))

    def cut(side: int, i: int) -> str:
        return text[starts[side, i] : starts[side, i] + 5 * int(lengths[side % 2, i])]

    sides = {"prompt": 2, "chosen": 0, "rejected": 1}
    return [Record(i, f"{i:032x}", "", {name: cut(k, i) for name, k in sides.items()}) for i in range(pairs)]


def opened(browser: Any, page_file: Path) -> dict[str, tuple[float, float]]:
    """Milliseconds of one visit, by the clock and of the main thread.

    Until the table is there, then the slowest turn of each reaction.
    """
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    page = context.new_page()
    devtools = context.new_cdp_session(page)
    devtools.send("Performance.enable", {"timeDomain": "threadTicks"})

    def busy() -> float:
        metrics = {m["name"]: m["value"] for m in devtools.send("Performance.getMetrics")["metrics"]}
        return 1000 * metrics["TaskDuration"]

    page.goto(page_file.as_uri())
    page.wait_for_selector("html[data-ready]", state="attached", timeout=60_000)
    times = {"open": (page.evaluate("performance.getEntriesByName('ready')[0].startTime"), busy())}
    page.evaluate("document.querySelector('.box').scrollIntoView()")
    page.wait_for_timeout(1000)  # as long as a reader takes to find the box
    for name, script in REACTIONS.items():
        turns = []
        for turn in range(TURNS):
            act = f"const began = performance.now(); {script % (turn % 3)} {DRAWN} return performance.now() - began;"
            before = busy()
            clock = page.evaluate(f"async () => {{ {act} }}")
            turns.append((clock, busy() - before))
        times[name] = (max(clock for clock, _ in turns), max(thread for _, thread in turns))
    context.close()
    return times


def main() -> None:
    """Measure."""
    playwright: Any = importlib.import_module("playwright.sync_api")  # optional: pip install 'ches-jax[browser]'
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--visits", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = made_run(folder, args.pairs)
        began, cpu = time.perf_counter(), usage()["cpu_seconds"]
        page_file = report(folder, rows=rows)
        made = {"seconds": round(time.perf_counter() - began, 2), "cpu_seconds": round(usage()["cpu_seconds"] - cpu, 2)}
        size = page_file.stat().st_size
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=args.chromium, args=["--no-sandbox"])
            version = browser.version
            visits = [opened(browser, page_file) for _ in range(args.visits)]
            browser.close()
    best, middle = (
        {name: [round(how(v[name][k] for v in visits), 1) for k in (0, 1)] for name in visits[0]}
        for how in (min, statistics.median)
    )
    print(f"{args.pairs:,} pairs, {size / 1e6:.1f} MB, written in {made['seconds']} s; Chromium {version}")
    print(f"{'milliseconds':12} {'clock':>8} {'best':>8} {'thread':>8}")
    for name, (clock, thread) in middle.items():
        print(f"{name:12} {clock:8.0f} {best[name][0]:8.0f} {thread:8.0f}")
    measured = {
        "pairs": args.pairs,
        "bytes": size,
        "writing": made,
        "chromium": version,
        "visits": args.visits,
        "load": os.getloadavg()[0],
        "unit": "milliseconds [clock, main thread]",
        "median_visit": middle,
        "best_visit": best,
    }
    keep("report_page", measured)


if __name__ == "__main__":
    main()
