"""Debian's Chromium, headless, for what people look at."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

INSTALL = "apt-get install chromium"
# Without these it asks for updates and certificates on a network that it has not got.
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A browser; skips the test where there is none."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip(f"no Chromium here: {INSTALL}")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox", *QUIET])
        yield browser
        browser.close()


def screenshot(url: str, path: Path, *, width: int, height: int) -> None:
    """Save what one screen of a page shows as PNG."""
    with chromium() as browser:
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme="light")
        page.goto(url)
        page.screenshot(path=path)
