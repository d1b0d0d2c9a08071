"""ComfyUI hands out the pack's texts in every language, and its page shows them."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import pytest
import translations

from demo.browser import open_page, post
from demo.server import PACK, Server


def fetch(server: Server, path: str) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(server.url + path, timeout=30) as reply:
        return reply.read()


def test_the_server_hands_out_every_language(server: Server) -> None:
    given = json.loads(fetch(server, "/i18n"))
    for language in (translations.ENGLISH, *translations.LANGUAGES):
        texts = given[language]
        assert texts["nodeDefs"] == translations.read(language)
        assert {key: texts[key] for key in ("nodeCategories", "dataTypes")} == translations.read(language, "main")


def test_the_server_hands_out_chinese_help_pages(server: Server) -> None:
    for node_id, texts in translations.read("zh").items():
        page = fetch(server, f"/extensions/{PACK}/docs/{node_id}/zh.md").decode()
        assert page.startswith(f"# {texts['display_name']}\n")


@pytest.mark.parametrize("language", translations.LANGUAGES)
def test_the_page_shows_a_node_in_its_language(server: Server, browser: Any, language: str) -> None:
    page = open_page(server, browser, settings={"Comfy.Locale": language})
    try:
        old = page.evaluate("() => window.__COMFYUI_FRONTEND_VERSION__").startswith("1.32.")
        if old and language != "de":
            pytest.skip("ComfyUI's page of version 1.32 loses texts of packs when it loads its own of that language.")
        if page.evaluate("() => window.app.extensionManager.setting.get('Comfy.Locale')") != language:
            pytest.skip(f"This version of ComfyUI's page does not offer the language {language}.")
        shown = page.evaluate(
            """() => {
                const node = window.LiteGraph.createNode('ElrondDiversify');
                window.app.graph.add(node);
                const label = (slot) => slot.label || slot.localized_name || slot.name;
                return {
                    title: node.title,
                    inputs: Object.fromEntries(node.inputs.map((slot) => [slot.name, label(slot)])),
                    outputs: node.outputs.map(label),
                };
            }"""
        )
    finally:
        page.context.close()
        # The setting stays on the server, which other tests share.
        post(server, "/settings", {"Comfy.Locale": "en"})
    wanted = translations.read(language)["ElrondDiversify"]
    assert shown["title"] == wanted["display_name"]
    for name in ("conditioning", "directions", "count"):
        assert shown["inputs"][name] == wanted["inputs"][name]["name"]
    assert shown["outputs"] == [entry["name"] for entry in wanted["outputs"].values()]
