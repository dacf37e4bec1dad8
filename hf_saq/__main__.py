"""Run `hf-saq` as `python -m hf_saq`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
