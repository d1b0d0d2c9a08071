"""ComfyUI's page in a real browser: Debian's Chromium, headless, with a fresh profile. For tests and pictures."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import urllib.request
from collections.abc import Iterator
from typing import Any

from .server import Server

# Milliseconds to wait for anything on the page.
PATIENCE = 1000 * int(os.environ.get("ELROND_BROWSER_SECONDS", "60"))
# What the frontend says with any nodes: that it may not ask another site, its minimap when a graph is loaded and a
# subgraph opened (version 1.32.9), and newer ones on a host that has no list of jobs (0.3.75).
OF_THE_HOST = (
    "https://api.comfy.org",
    "Attempted to cleanup event listeners for graph that was never set up",
    "[Jobs API]",
    "JobsApiError",
)
NO_CHROMIUM = "There is no Chromium on this machine (Debian: apt-get install chromium)."


def find_chromium() -> str | None:
    """The program to start, or None where there is none."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A running browser of Playwright's, for as long as the context lasts.

    Raises:
        FileNotFoundError: if this machine has no Chromium.
    """
    from playwright.sync_api import sync_playwright

    if (program := find_chromium()) is None:
        raise FileNotFoundError(NO_CHROMIUM)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"], timeout=PATIENCE)
        yield browser
        browser.close()


def post(server: Server, path: str, body: Any) -> None:
    """Send JSON to the server."""
    request = urllib.request.Request(
        server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30):
        pass


def open_page(
    server: Server,
    browser: Any,
    theme: str = "dark",
    without: str = "",
    size: tuple[int, int] = (1500, 950),
    settings: dict[str, Any] | None = None,
) -> Any:
    """A page with the frontend ready; `page.said` collects what the console had to complain about.

    Args:
        server: a running server.
        browser: from `chromium`.
        theme: the frontend's colour palette.
        without: the name of a script that is not to be loaded.
        size: width and height of the page in pixels.
        settings: further settings of the frontend.
    """
    # The first start of a fresh installation shows the template browser instead of a graph.
    usual = {"Comfy.TutorialCompleted": True, "Comfy.ColorPalette": theme, "Comfy.Workflow.Persist": False}
    # So that text can be read in pictures of whole workflows.
    usual |= {"LiteGraph.Canvas.MinFontSizeForLOD": 0, "LiteGraph.Canvas.LowQualityRenderingZoomThreshold": 0}
    post(server, "/settings", {**usual, **(settings or {})})
    context = browser.new_context(viewport={"width": size[0], "height": size[1]})
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    page.said = []
    page.on("console", lambda message: _complain(page, message))
    page.on("pageerror", lambda error: page.said.append(error.stack or str(error)))
    if without:
        page.route(f"**/{without}", lambda route: route.abort())
    page.goto(server.url)
    # Nodes are registered shortly before extensions are set up.
    page.wait_for_function("() => window.app?.extensionManager && window.LiteGraph?.registered_node_types.KSampler")
    page.wait_for_function("() => window.app.vueAppReady && window.app.graph && document.querySelector('canvas')")
    page.wait_for_timeout(1000)
    return page


def run_graph(page: Any) -> None:
    """Queue the graph on the page, as its button does, and wait until it has run.

    Raises:
        RuntimeError: if a node fails.
    """
    page.evaluate(
        """() => {
            window.finished = new Promise((resolve) => {
                for (const name of ['execution_success', 'execution_error'])
                    window.app.api.addEventListener(name, () => resolve(name), { once: true });
            });
            return window.app.queuePrompt(0);
        }"""
    )
    outcome = page.evaluate("() => window.finished")
    if outcome != "execution_success":
        raise RuntimeError(f"The graph on the page did not run: {outcome}.")


def _complain(page: Any, message: Any) -> None:
    """Keep an error, unless it is the host's: files of the user that a fresh profile lacks, a site it must not ask."""
    if message.type != "error":
        return
    where = message.location.get("url", "")
    missing = message.text.startswith("Failed to load resource") and "elrond" not in where.lower()
    if not missing and not any(text in message.text for text in OF_THE_HOST):
        page.said.append(f"{message.text} ({where})")
