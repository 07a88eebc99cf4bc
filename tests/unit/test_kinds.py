"""A step kind whose code changed must have a new version, or results of the old code would be taken for its own.

After a change that keeps results the same, or after raising the version: python tests/unit/test_kinds.py --accept
"""

import json
import sys
from pathlib import Path

from cpet_bench.steps import KINDS

KEPT = Path(__file__).with_name("kinds.json")


def current():
    return {name: {"version": kind.version, "source": kind.source_hash()} for name, kind in KINDS.items()}


def test_versions_follow_the_sources():
    kept, now = json.loads(KEPT.read_text()), current()
    changed = [n for n in now if kept.get(n) != now[n]]
    assert not changed, f"{changed}: raise Kind.version where results change, then accept (see this file's first lines)"


def test_every_kind_can_be_imported():
    for kind in KINDS.values():
        assert callable(kind.function())


if __name__ == "__main__" and "--accept" in sys.argv:
    KEPT.write_text(json.dumps(current(), indent=1) + "\n")
