"""The regression gate, a run against a baseline, and cells of one run against each other, on the kept outcomes.

Loads no heavy library."""

from .between import Comparison, Pair, between
from .compare import EXIT_NOTHING, EXIT_REGRESSION, CellCheck, Report, SpeedCheck, compare
from .gap import Ladder, Row, gaps

__all__ = [
    "EXIT_NOTHING",
    "EXIT_REGRESSION",
    "CellCheck",
    "Comparison",
    "Ladder",
    "Pair",
    "Report",
    "Row",
    "SpeedCheck",
    "between",
    "compare",
    "gaps",
]
