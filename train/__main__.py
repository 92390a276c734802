"""``python -m andon.train`` is ``andon train``: the form that torchrun starts."""

from __future__ import annotations

import sys

from ..cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
