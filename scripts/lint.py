"""Format, lint and types: `python scripts/lint.py [--fix]`. Run by scripts/test.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    fix = "--fix" in sys.argv[1:]
    commands = [
        ["ruff", "format"] if fix else ["ruff", "format", "--check"],
        ["ruff", "check", "--fix"] if fix else ["ruff", "check"],
        ["mypy"],
        # Most users are on Windows: what only exists on POSIX must be guarded.
        ["mypy", "--platform", "win32", "--cache-dir", ".mypy_cache/win32"],
    ]
    status = 0
    for command in commands:
        print("$", *command, file=sys.stderr, flush=True)
        status |= subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=False).returncode
    return status


if __name__ == "__main__":
    sys.exit(main())
