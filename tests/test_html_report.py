"""The report is one file that a browser opens without a network: figures, sortable tables, light, dark, phone, paper."""

import os
import re
import shutil

import frames
import pandas as pd
import pytest
from plotly.offline import get_plotlyjs

from dms_lab.html_report import Cell, Details, Key, Page, Plot, Section, Table, content, render, tables, write
from dms_lab.plots import interactive

HOSTILE = '<script>document.title = "taken"</script>'
LOADING_MS = 30_000


def a_page(tmp_path):
    methods = [*frames.METHODS, (HOSTILE, "a=<b>&amp;", 4.0, 0.42)]
    points = frames.points(methods=methods)
    folder = tmp_path / "run"
    folder.mkdir()
    row = '{{"step": {0}, "retained_per_head": [[1.0, 0.5], [0.25, 0.1]]}}\n'
    (folder / "metrics.jsonl").write_text("".join(row.format(step) for step in (10, 20, 30)))
    plots = [
        Plot(f"against {budget}", f"accuracy against {budget}", interactive.accuracy(points, budget))
        for budget in ("kv_reads", "peak_tokens")
    ]
    plots.append(Plot("margins", "margins", interactive.margins(frames.margins(methods=methods))))
    unknown = [Cell("untold"), Cell("")]
    numbers = Table(
        "Numbers",
        ["name", "value"],
        [
            [Cell("b9", "b9"), Cell("9.0", 9.0)],
            unknown,
            [Cell("b10", "b10"), Cell("-1.5", -1.5)],
            [Cell("c", "c"), Cell("-20.0", -20.0)],
            [Cell("a", "a"), Cell("10.0", 10.0)],
        ],
        frozenset({"value"}),
    )
    sections = [
        Section("Curves", [f"About {HOSTILE}"], content.keys_of(points), plots, [tables.points_table(points), numbers]),
        Section("Maps", plots=[Plot("kept", "kept", interactive.retention(folder))]),
        Section("Texts", details=[Details("sweep.yaml", f"parts: {HOSTILE}\n</pre></details>")]),
    ]
    return Page("A report", f"Is {HOSTILE} text?", [f"{HOSTILE} is off its target"], sections, f"python -m x '{HOSTILE}'")


# -- the file ------------------------------------------------------------------------------------------------------------
def test_the_page_is_one_file_that_names_nothing_to_load(tmp_path):
    text = render(a_page(tmp_path))
    assert text.count(get_plotlyjs()) == 1
    own = text.replace(get_plotlyjs(), "")
    own = re.sub(r'<script type="application/json" id="figures">.*?</script>', "", own, flags=re.DOTALL)
    assert len(own) < 150_000
    assert not re.search(r"(?:src|href|action|poster|srcset)\s*=\s*[\"']?(?!#|data:,|[\"'])", own)
    assert "url(" not in own
    assert "@import" not in own


def test_what_results_say_stays_text_and_figures_cannot_end_their_script(tmp_path):
    text = render(a_page(tmp_path))
    assert HOSTILE not in text
    assert "&lt;script&gt;document.title" in text
    data = re.search(r'id="figures">(.*?)</script>', text, re.DOTALL)[1]
    assert "<" not in data
    assert "\\u0026lt;script\\u0026gt;" in data


def test_a_page_without_figures_carries_no_plotly(tmp_path):
    path = write(Page("Nothing", "", [], [Section("Texts", ["none"])], "python"), tmp_path / "a" / "report.html")
    text = path.read_text()
    assert len(text) < 40_000
    assert "No warnings." in text


def test_the_same_page_is_the_same_bytes(tmp_path):
    page = a_page(tmp_path)
    assert render(page) == render(page)


