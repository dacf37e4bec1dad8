"""Say how hf_saq is installed. All texts that tell it take it from here, and it comes from the project's metadata."""

from __future__ import annotations

from importlib import metadata

DISTRIBUTION = "hf-saq"


def how_to_install(extra: str | None = None) -> str:
    """Return the command that installs hf_saq: from its repository, or from a copy of its source if none is known.

    Args:
        extra: Name of the optional dependencies to install with it.

    It names no package of an index: the distribution is on none, and its name there could be anybody's.
    """
    try:
        entries = metadata.metadata(DISTRIBUTION).get_all("Project-URL") or []
    except metadata.PackageNotFoundError:  # used from a directory, without being installed
        entries = []
    urls = dict(entry.split(", ", 1) for entry in entries)
    if "Repository" in urls:
        source = f"git+{urls['Repository']}"
        return f"pip install '{DISTRIBUTION}[{extra}] @ {source}'" if extra else f"pip install {source}"
    target = f"'.[{extra}]'" if extra else "."
    return f"pip install {target} (in a copy of the source of hf_saq)"
