"""A headless browser, where one is installed: Debian's packages chromium and chromium-driver, and selenium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def browser() -> Iterator[Any]:
    """Yield a driver of Chromium without a network; skip the test where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs the package selenium")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("needs chromium and chromedriver (apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    running = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        running.execute_cdp_cmd("Network.enable", {})
        yield running
    finally:
        running.quit()


def show_as(running: Any, width: int, theme: str = "light") -> None:
    """Take on the width of a screen in pixels and the light or dark preference of its owner."""
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    running.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    preference = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    running.execute_cdp_cmd("Emulation.setEmulatedMedia", preference)