# -- in a browser --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def browser():
    """Chromium without a window; skipped with the reason where there is none, unless one is required."""
    try:
        from playwright.sync_api import sync_playwright

        path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        if path is None:
            raise RuntimeError("no chromium or google-chrome on this machine")
        with sync_playwright() as playwright:
            launched = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
            yield launched
            launched.close()
    except (ImportError, RuntimeError) as error:
        if os.environ.get("DMS_LAB_REQUIRE_BROWSER") == "1":
            raise
        pytest.skip(f"the report is not opened in a browser: {error}")


class Opened:
    """A page in the browser with what it said and asked for."""

    def __init__(self, browser, path, **options):
        self.context = browser.new_context(offline=True, **options)
        self.said, self.asked = [], []
        self.page = self.context.new_page()
        self.page.set_default_timeout(LOADING_MS)
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(dialog.message))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-drawn]")

    def until(self, expression):
        """Waits until `expression` holds; the page's policy forbids what playwright's own waiting does."""
        for _ in range(LOADING_MS // 50):
            if self.page.evaluate(expression):
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(f"never: {expression}")

    def colour(self, selector, name):
        return self.page.eval_on_selector(selector, f"node => getComputedStyle(node).{name}")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return write(a_page(folder), folder / "report.html")


@pytest.fixture(scope="module")
def light(browser, report):
    opened = Opened(browser, report, viewport={"width": 1200, "height": 900}, color_scheme="light")
    yield opened
    opened.context.close()


@pytest.fixture(scope="module")
def dark_phone(browser, report):
    opened = Opened(browser, report, viewport={"width": 400, "height": 800}, color_scheme="dark")
    yield opened
    opened.context.close()


def test_a_browser_has_nothing_to_complain_about_and_asks_for_the_file_alone(light, dark_phone, report):
    for opened in (light, dark_phone):
        assert opened.said == []
        assert opened.asked == [report.as_uri()]
        assert opened.page.title() == "A report"


def test_every_figure_is_drawn_and_says_what_it_is(light):
    places = light.page.query_selector_all(".plot")
    assert len(places) == 4
    for place in places:
        box = place.query_selector("svg.main-svg").bounding_box()
        assert box["width"] > 300
        assert box["height"] > 200
        assert place.get_attribute("role") == "img"
        assert place.get_attribute("aria-label")
    first, *_, heat = places
    assert len(first.query_selector_all(".scatterlayer .trace")) > len(frames.METHODS) // 2
    assert heat.query_selector(".heatmaplayer image").bounding_box()["width"] > 200
    assert {text.text_content() for text in first.query_selector_all(".xtick text")} >= {"2048", "65536"}


def test_names_are_shown_as_they_are_written(light):
    assert light.page.query_selector(".lead").text_content() == f"Is {HOSTILE} text?"
    assert light.page.query_selector(".warnings li").text_content() == f"{HOSTILE} is off its target"
    names = [key.text_content() for key in light.page.query_selector_all(".keys button")]
    assert HOSTILE in names
    assert HOSTILE in [cell.text_content() for cell in light.page.query_selector_all("td:first-child")]
    assert light.page.eval_on_selector_all("script", "nodes => nodes.length") == 3


def column(page, caption, place):
    return page.eval_on_selector_all(
        f'table[aria-label="{caption}"] tbody tr', f"rows => rows.map(row => row.children[{place}].textContent)"
    )


def test_tables_sort_by_a_click_or_a_key_and_what_is_unknown_stays_below(light):
    buttons = light.page.query_selector_all('table[aria-label="Numbers"] th button')
    buttons[1].click()
    assert column(light.page, "Numbers", 1) == ["-20.0", "-1.5", "9.0", "10.0", ""]
    buttons[1].click()
    assert column(light.page, "Numbers", 1) == ["10.0", "9.0", "-1.5", "-20.0", ""]
    sorts = 'nodes => nodes.map(node => node.getAttribute("aria-sort"))'
    assert light.page.eval_on_selector_all('table[aria-label="Numbers"] th', sorts) == [None, "descending"]
    buttons[0].focus()
    light.page.keyboard.press("Enter")
    assert column(light.page, "Numbers", 0) == ["a", "b9", "b10", "c", "untold"]
    assert light.page.eval_on_selector_all('table[aria-label="Numbers"] th', sorts) == ["ascending", None]


def test_a_click_on_the_legend_hides_a_curve_in_each_figure_and_another_shows_it(light):
    shown = """() => [...document.querySelectorAll(".plot")].slice(0, 2).map(
        place => place.data.filter(trace => trace.legendgroup === "TOVA" && trace.visible !== false).length)"""
    before = light.page.evaluate(shown)
    assert all(before)
    key = light.page.query_selector('.keys button[data-group="TOVA"]')
    key.click()
    assert light.page.evaluate(shown) == [0, 0]
    assert key.get_attribute("aria-pressed") == "false"
    key.click()
    assert light.page.evaluate(shown) == before


def test_a_narrow_screen_scrolls_down_alone(dark_phone):
    for width in (400, 320):
        dark_phone.page.set_viewport_size({"width": width, "height": 800})
        dark_phone.until(f"document.querySelector('.plot svg.main-svg').clientWidth < {width}")
        assert dark_phone.page.evaluate("document.documentElement.scrollWidth") <= width
        assert (
            dark_phone.page.evaluate("Math.max(...[...document.querySelectorAll('.plot')].map(p => p.scrollWidth))")
            <= width
        )


def test_in_the_dark_the_page_is_dark_and_full_attention_is_drawn_light(light, dark_phone):
    def brightness(text):
        return sum(map(float, re.findall(r"[\d.]+", text)[:3])) / 765

    line = ".plot .scatterlayer .trace:nth-child(2) path.js-line"
    for opened, is_dark in ((light, False), (dark_phone, True)):
        assert (brightness(opened.colour("body", "backgroundColor")) < 0.2) == is_dark
        assert (brightness(opened.colour("body", "color")) > 0.7) == is_dark
        assert (brightness(opened.colour(line, "stroke")) > 0.7) == is_dark
        assert (brightness(opened.colour(".keys li:first-child path", "stroke")) > 0.7) == is_dark
    light.page.emulate_media(color_scheme="dark")
    light.until(f"getComputedStyle(document.querySelector('{line}')).stroke !== 'rgb(0, 0, 0)'")
    light.page.emulate_media(color_scheme="light")
    light.until(f"getComputedStyle(document.querySelector('{line}')).stroke === 'rgb(0, 0, 0)'")


def test_on_paper_it_is_black_on_white_and_texts_are_open(dark_phone):
    dark_phone.page.emulate_media(media="print")
    dark_phone.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert dark_phone.colour("body", "backgroundColor") == "rgb(255, 255, 255)"
    assert dark_phone.colour("nav", "display") == "none"
    assert dark_phone.page.query_selector("details").get_attribute("open") is not None
    dark_phone.page.evaluate("dispatchEvent(new Event('afterprint'))")
    dark_phone.page.emulate_media(media="screen")
    assert dark_phone.page.query_selector("details").get_attribute("open") is None


def test_a_table_s_numbers_stand_to_the_right_under_scoped_headers(light):
    assert light.colour('table[aria-label="Numbers"] td:nth-child(2)', "textAlign") == "right"
    assert light.page.eval_on_selector_all("th", "nodes => nodes.every(node => node.scope === 'col')")
    assert light.page.eval_on_selector("html", "node => node.lang") == "en"


# -- tables --------------------------------------------------------------------------------------------------------------
def test_empty_columns_are_left_out_and_rows_go_by_method_and_variant():
    shown = tables.points_table(frames.points().sample(frac=1.0, random_state=0))
    assert "perplexity" not in shown.columns
    names = list(dict.fromkeys((row[0].text, row[1].text) for row in shown.rows))
    assert names[:3] == [("full attention", ""), ("DMS", "decided_by=next window=4"), ("DMS", "decided_by=next window=16")]
    assert {"method", "variant", "frontier"} & shown.numeric == set()
    assert "accuracy" in shown.numeric


def test_the_table_of_points_has_the_text_s_own_ratio_beside_its_perplexity():
    points = frames.points(methods=[("dms", "", 8.0, 0.5)], widths=(1,)).assign(perplexity=12.0, text_cr=3.4)
    shown = tables.points_table(points)
    place = shown.columns.index("perplexity")
    assert shown.columns[place + 1] == "at text CR"
    assert [cell.text for cell in shown.rows[0][place : place + 2]] == ["12.00", "3.40"]


def versus(margins):
    empty = pd.DataFrame(columns=["method", "variant", "budget", "at", "accuracy", "at_least", "difference", "status"])
    return tables.versus_table(margins, empty, empty, "Against")


def test_a_difference_at_a_budget_to_which_the_curve_is_held_is_called_so():
    margins = frames.margins(methods=[("full", "", 1.0, 0.6), ("dms", "", 8.0, 0.5)]).query("budget == 'kv_reads'")
    budgets = margins.assign(at=100.0, accuracy=0.5, against_accuracy=0.4, difference=0.1, is_held=True)
    budgets = budgets.assign(against_width=1, against_max_tokens=None)
    empty = budgets.head(0).assign(at_least=[], status=[])
    for is_held, at, status in ((True, "100 (held)", "held"), (False, "100", None)):
        mine = budgets.assign(is_held=is_held)
        shown = tables.versus_table(margins, empty, mine, "Against")
        assert shown.rows[0][shown.columns.index("at a budget of")].text == at
        each = tables.equal_budget_table(mine, "At equal budget")
        assert ("status" in each.columns) == (status is not None)


@pytest.mark.parametrize("make", [versus, lambda margins: tables.margins_table(margins, "Margins")])
def test_beside_a_margin_stand_what_it_rests_on_and_what_it_is_without(make):
    margins = frames.margins(methods=[("full", "", 1.0, 0.6), ("dms", "", 8.0, 0.5), ("h2o", "", 8.0, 0.5)])
    margins.loc[margins["budget"] == "peak_tokens", ["held_share", "margin_unheld"]] = [1.0, float("nan")]
    shown = make(margins)
    assert "held: the share of the budgets beyond a frontier's last point" in shown.caption
    places = [shown.columns.index(name) for name in ("method", "budget", "margin", "held", "not held", "area")]
    assert [[row[place].text for place in places] for row in shown.rows if row[places[1]].text != "peak memory"] == [
        ["DMS", "KV reads", "+15.0 [+10.0, +20.0]", "25.0 %", "+7.5", "30.0"],
        ["DMS", "peak", "+15.0 [+10.0, +20.0]", "100.0 %", "no common budget", "30.0"],
        ["H2O", "KV reads", "no common budget", "", "", ""],
        ["H2O", "peak", "no common budget", "", "", ""],
    ]
    assert "held" not in make(margins[margins["method"] == "h2o"]).caption, "where there is no margin"


def test_the_terminal_s_table_has_the_same_cells_and_no_markup():
    from rich.console import Console

    console = Console(record=True, width=120)
    console.print(tables.to_rich(Table("a [bold]b", ["[red]x"], [[Cell("[link=y]z")]])))
    text = console.export_text()
    assert "a [bold]b" in text
    assert "[red]x" in text
    assert "[link=y]z" in text


@pytest.mark.parametrize("marker", ["o", "s", "P", "*", "X", (6, 1, 0), (3, 0, 40), (5, 0, 180)])
def test_a_marker_of_the_legend_is_an_svg_path_around_the_middle(marker):
    path = content.marker_path(marker)
    assert path.startswith("M")
    assert path.endswith("Z")
    assert re.fullmatch(r"[MLQCZ0-9e. -]+", path)
    numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", path)]
    assert max(map(abs, numbers)) <= 1.01
    assert max(map(abs, numbers)) >= 0.3
    assert isinstance(Key("a", "#000000", path).path, str)
