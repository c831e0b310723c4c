"""`python -m sdvino` is the command `sdvino`."""

from __future__ import annotations

import sys

from sdvino.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
