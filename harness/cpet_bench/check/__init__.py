"""The regression gate: a run against a baseline, cell by cell, on the kept outcomes. Loads no heavy library."""

from .compare import EXIT_NOTHING, EXIT_REGRESSION, CellCheck, Report, SpeedCheck, compare

__all__ = ["EXIT_NOTHING", "EXIT_REGRESSION", "CellCheck", "Report", "SpeedCheck", "compare"]
