"""Whether a backend's calibration text is long enough: first by its settings alone, then by the documents really there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import StepFailed
from . import calibrated

if TYPE_CHECKING:
    from ..settings import CalibrationSettings


def least_tokens(backend: Any, settings: Any) -> int:
    """Tokens of text that `compress` needs: the backend's `min_tokens`, a number or a function of the settings; 0: no text."""
    if not calibrated(backend, settings):
        return 0
    least = getattr(backend, "min_tokens", 1)
    return int(least(settings) if callable(least) else least)


def too_little(backend: Any, settings: Any) -> str | None:
    """Why no text could be long enough under these settings, and what would do; None where it can."""
    least = least_tokens(backend, settings)
    if not least:
        return None
    c: CalibrationSettings = settings.calibration
    if c.max_tokens < 2:
        return f"documents of one token have no context, so nothing can be calibrated on them; {_longer(c, least)}"
    most = c.documents * c.max_tokens
    if most >= least:
        return None
    more = f"documents: {-(-least // c.max_tokens)} or more"
    asked = f"documents: {c.documents} of at most max_tokens: {c.max_tokens}"
    return f"{backend.name} needs at least {least} tokens of text, and {asked} come to {most}; {more}, or {_longer(c, least)}"


def _longer(c: CalibrationSettings, least: int) -> str:
    return f"max_tokens: {max(2, -(-least // c.documents))} or more"


def check_text(backend: Any, settings: Any, examples: list[list[int]]) -> None:
    """StepFailed, with what is there, what is needed and what would help, where `examples` (token ids) are too little text.

    Documents of one token do not count: they have no context and no next token.
    """
    least, c = least_tokens(backend, settings), settings.calibration
    tokens = sum(len(tokens) for tokens in examples if len(tokens) > 1)
    if tokens >= least:
        return
    short = len(examples) < c.documents
    there = f"{len(examples)} documents with {tokens} tokens" + (f" (of {c.documents} documents asked for)" if short else "")
    help_ = [] if short else ["more documents"]
    if any(len(tokens) >= c.max_tokens for tokens in examples):
        help_.append(f"a max_tokens above {c.max_tokens}")
    help_.append("the text of another task (calibration: {task: ...})")
    raise StepFailed(
        f"{backend.name} needs calibration text of at least {least} tokens, and there are {there}; "
        f"what helps: {', or '.join(help_)}"
    )
