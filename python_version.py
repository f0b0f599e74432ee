"""Imported first: a Python that is too old for what comes next is told so, in one line."""

import sys

if sys.version_info < (3, 11):
    print(f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}", file=sys.stderr)
    sys.exit(2)
