"""The table of results in README.md, from docs/results.md. As a program: put it there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README, RESULTS = ROOT / "README.md", ROOT / "docs" / "results.md"
START, END = "<!-- table: python tests/support/readme_table.py -->\n", "<!-- end of the table -->"
HEAD = ("task", "seeds", "QAT", "SAQ", "SAQ - QAT, same steps", "SAQ - QAT, twice the steps")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def rows_of(section: str) -> list[list[str]]:
    """Cells of the first table in a section, without its head."""
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [cells(line) for line in lines[2:]]


def top1_of(section: str) -> dict[str, str]:
    """Accuracy of each method, wherever the table of the section has that column."""
    column = cells(next(line for line in section.splitlines() if line.startswith("|"))).index("top-1 %")
    return {row[0]: row[column] for row in rows_of(section)}


def table() -> str:
    """All settings of the section "In short", with the accuracies of the section of each; averages have none."""
    sections = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", RESULTS.read_text(), flags=re.DOTALL | re.MULTILINE))
    lines = [HEAD, ("---",) * len(HEAD)]
    for task, seeds, same, twice, *_ in rows_of(sections["In short"]):
        top1 = top1_of(sections[task]) if task in sections else {"qat": "", "case 3": ""}
        lines.append((task, seeds, top1["qat"], top1["case 3"], same, twice))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    before, rest = README.read_text().split(START)
    README.write_text(before + START + table() + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
