"""Chromium for the browser tests, driven by Playwright, and a JupyterLab of their own. Without either, one line says what is missing."""
import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))                      # for pages.py and lab.py

from pages import ARGS, chromium_path, pixels, settle               # the last two for tests that take them from here


def missing() -> str: # what the tests lack here, or ""
    if importlib.util.find_spec("playwright") is None: return 'no browser tests: the package playwright is missing; pip install "erwin_nsa[browser]"'
    return "" if chromium_path() else "no browser tests: there is no chromium or google-chrome on PATH; apt install chromium"


def pytest_collection_modifyitems(items):
    if not (reason := missing()): return
    for item in items:
        if Path(__file__).parent in item.path.parents: item.add_marker(pytest.mark.skip(reason=reason))   # one line a file in the summary


@pytest.fixture(scope="session")
def chromium():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=ARGS)
        yield browser
        browser.close()


class Watched:
    "A page that remembers what went wrong on it and what it asked the network for."
    def __init__(self, browser, **context):
        self.context = browser.new_context(**dict(viewport=dict(width=900, height=700)) | context)
        self.page, self.errors, self.requests = self.context.new_page(), [], []
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url) if not request.url.startswith(("file:", "data:", "blob:")) else None)


@pytest.fixture
def open_page(chromium):
    "Opens a file; when the test ends, no page may have complained or asked the network for anything."
    opened = []

    def open_file(path, init="", ready=".erwin-cloud-canvas[data-frames]", **context):
        watched = Watched(chromium, **context)
        opened.append(watched)
        if init: watched.page.add_init_script(init)
        watched.page.goto(Path(path).resolve().as_uri())
        if ready: watched.page.wait_for_selector(ready)
        return watched.page

    yield open_file
    for watched in opened: watched.context.close()
    assert [watched.errors for watched in opened if watched.errors] == []
    assert [watched.requests for watched in opened if watched.requests] == []


@pytest.fixture(scope="session")
def lab(chromium, tmp_path_factory):
    pytest.importorskip("jupyterlab", reason="no notebook test: JupyterLab is missing")
    from lab import Lab
    with Lab(tmp_path_factory.mktemp("lab")) as running:
        yield running
