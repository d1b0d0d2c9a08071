"""A browser for the tests that need one: Debian's Chromium, headless, with a fresh profile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from demo.browser import NO_CHROMIUM, chromium, find_chromium, open_page
from demo.server import Server
from elrond_core.storage.format import load_directions, save_directions
from tests.e2e.pages import ROOT


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    pytest.importorskip("playwright.sync_api", reason="The browser tests need the playwright package.")
    if find_chromium() is None:
        pytest.skip(NO_CHROMIUM)
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def page(server: Server, browser: Any) -> Iterator[Any]:
    found = open_page(server, browser)
    yield found
    found.context.close()


@pytest.fixture(scope="module")
def stored(server: Server) -> str:
    """A directions file without names, of the demo model's family, that tests may change."""
    shipped = load_directions(ROOT / "demo" / "directions" / "demo person.safetensors")
    save_directions(
        replace(shipped, names=("",) * len(shipped)), server.output / "elrond" / "directions" / "browser.safetensors"
    )
    return "browser"
