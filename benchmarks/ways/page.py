from pathlib import Path


def write_page(results: Path, document: Path) -> None:
    pass
