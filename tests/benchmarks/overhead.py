"""The harness's own share of a run: time in which no worker computes, over a matrix of real small cells, from its events.

    python tests/benchmarks/overhead.py [MATRIX [OPTIONS OF run]]

A worker computes from when it begins a step to when it has committed it (`seconds` of a `done` event), loading of
libraries and models within the step included. Counted from when the first worker is up, and from the start of the command.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cpet_bench.events import read_events

REPO = Path(__file__).parents[2]


def busy(events: list[dict]) -> list[tuple[float, float]]:
    """Times in which at least one worker computed, as intervals that do not overlap."""
    found: list[tuple[float, float]] = []
    for start, end in sorted((row["time"] - row["seconds"], row["time"]) for row in events if row["event"] == "done"):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def main() -> None:
    matrix, *more = sys.argv[1:] or [str(REPO / "matrices/smoke.yaml")]
    with tempfile.TemporaryDirectory() as folder:
        words = ["run", matrix, "--runs", f"{folder}/runs", "--store", f"{folder}/store", "--name", "timed", *more]
        started = time.time()
        done = subprocess.run([sys.executable, "-m", "cpet_bench.cli.main", *words], capture_output=True, text=True)
        ended = time.time()
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        events = read_events(Path(folder, "runs/timed/events.jsonl"))
    computed = busy(events)
    steps = sum(row["event"] == "done" for row in events)
    total = sum(end - start for start, end in computed)
    first, last = computed[0][0], next(row["time"] for row in events if row["event"] == "end")
    idle = last - first - total
    print(f"{matrix}: {steps} steps, computing for {total:.1f} s")
    print(f"  since the first worker is up: {last - first:.1f} s, of which none computes {idle:.2f} s")
    print(f"  {1000 * idle / steps:.0f} ms a step")
    print(f"  overhead: {idle / (last - first):.1%}; wanted: at most 5 %")
    whole = ended - started
    print(f"  the whole command, page and table included: {whole:.1f} s, of which none computes {1 - total / whole:.1%}")


if __name__ == "__main__":
    main()
