"""``python -m andon.export --method M --fp16`` is ``andon export --method M --fp16``."""

from __future__ import annotations

import sys

from ..cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
