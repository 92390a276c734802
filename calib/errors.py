"""The error that every refusal in Andon is made of."""

from __future__ import annotations

import shlex


def quoted(path: object) -> str:
    """A path as it stands in the command of a next step, which has to work when it is pasted."""
    return shlex.quote(str(path))


class AndonError(Exception):
    """A refusal that a person can act on: what failed, found versus expected, and the next command to run.

    Args:
        what: what failed, naming the file, tensor, topic or setting.
        found: what was there instead.
        expected: what would have been accepted.
        next_step: the command or action that mends it.
    """

    def __init__(self, what: str, *, found: object = None, expected: object = None, next_step: str | None = None):
        self.what = what
        self.found = found
        self.expected = expected
        self.next_step = next_step
        super().__init__(self._text())

    def _text(self) -> str:
        lines = [self.what]
        if self.found is not None:
            lines.append(f"  found:    {self.found}")
        if self.expected is not None:
            lines.append(f"  expected: {self.expected}")
        if self.next_step is not None:
            lines.append(f"  next:     {self.next_step}")
        return "\n".join(lines)


class CalibrationError(AndonError):
    """Thresholds, memory or drift state cannot be made or used."""
