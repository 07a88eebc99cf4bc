"""Errors a user can meet, each with the exit code the command line ends with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

EXIT_DONE, EXIT_INPUT, EXIT_FAILED_CELLS, EXIT_STOPPED, EXIT_INTERRUPTED = 0, 2, 4, 5, 130


class CpetError(Exception):
    """Base of every error this package raises on purpose. `exit_code` is the command's exit status."""

    exit_code = 1


class InputError(CpetError):
    """The user's input is wrong: names file, line and key, what is allowed, and the nearest spelling.

    Args:
        message: one sentence that says what is wrong.
        file, line, key: where it stands (line counted from 1; key as a dotted path such as `pet.lora.r`).
        given, allowed: the offending word and what may stand there; the nearest of `allowed` is suggested.
    """

    exit_code = EXIT_INPUT

    def __init__(
        self,
        message: str,
        *,
        file: str | Path | None = None,
        line: int | None = None,
        key: str | None = None,
        given: object = None,
        allowed: Iterable[str] | None = None,
    ):
        self.message, self.file, self.line, self.key = message, file, line, key
        self.given, self.allowed = given, None if allowed is None else sorted(map(str, allowed))
        super().__init__(str(self))

    def __str__(self) -> str:
        where = "" if self.file is None else f"{self.file}:{self.line}: " if self.line else f"{self.file}: "
        text = where + (f"{self.key}: " if self.key else "") + self.message
        if self.allowed is not None:
            text += "" if text[-1] in ".!?)" else "."
            close = nearest(self.given, self.allowed)
            if close:
                text += f" Did you mean {', '.join(close)}?"
            shown = self.allowed if len(self.allowed) <= 24 else [*self.allowed[:24], f"... ({len(self.allowed)} in all)"]
            text += f" Allowed: {', '.join(shown)}." if shown else " Nothing is allowed here."
        return text

    def at(self, file: str | Path | None = None, line: int | None = None, key: str | None = None) -> InputError:
        """The same error with its place filled in where it was not known."""
        return InputError(
            self.message,
            file=self.file or file,
            line=self.line or line,
            key=self.key or key,
            given=self.given,
            allowed=self.allowed,
        )


class StopError(CpetError):
    """The run cannot go on: disk, store or network. Nothing finished is lost; the next run goes on from here."""

    exit_code = EXIT_STOPPED


class StepFailed(CpetError):
    """A step of a cell failed for a reason of its own (a loss that is not finite, no gradient, out of memory)."""

    exit_code = EXIT_FAILED_CELLS


class Unsupported(CpetError):
    """This combination cannot work here; the message is the reason that the record shows."""

    exit_code = EXIT_DONE


class Stopping(CpetError):
    """Raised inside a step that was asked to stop, after it saved what it needs to resume."""

    exit_code = EXIT_INTERRUPTED


def nearest(given: object, allowed: Iterable[str], n: int = 3) -> list[str]:
    """Up to n names of `allowed` spelt most like `given`, or beginning with it, best first (empty where nothing is near)."""
    lower = {name.lower(): name for name in allowed}
    word = str(given)[:100].lower()
    found = [name for name in lower if len(word) > 2 and name.startswith(word)]
    found += [m for m in difflib.get_close_matches(word, list(lower), n=n, cutoff=0.6) if m not in found]
    return [lower[m] for m in found[:n]]
