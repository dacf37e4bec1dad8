"""What the site does with its pages: README.md is its front page, formulas become MathML, names in docstrings code."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

from hf_saq import config
from hf_saq.config.described import table_of_fields

ROOT = Path(__file__).parents[1]
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', flags=re.DOTALL)
REFERENCE = re.compile(r"\[(<code[^>]*>[^<]*</code>)\](?!\()")
"""A name as docstrings write it, in brackets."""
FIELDS = re.compile(r"<!-- fields: (\w+) -->")
"""Where the table of fields of a configuration belongs."""


def on_files(files: Files, config: Any) -> Files:  # noqa: F811 (named by mkdocs)
    """Make the front page from README.md."""
    files.append(File.generated(config, "index.md", content=front_page((ROOT / "README.md").read_text("utf-8"))))
    return files


def front_page(readme: str) -> str:
    """README.md as a page of `docs/`: links to other files of the repository become plain text.

    It is alone in its part of the menu, so the column of the menu is left to its code and tables.
    """
    pages = re.sub(r"(?<!!)\[([^\]]*)\]\((?!docs/|https?://)[^)]*\)", r"\1", readme)
    return "---\nhide: [navigation]\n---\n\n" + pages.replace("](docs/", "](")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the fields of a configuration where a page names it: the source has no text of them to be read."""
    return FIELDS.sub(lambda found: table_of_fields(getattr(config, found[1])), markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Turn formulas into MathML, which browsers draw without scripts, and names in brackets into code."""
    return REFERENCE.sub(r"\1", FORMULA.sub(_to_mathml, content))


def _to_mathml(found: re.Match[str]) -> str:
    display = "block" if found[2] == "[" else "inline"
    return convert(html.unescape(found[3].strip()), display=display)
