"""The site: it builds from what is here without a warning, and no link in it is broken."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from processes import HANGS

pytest.importorskip("mkdocstrings", reason="needs the extra `docs`")
sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))
import site_hooks  # noqa: E402

ROOT = Path(__file__).parents[2]


class Links(HTMLParser):
    def __init__(self, page: Path):
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids |= {found.get("id") or "", found.get("name") or ""}
        self.links += [found[key] or "" for key in ("href", "src") if found.get(key)]


def test_the_front_page_is_the_readme():
    page = site_hooks.front_page((ROOT / "README.md").read_text())
    assert "](results_gains.svg)" in page and "](guide.md)" in page
    assert "docs/" not in page and "CONTRIBUTING.md](" not in page and "CONTRIBUTING.md" in page


def test_formulas_become_mathml():
    given = '<p><span class="arithmatex">\\(\\rho &lt; 1\\)</span> [<code>cost</code>] [<code>x</code>](y)</p>'
    found = site_hooks.on_page_content(given)
    assert "<math" in found and "&#x0003C;" in found and "arithmatex" not in found
    assert " <code>cost</code> [<code>x</code>](y)" in found


@pytest.mark.slow
def test_it_builds_without_a_warning_and_every_link_in_it_works(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "http_proxy": "http://0.0.0.0:1"}
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANGS, env=environment)
    assert outcome.returncode == 0 and "WARNING" not in outcome.stderr, outcome.stderr
    pages = {path: Links(path) for path in (tmp_path / "site").rglob("*.html") if path.name != "404.html"}
    assert len(pages) > 20
    for page, found in pages.items():
        for link in found.links:
            parts = urlsplit(link)
            assert parts.scheme in ("", "data", "https", "mailto"), link
            if parts.scheme:
                assert "/ajax/" not in link and not re.search(r"\.(?:js|css|woff2?)$", parts.path), (
                    f"{link} is fetched"
                )
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), f"{page} links to {link}"
            if parts.fragment and target in pages and not parts.fragment.startswith("__"):
                assert parts.fragment in pages[target].ids, f"{page} links to {link}"
