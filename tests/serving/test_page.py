"""The page in a real browser: type, stream, stop, side by side, load and unload, experts, errors, nothing from afar."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="needs Debian's chromium and chromium-driver"),
]


class Page:
    """What a person does with the page."""

    def __init__(self, browser: Any, address: str) -> None:
        self.browser, self.address = browser, address

    def open(self) -> None:
        self.browser.get(self.address)
        self.wait(lambda: self.all("#prompt textarea") and self.all("#who label"))

    def all(self, selector: str) -> list[Any]:
        return self.browser.find_elements("css selector", selector)

    def text(self, selector: str) -> str:
        # in one go: what grows is drawn again and again
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText).join('\\n')"
        return self.browser.execute_script(script, selector)

    def wait(self, happened: Callable[[], Any], seconds: float = 30) -> Any:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := happened():
                return found
            time.sleep(0.05)
        raise AssertionError(self.text("body"))

    def tick(self, box: str, name: str) -> None:
        next(label for label in self.all(f"#{box} label") if label.text.strip() == name).click()

    def set(self, box: str, value: object) -> None:
        """Type a number beside a slider."""
        field = self.all(f"#{box} input[type=number]")[0]
        script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))"
        self.browser.execute_script(script, field, str(value))

    def ask(self, text: str) -> None:
        field = self.all("#prompt textarea")[0]
        field.clear()
        field.send_keys(text + "\ue007")

    def done(self) -> bool:
        return self.all("#send")[0].is_enabled() and not self.all(".answer .going")

    def answers(self) -> dict[str, str]:
        script = "return [...document.querySelectorAll('.answer')].map(a => [a.dataset.who, a.children[1].innerText])"
        return dict(self.browser.execute_script(script))


@pytest.fixture
def page(server: str, base_name: str) -> Iterator[Page]:
    settings = webdriver.ChromeOptions()
    settings.binary_location = CHROMIUM
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1280,900"):
        settings.add_argument(f"--{flag}")
    settings.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    os.environ["SE_OFFLINE"], os.environ["SE_AVOID_STATS"] = "true", "true"
    browser = webdriver.Chrome(options=settings, service=webdriver.ChromeService(DRIVER))
    try:
        page = Page(browser, server)
        page.open()
        yield page
    finally:
        browser.quit()


def test_base_and_adapters_answer_side_by_side_and_stream(page: Page, base_name: str) -> None:
    page.set("temperature", 0)
    page.set("length", 400)
    page.ask("What is m-LoRA?")
    page.wait(lambda: page.all(".answer .going"))
    early = page.wait(lambda: all(page.answers().values()) and page.answers())
    page.wait(lambda: page.answers() != early)
    page.wait(page.done, 60)
    answers = page.answers()
    assert list(answers) == [base_name, "plain", "mixture"] and len(set(answers.values())) == 3
    tops = {card.rect["y"] for card in page.all(".answer")}
    assert len(tops) == 1, "on a laptop they stand side by side"
    page.tick("who", base_name)
    page.ask("What is m-LoRA?")
    page.wait(lambda: list(page.answers()) == ["plain", "mixture"] and page.done(), 60)
    assert page.answers() == {name: answers[name] for name in ("plain", "mixture")}


def test_stop_stops(page: Page) -> None:
    page.set("temperature", 0)  # random weights, drawn from, may end at once
    page.set("length", 2000)
    page.ask("What is m-LoRA?")
    page.wait(lambda: any(page.answers().values()))
    page.all("#stop")[0].click()
    page.wait(page.done, 10)
    assert "stopped" in page.text(".answer header")
    page.set("length", 3)
    page.ask("And now?")
    page.wait(lambda: "3 tokens" in page.text(".answer header") and page.done(), 10)


def test_adapters_are_loaded_and_unloaded_and_a_bad_folder_is_named(page: Page) -> None:
    page.tick("loaded", "later")
    page.wait(lambda: "later" in page.text("#who"))
    page.tick("loaded", "broken")
    page.wait(lambda: "broken/adapter_model.safetensors: cannot be read" in page.text("#problem"))
    assert "broken" not in page.text("#who")
    page.set("length", 3)
    page.ask("Hi")
    page.wait(lambda: "later" in page.answers() and page.done())
    page.wait(lambda: not page.text("#problem"))
    page.tick("loaded", "later")
    page.wait(lambda: "later" not in page.text("#who"))
    page.tick("loaded", "broken")
    page.wait(lambda: "cannot be read" in page.text("#problem"))


def test_experts_of_a_mixture(page: Page) -> None:
    page.set("length", 5)
    page.ask("Hi")
    page.wait(lambda: page.done() and page.all("#experts button"))
    page.all("#experts button")[0].click()
    page.wait(lambda: "expert 3" in page.text("#routes"))
    tokens = page.all("#routes .tokens span")
    new = [t for t in tokens if t.get_attribute("class") != "asked"]
    assert 1 <= len(new) <= 5 and all("·" in t.find_element("css selector", "sub").text for t in new)
    first = page.text("#routes")
    page.all("#router input")[0].click()
    page.wait(lambda: [option for option in page.all("ul li") if "layer 1" in option.text])[0].click()
    page.wait(lambda: page.text("#routes") != first)


def test_wrong_settings_are_said_and_nothing_is_fetched_from_elsewhere(page: Page) -> None:
    page.all("#seed textarea, #seed input")[0].send_keys("many")
    page.ask("Hi")
    page.wait(lambda: "seed: 'many' is not allowed" in page.text("#shown"))
    messages = [json.loads(entry["message"])["message"] for entry in page.browser.get_log("performance")]
    fetched = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    assert fetched and all(url.startswith((page.address, "data:", "blob:")) for url in fetched), fetched
    assert [entry for entry in page.browser.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_quiet_words_and_empty_boxes_can_be_seen(page: Page, theme: str) -> None:
    page.browser.get(f"{page.address}/?__theme={theme}")
    page.wait(lambda: page.all("#loaded input:not(:checked)"))
    # colours may be written in any way, so they are painted, over what lies behind them
    script = """const canvas = Object.assign(document.createElement('canvas'), {width: 1, height: 1}).getContext('2d');
        const paint = colour => { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); };
        const level = () => [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(c => c / 255)
            .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
            .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
        const behind = element => { if (!element) return paint('white');
            behind(element.parentElement); paint(getComputedStyle(element).backgroundColor); };
        const contrast = (element, around, property) => {
            behind(around); const back = level();
            paint(getComputedStyle(element)[property]); const front = level();
            return (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05) };
        const words = [...document.querySelectorAll('#title p, .hint, #settings [data-testid=block-info] + *')];
        const boxes = [...document.querySelectorAll('#loaded input:not(:checked)')];
        return [words.map(e => contrast(e, e, 'color')),
                boxes.map(e => contrast(e, e.parentElement, 'borderTopColor'))]"""
    words, boxes = page.browser.execute_script(script)
    assert len(words) > 3 and min(words) >= 4.5 and boxes and min(boxes) >= 3, (words, boxes)


def test_it_fits_a_phone(page: Page) -> None:
    page.browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    )
    page.open()
    assert page.browser.execute_script("return document.documentElement.scrollWidth") <= 390
    prompt, settings = page.all("#prompt")[0].rect, page.all("#settings")[0].rect
    assert prompt["y"] < 500 < settings["y"], "the prompt comes before the settings"
    send, stop = page.all("#send")[0].rect, page.all("#stop")[0].rect
    assert send["y"] == stop["y"] and send["height"] >= 44
