"""What the plan says of each compression's memory, against what a process that does nothing else takes; GB, and the ratio.

    python tests/benchmarks/memory.py [NAME ...]     # of matrices/compression.yaml; all of them take half an hour

On a CPU the peak counts pages of mapped files, which the system can take back.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

MATRIX = Path(__file__).parents[2] / "matrices/compression.yaml"
TEXT = f"extends: {MATRIX}\nprobes: {{throughput: false}}\n"
TEXT += "task: {movie_snippets: {limit: 4}, movie_reviews: {limit: 4}}\n"


def steps(folder: Path, *words: str) -> str:
    """What cpet-bench prints; every call is a run of its own, the store is shared (models are fetched once)."""
    env = {**os.environ, "CPET_BENCH_STORE": str(folder / "store")}
    command = [sys.executable, "-m", "cpet_bench.cli.main", *words, "--json"]
    return subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True, text=True).stdout


def main(names: list[str]) -> None:
    import yaml

    names = names or [n for n, v in yaml.safe_load(MATRIX.read_text())["compression"].items() if v != "none"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "matrix.yaml").write_text(TEXT)
        # what is planned comes from the headers of the model's files
        steps(folder, "run", "matrix.yaml", "--only", "compression=none", "--no-page")
        for one in names:
            only = ("matrix.yaml", "--only", f"compression={one}")
            plan = json.loads(steps(folder, "plan", *only))["steps"]
            planned = {s["key"]: s["memory"] for s in plan if s["kind"] == "compress"}
            for line in steps(folder, "run", *only, "--no-page").splitlines():
                event = json.loads(line)
                if event["event"] == "done" and event["kind"] == "compress":
                    peak, wanted = event["peak"] / 1e9, planned[event["key"]] / 1e9
                    print(f"{event['label']:60} {peak:6.2f} of {wanted:6.2f} planned  {peak / wanted:.2f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
