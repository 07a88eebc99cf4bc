"""What sharing is worth: one matrix run as scripts do it, and through the plan, in one go; prints seconds and the ratio.

The naive way is a process per cell with nothing kept between them: each fetches or converts, compresses, trains what it
needs (the dense PET module and its teacher features too) and evaluates. It is the same code with the store emptied, so
the difference is sharing and residency alone.

    python tests/benchmarks/sharing.py [MATRIX]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).parents[2]


def timed(*words: str, env: dict[str, str]) -> float:
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "cpet_bench.cli.main", *words], env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return time.perf_counter() - started


def only(axes: dict) -> list[str]:
    return [word for axis, name in axes.items() if axis != "seed" for word in ("--only", f"{axis}={name}")]


def main() -> None:
    matrix = sys.argv[1] if len(sys.argv) > 1 else str(REPO / "matrices/smoke.yaml")
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        env = {**os.environ, "CPET_BENCH_STORE": str(where / "shared")}
        plan = ["plan", matrix, "--json", "--runs", str(where / "runs")]
        done = subprocess.run([sys.executable, "-m", "cpet_bench.cli.main", *plan], env=env, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        cells = list(json.loads(done.stdout)["cells"])
        shared = timed("run", matrix, "--no-page", "--runs", str(where / "runs"), env=env)
        axes = [json.loads((where / "runs").glob(f"*/records/{c}.json").__next__().read_text())["axes"] for c in cells]
        naive = 0.0
        for i, found in enumerate(axes):
            own = {**env, "CPET_BENCH_STORE": str(where / f"cell{i}")}
            naive += timed("run", matrix, "--no-page", "--runs", str(where / f"runs{i}"), *only(found), env=own)
            print(f"{cells[i]}: {naive:.1f} s so far", flush=True)
        cached = timed("run", matrix, "--no-page", "--runs", str(where / "runs"), env=env)
    print(f"{len(cells)} cells: naive {naive:.1f} s, shared {shared:.1f} s, ratio {naive / shared:.2f}")
    print(f"the same run again: {cached:.2f} s")


if __name__ == "__main__":
    main()
