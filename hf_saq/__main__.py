"""`python -m hf_saq` is `hf-saq`."""

import sys

from .cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
