"""The report in a real browser: no errors, no requests, fits a phone, both themes, hover values, PNG."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlora.report.page import report
from tests.browser import browser, show_as
from tests.report.runs import adapter, mixture, result, write_run

pytestmark = pytest.mark.slow
SCROLL = """const [element, done] = arguments;
    element.scrollIntoView({block: 'center'});
    requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 50)))"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("runs")
    first = write_run(folder / "first", [adapter("plain"), mixture("mixture")], evaluations=(10, 20))
    tasks = [result("plain", task, 0.6) for task in ("boolq", "openbookqa", "arc-challenge", "winogrande")]
    second = write_run(folder / "second", [adapter("plain", lr=1e-3)], tasks, seed=1)
    told = json.loads((second / "environment.json").read_text())
    told["command"] = ["train.py", *(f"--evaluate_base_{n}=True" for n in range(9)), "--long=" + 99 * "x"]
    (second / "environment.json").write_text(json.dumps(told))
    (folder / "report.html").write_text(report([first, second]), encoding="utf-8")
    with browser() as running:
        show_as(running, 1200)
        running.get((folder / "report.html").as_uri())
        yield running


def style(page: Any, selector: str, name: str) -> str:
    script = "return getComputedStyle(document.querySelector(arguments[0])).getPropertyValue(arguments[1])"
    return str(page.execute_script(script, selector, name))


def test_it_asks_for_nothing_and_logs_nothing(page: Any) -> None:
    entries = page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [e for e in entries if not e.startswith("data:")] == [] and page.get_log("browser") == []


@pytest.mark.parametrize("width", [1200, 390, 320])
def test_nothing_sticks_out_at_any_width(page: Any, width: int) -> None:
    show_as(page, width)
    assert page.execute_script("const e = document.documentElement; return e.scrollWidth <= e.clientWidth")
    cut = """return [...document.querySelectorAll('figure > svg')].flatMap(svg => [...svg.querySelectorAll('text')]
        .filter(t => { const a = t.getBoundingClientRect(), b = svg.getBoundingClientRect();
                       return a.left < b.left - 1 || a.right > b.right + 1 || a.bottom > b.bottom + 1 })
        .map(t => t.textContent))"""
    assert page.execute_script(cut) == []
    small = "return Math.min(...[...document.querySelectorAll('figure > svg')].map(s => s.getScreenCTM().a *"
    size = page.execute_script(small + " parseFloat(getComputedStyle(s.querySelector('text')).fontSize)))")
    assert size > (8.5 if width == 320 else 10)
    show_as(page, 1200)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_on_a_phone_a_wide_table_keeps_the_names_of_its_rows(page: Any, theme: str) -> None:
    show_as(page, 390, theme)
    script = """const scroll = document.querySelector('#results .scroll');
        const edge = () => scroll.getBoundingClientRect().left;
        const starts = [...scroll.querySelectorAll('thead th:first-child, th[scope=row], .run span')];
        scroll.scrollLeft = 1000;
        const moved = scroll.scrollLeft, cell = scroll.querySelector('th[scope=row]');
        const found = [moved, starts.map(e => Math.round(e.getBoundingClientRect().left - edge())),
                       getComputedStyle(cell).backgroundColor === getComputedStyle(document.body).backgroundColor];
        scroll.scrollLeft = 0;
        return found"""
    moved, places, opaque = page.execute_script(script)
    assert moved > 50 and set(places) == {0} and opaque
    show_as(page, 1200)


def test_on_a_phone_every_section_can_be_reached(page: Any) -> None:
    show_as(page, 390)
    script = """const nav = document.querySelector('.bar nav').getBoundingClientRect();
        return [...document.querySelectorAll('.bar a')].map(a => a.getBoundingClientRect())
            .filter(a => a.left < nav.left || a.right > nav.right + 1).length"""
    assert page.execute_script(script) == 0
    page.execute_script("location.hash = '#settings'")
    below = "return document.querySelector('#settings h2').getBoundingClientRect().top - arguments[0].clientHeight"
    assert page.execute_script(below, page.find_element("css selector", ".bar")) >= 0
    page.execute_script("history.replaceState(null, '', location.pathname)")
    show_as(page, 1200)


@pytest.mark.parametrize("width", [1200, 390])
def test_a_command_is_broken_between_words(page: Any, width: int) -> None:
    show_as(page, width)
    script = """const code = [...document.querySelectorAll('.command code')].pop(), lines = [];
        const walker = document.createTreeWalker(code, NodeFilter.SHOW_TEXT);
        for (let text; (text = walker.nextNode());) for (const found of text.data.matchAll(/\\S+/g)) {
            const range = document.createRange();
            range.setStart(text, found.index); range.setEnd(text, found.index + found[0].length);
            lines.push([found[0], [...range.getClientRects()].map(r => r.width)]);
        }
        return [code.textContent, lines]"""
    text, lines = page.execute_script(script)
    assert text.startswith("python train.py --evaluate_base_0=True --evaluate_base_1=True ")
    assert [word for word, widths in lines if len(widths) > 1 and not word.startswith("--long=")] == []
    (long,) = (widths for word, widths in lines if word.startswith("--long="))
    assert width == 1200 or (len(long) > 1 and long[0] == max(long)), "its lines are filled, not ended after --"
    show_as(page, 1200)


