"""``python -m attncap`` is the command `attncap`."""

from __future__ import annotations

import sys

from attncap.cli import main

if __name__ == "__main__":
    sys.exit(main())
