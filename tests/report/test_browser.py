"""The page in a real Chromium: it runs under its content policy, and sorts, filters, searches, unfolds and links."""

import json
from pathlib import Path

import numpy as np
import pytest

from ches_jax.data.sources import Record
from ches_jax.report import report
from ches_jax.scores.parts import TOKEN_SCHEMA, TOKENS
from ches_jax.scores.table import write_part
from tests.report.test_page import EVIL, columns

CHROMIUM = Path("/usr/bin/chromium")
PAIRS = 500
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is not there"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("run")
    more = {
        "category": [("harm", "help", EVIL[:40])[i % 3] for i in range(PAIRS)],
        "head_score": np.linspace(-9, 90, PAIRS),
    }
    write_part(folder / "scores.parquet", columns(PAIRS, **more), {})
    tokens = {
        "row_id": ["r499"] * 3,
        "index": [499] * 3,
        "response": ["chosen", "chosen", "rejected"],
        "position": [0, 1, 0],
        "token": [1, 2, 3],
        "text": ["fine", "<b>", "no"],
        "ches": [1.0, 0.0, -2.0],
        "head_score": [5.0, 0.0, -10.0],
        "nthr": [0.0] * 3,
        "logp": [-1.0] * 3,
        "chosen_candidate": [None] * 3,
        "rejected_candidate": [None] * 3,
    }
    pq.write_table(pa.table(tokens, schema=TOKEN_SCHEMA), folder / TOKENS)
    texts = [
        EVIL if i == 7 else "\u202eabc" * 300 if i == 8 else "w" * 900 if i == 9 else f"text {i}" for i in range(PAIRS)
    ]
    rows = [Record(i, f"r{i}", "", {"prompt": f"ask {i}", "chosen": t, "rejected": "no"}) for i, t in enumerate(texts)]
    return report(folder, rows=rows)


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, run):
    """Opens the page; at the end no script failed, no policy was broken, nothing was asked of the network."""
    faults: list[str] = []
    contexts = []

    def opened(fragment="", file=run, **options):
        context = browser.new_context(**{"viewport": {"width": 1400, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: faults.append(dialog.message))
        page.on("request", lambda request: faults.append(request.url) if not request.url.startswith("file:") else None)
        page.goto(file.as_uri() + fragment)
        page.wait_for_selector("html[data-ready]", state="attached")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert faults == []


def rows(page):
    """The row numbers that the table shows, from the top."""
    return [int(text) for text in page.locator("tr.pair td:nth-child(2)").all_inner_texts()]


def count(page):
    return int(page.locator("#count").inner_text().split()[0])


def test_the_table_begins_with_the_pairs_most_at_risk_and_sorts_by_any_column(opened):
    page = opened()
    assert rows(page)[:3] == [499, 498, 497] and count(page) == PAIRS
    header = page.locator("thead th", has_text="head score")
    assert header.get_attribute("aria-sort") == "descending"
    header.locator("button").click()
    assert header.get_attribute("aria-sort") == "ascending" and rows(page)[:3] == [0, 1, 2]
    page.locator("thead th", has_text="row").locator("button").first.click()
    assert rows(page)[:3] == [0, 1, 2] and header.get_attribute("aria-sort") == "none"
    wanted = np.argsort(-columns(PAIRS)["ches"], kind="stable")
    page.select_option("#sort", "ches")
    assert rows(page)[:3] == wanted[:3].tolist()


def test_only_the_rows_in_sight_are_elements_and_scrolling_reaches_the_last(opened):
    page = opened()
    assert len(rows(page)) < 80
    page.evaluate("() => { const box = document.querySelector('.box'); box.scrollTop = box.scrollHeight; }")
    page.wait_for_function(
        "() => document.querySelector('tr.pair:nth-last-child(2) td:nth-child(2)').textContent == '0'"
    )
    assert page.locator("table[aria-rowcount]").get_attribute("aria-rowcount") == str(PAIRS + 1)


def test_search_and_filter_meet_and_live_in_the_address(opened):
    page = opened()
    page.select_option("select[data-filter=category]", "help")
    assert count(page) == 167
    page.fill("#query", "TEXT 49")
    wanted = [i for i in range(PAIRS) if i % 3 == 1 and "49" in str(i) and i > 9]
    assert sorted(rows(page)) == wanted and count(page) == len(wanted)
    address = page.evaluate("location.hash")
    assert "category=help" in address and "q=TEXT%2049" in address
    again = opened(address)
    assert sorted(rows(again)) == wanted and again.input_value("#query") == "TEXT 49"
    again.get_by_role("button", name="show all").click()
    assert count(again) == PAIRS and again.evaluate("location.hash") == ""


def test_bounds_of_a_number_are_a_filter_of_the_address(opened):
    page = opened("#min.head_score=80&max.head_score=85")
    wanted = [i for i, v in enumerate(np.linspace(-9, 90, PAIRS)) if 80 <= v <= 85]
    assert sorted(rows(page)) == wanted


def test_a_link_to_a_pair_unfolds_it_with_its_texts_inert(opened):
    page = opened("#row-7")
    detail = page.locator("tr.detail")
    assert detail.count() == 1
    text = detail.locator(".text").nth(1).inner_text()
    assert "<script>alert('x')</script>" in text and "\x00" not in text
    assert page.locator("tr.detail script, tr.detail img").count() == 0
    assert page.evaluate("document.activeElement.getAttribute('aria-expanded')") == "true"
    page.keyboard.press("Enter")
    assert page.locator("tr.detail").count() == 0


def test_the_keyboard_goes_from_pair_to_pair(opened):
    page = opened()
    page.locator("tr.pair button").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.locator("tr.pair.open td:nth-child(2)").inner_text() == "498"
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.closest('tr').id") == "row-499"


def test_tokens_are_coloured_and_tell_their_number_to_a_tap_and_to_the_keyboard(opened):
    page = opened("#row-499")
    page.wait_for_selector(".tokens span")
    tokens = page.locator(".tokens span")
    assert tokens.all_inner_texts() == ["fine", "<b>", "no"]
    tokens.first.click()
    line = page.locator("tr.detail output")
    assert "+5 (head_score)" in line.inner_text() and "raises the risk" in line.inner_text()
    page.keyboard.press("ArrowRight")
    assert "“<b>”: 0" in line.inner_text()
    colours = [page.evaluate("e => e.style.backgroundColor", t.element_handle()) for t in tokens.all()]
    assert colours[0].startswith("rgba(215, 48, 39, 0.37") and colours[2].startswith("rgba(69, 117, 180, 0.75")
    assert "down" in tokens.nth(2).get_attribute("class")
    assert "raises the risk" in page.locator(".key.red").inner_text()


def test_a_point_tells_its_pair_and_a_click_goes_to_it(opened):
    page = opened()
    plot = page.locator("figure.points canvas").first
    plot.scroll_into_view_if_needed()
    page.wait_for_timeout(300)
    plot.focus()
    page.keyboard.press("ArrowRight")
    tip = page.locator("#tip")
    assert tip.is_visible() and tip.inner_text().startswith("pair ")
    wanted = tip.inner_text().split()[1]
    page.keyboard.press("Enter")
    assert page.locator("tr.pair.open").get_attribute("id") == f"row-{wanted}" and not tip.is_visible()


def test_the_threshold_writes_the_command_and_filters_the_table(opened):
    page = opened()
    page.locator("input[type=range]").fill("500")
    code = page.locator("figure[data-threshold] code").inner_text()
    words = code.split()
    bound = float(words[words.index("--keep") + 1].removeprefix("below:"))
    above = int((np.linspace(-9, 90, PAIRS).astype(np.float32) >= bound).sum())
    assert f"{above} of {PAIRS} pairs" in page.locator("figure[data-threshold] output").inner_text()
    page.locator("button.look").click()
    assert count(page) == above


def test_figures_are_saved_as_vectors_that_stand_alone(opened, tmp_path):
    from xml.etree import ElementTree

    page = opened()
    for figure in page.locator("figure").all():
        figure.scroll_into_view_if_needed()
        with page.expect_download() as download:
            figure.locator("button.save").click()
        path = tmp_path / download.value.suggested_filename
        download.value.save_as(path)
        root = ElementTree.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and "class=" not in path.read_text(encoding="utf-8")


def test_the_saved_table_has_the_rows_and_the_numbers_of_the_view(opened, tmp_path):
    import csv

    page = opened("#category=harm")
    with page.expect_download() as download:
        page.get_by_role("button", name="save as CSV").click()
    download.value.save_as(tmp_path / "rows.csv")
    with open(tmp_path / "rows.csv", newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert [int(row["index"]) for row in found] == [i for i in range(PAIRS - 1, -1, -1) if i % 3 == 0]
    np.testing.assert_allclose(
        [float(r["ches"]) for r in found], [columns(PAIRS)["ches"][int(r["index"])] for r in found], rtol=1e-6
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 400])
def test_no_page_is_wider_than_the_screen_and_contrast_is_enough(opened, width, scheme):
    page = opened("#row-9", viewport={"width": width, "height": 900}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    names = ("--ink", "--soft", "--link", "--chosen", "--rejected", "--third", "--fourth", "--fifth", "--sixth")
    for name in names:
        assert page.evaluate(CONTRAST, [name, "--page"]) >= 4.5, (scheme, name)
    assert page.evaluate(CONTRAST, ["--soft", "--panel"]) >= 4.5


CONTRAST = """([ink, paper]) => {
  const probe = document.createElement('i');
  document.body.append(probe);
  const light = (name) => {
    probe.style.color = `var(${name})`;
    const parts = getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255);
    const linear = parts.map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const [a, b] = [light(ink), light(paper)].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
}"""
"""The ratio of contrast of two colours of the style sheet, by WCAG."""


def test_the_theme_is_switched_by_hand(opened):
    page = opened(color_scheme="light")
    shade = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(shade)
    page.locator("#theme").click()
    assert page.evaluate(shade) == light
    page.locator("#theme").click()
    assert page.evaluate(shade) != light and "dark" in page.locator("#theme").inner_text()


def test_print_unfolds_everything(opened):
    page = opened()
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0 and len(rows(page)) == 100
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() > 0


def test_every_control_has_a_name_and_every_figure_words(opened):
    page = opened()
    unnamed = page.evaluate("""() => [...document.querySelectorAll('button, input, select, canvas')].filter((e) =>
        !(e.textContent.trim() || e.getAttribute('aria-label') || e.closest('label'))).map((e) => e.outerHTML)""")
    assert unnamed == []
    words = page.evaluate("""() => [...document.querySelectorAll('figure svg, figure canvas')].map((e) =>
        [e.getAttribute('aria-label') || '', e.getAttribute('aria-hidden')])""")
    assert all(len(label) > 20 or hidden == "true" for label, hidden in words)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert json.loads(page.evaluate("document.getElementById('page-data').textContent"))["rows"] == PAIRS


def test_many_points_are_drawn_as_pixels_that_let_through_what_lies_under_them(opened, tmp_path):
    write_part(tmp_path / "scores.parquet", columns(6000), {})
    texts = [Record(i, f"r{i}", "", {"prompt": "ask", "chosen": f"text {i}", "rejected": "no"}) for i in range(6000)]
    page = opened(file=report(tmp_path, rows=texts))
    page.locator("figure.points canvas").first.scroll_into_view_if_needed()
    page.wait_for_timeout(500)
    painted = """() => { const canvas = document.querySelector('figure.points canvas');
        const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        return [...new Set(data.filter((_, i) => i % 4 == 3))]; }"""
    opacities = page.evaluate(painted)
    assert 0 in opacities and len(opacities) > 2 and max(opacities) > 150
    page.fill("#query", "text 59")
    assert count(page) == sum("59" in str(i) for i in range(6000))
    assert page.locator("tr.pair td:last-child").first.inner_text() == "no"