def test_both_themes(page: Any) -> None:
    show_as(page, 1200, "dark")
    dark = style(page, "body", "background-color")
    show_as(page, 1200, "light")
    light = style(page, "body", "background-color")
    assert (light, dark) == ("rgb(253, 253, 251)", "rgb(22, 24, 28)")
    seen = []
    for _ in range(3):
        page.execute_script("document.getElementById('theme').click()")
        seen.append((page.find_element("id", "theme").text, style(page, "body", "background-color")))
    assert seen == [("Light", light), ("Dark", dark), ("Auto", light)]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_can_be_told_from_the_paper(page: Any, theme: str) -> None:
    show_as(page, 1200, theme)

    def luminance(colour: str) -> float:
        channels = [int(part) / 255 for part in colour.partition("(")[2].rstrip(")").split(",")[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    def shown(name: str) -> str:
        script = """const probe = document.body.appendChild(document.createElement('i'));
            probe.style.color = `var(${arguments[0]})`; const colour = getComputedStyle(probe).color; probe.remove();
            return colour"""
        return str(page.execute_script(script, name))

    paper = shown("--paper")
    assert contrast(shown("--ink"), paper) > 7 and contrast(shown("--quiet"), paper) > 4.5
    for name in ("--accent", *(f"--c{i}" for i in range(7))):
        assert contrast(shown(name), paper) > 3, name
    show_as(page, 1200)


def test_values_are_shown_where_the_reader_points(page: Any) -> None:
    from selenium.webdriver import ActionChains

    found = {}
    for figure in page.find_elements("css selector", "figure.chart"):
        kind, svg = figure.get_attribute("data-kind"), figure.find_element("css selector", ":scope > svg")
        target = svg.find_element("css selector", ".dot") if kind == "dots" else svg
        page.execute_async_script(SCROLL, svg)  # a scroll that ends later would hide the values again
        ActionChains(page).move_to_element(target).perform()
        found.setdefault(kind, []).append(page.find_element("id", "tip").text)
    assert all(texts and all(texts) for texts in found.values()), found
    assert found["dots"][0].startswith("first: base model, boolq: 70.0 ± 2.0 %")
    assert found["lines"][0].startswith("step 1") and "first: plain: 1." in found["lines"][0]
    assert "% of tokens, even is 25 %" in found["heat"][0]


def test_a_line_is_hidden_by_its_entry_in_the_legend(page: Any) -> None:
    figure = page.find_element("css selector", "figure[data-kind=lines]")
    entry = figure.find_element("css selector", ".legend li")
    lines = figure.find_elements("css selector", "svg > g")
    for shown in (False, True):
        page.execute_script("arguments[0].click()", entry)
        assert lines[0].is_displayed() == shown and lines[1].is_displayed()
        assert entry.get_attribute("aria-pressed") == str(shown).lower()


def test_every_figure_is_saved_as_a_picture(page: Any) -> None:
    script = """const done = arguments[1];
        HTMLAnchorElement.prototype.click = function () { done([this.download, this.href]); };
        arguments[0].click()"""
    names = []
    for button in page.find_elements("css selector", "figure .save"):
        name, address = page.execute_async_script(script, button)
        data = base64.b64decode(address.partition(",")[2])
        width, height = struct.unpack(">II", data[16:24])
        assert data.startswith(b"\x89PNG") and width == 3 * (460 + 32) and height > 300
        assert len(data) > 15_000, f"{name} is all but empty"
        names.append(name)
    assert "Training-loss.png" in names and page.get_log("browser") == []


def test_on_paper_it_is_light_and_without_buttons(page: Any) -> None:
    show_as(page, 1200, "dark")
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert style(page, ".bar", "display") == style(page, "figure .save", "display") == "none"
    assert style(page, "body", "background-color") == "rgb(253, 253, 251)"
    pdf = page.execute_cdp_cmd("Page.printToPDF", {})["data"]
    assert base64.b64decode(pdf).startswith(b"%PDF")
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    show_as(page, 1200)


def test_it_opens_from_the_disk_alone(page: Any, tmp_path: Path) -> None:
    copy = tmp_path / "moved.html"
    copy.write_text(page.page_source, encoding="utf-8")
    page.get(copy.as_uri())
    assert page.find_element("css selector", "h1").text == "first and second" and page.get_log("browser") == []
