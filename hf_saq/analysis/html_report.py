"""Write results of analyses, their tables and their pictures into one HTML file that needs no other."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #1f2328; background: #fff }
pre { overflow-x: auto; font-size: 13px; background: #f2f4f7; padding: .8rem; border-radius: 6px }
img { max-width: 100%; background: #fff; border-radius: 6px }
@media (prefers-color-scheme: dark) {
  body { color: #e6edf3; background: #0d1117 }
  pre { background: #161b22 }
}
"""


@dataclass(frozen=True)
class Section:
    """Holds one part of a report: a result that prints as a table and may draw itself, and what is said of it."""

    title: str
    about: str
    result: Any


def html_report(title: str, about: Sequence[str], sections: Sequence[Section]) -> str:
    """Make the page: a heading, sentences, and for each section its picture and its table.

    Pictures are within the page. Without matplotlib there are none, and the page says so.
    """
    has_pictures = find_spec("matplotlib") is not None
    parts = [f"<h1>{escape(title)}</h1>", *(f"<p>{escape(sentence)}</p>" for sentence in about)]
    if not has_pictures:
        parts.append("<p>There are no pictures: matplotlib is not installed.</p>")
    for section in sections:
        parts += [f"<h2>{escape(section.title)}</h2>", f"<p>{escape(section.about)}</p>"]
        if has_pictures:
            parts.append(_picture(section))
        parts.append(f"<pre>{escape(str(section.result))}</pre>")
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n{body}\n</html>\n"
    )


def _picture(section: Section) -> str:
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "picture.svg"
        section.result.plot(file)
        data = base64.b64encode(file.read_bytes()).decode()
    return f'<img alt="{escape(section.title, quote=True)}" src="data:image/svg+xml;base64,{data}">'
