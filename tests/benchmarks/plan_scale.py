"""How large a matrix can be: 100,000 cells planned, 10,000 finished ones looked at; prints seconds and peak memory.

    python tests/benchmarks/plan_scale.py [CELLS TO PLAN] [FINISHED CELLS]

The finished cells have made-up records of the real format; nothing is loaded or trained.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

import made_plans
import made_runs
import pyarrow as pa
import pyarrow.parquet as pq

from cpet_bench.folders import finish_folder, start_folder, write_json
from cpet_bench.runner import prepare

SIZES = {"compressions": 16, "pets": 8, "tasks": 1, "seeds": 5}  # 2,456 cells a model


def matrix(folder: Path, cells: int) -> Path:
    path = folder / "made.yaml"
    device = "device: {devices: [cpu], dtype: float32, threads: 1}\n"
    path.write_text(made_plans.text(models=max(1, round(cells / 2456)), **SIZES) + device)
    return path


def plan(folder: Path, cells: int) -> None:
    """Read, expand, key, and hold against an empty store; in this process, so that its peak is what is printed."""
    started = time.perf_counter()
    ready = prepare(matrix(folder, cells), store=str(folder / "store"), runs=folder / "runs")
    planned = time.perf_counter()
    missing = ready.missing()
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"plan: {len(ready.plan.cells):,} cells, {len(ready.plan.steps):,} steps, {len(missing):,} to run: {seconds:.1f} s"
        f" ({planned - started:.1f} s before looking into the store), peak {peak:.2f} GiB; wanted: 15 s, 1 GiB"
    )


def finished(folder: Path, cells: int) -> None:
    """`status` and a run in which everything is recorded, each as a process of its own."""
    path = matrix(folder, cells)
    ready = prepare(path, store=str(folder / "store"), runs=folder / "runs")
    start_folder(ready)
    outcomes = pa.Table.from_pylist(made_runs.rows([1.0, 0.0] * 50), schema=made_runs.SCHEMA)
    (ready.folder / "outcomes").mkdir()
    pq.write_table(outcomes, folder / "outcomes.parquet")
    for cell in ready.plan.cells:
        record = made_runs.record(**cell.axes)
        record |= {"id": cell.id, "axes": cell.axes, "run": "made", "matrix": "made"}
        record["provenance"]["keys"] = ready.plan.roles[cell.id]
        write_json(ready.folder / "records" / f"{cell.id}.json", record)
        shutil.copyfile(folder / "outcomes.parquet", ready.folder / "outcomes" / f"{cell.id}.parquet")
    (ready.folder / "events.jsonl").write_text(
        "".join(
            f'{{"time": 1.0, "event": "cell", "cell": "{cell.id}", "status": "done", "metric": "acc", "value": 0.5}}\n'
            for cell in ready.plan.cells
        )
    )
    finish_folder(ready, 1.0)
    words = ["--runs", str(folder / "runs")]
    run = ["run", str(path), *words, "--store", str(folder / "store")]
    print(f"{len(ready.plan.cells):,} finished cells; wanted: 5 s each")
    for name, command in (
        ("status", ["status", "made", *words]),
        ("run, no page", [*run, "--no-page"]),
        ("run, the page made", run),
        ("run, the page there", run),
    ):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "cpet_bench.cli.main", *command], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name}: {done.stderr[-2000:]}")
        print(f"  {name}: {time.perf_counter() - started:.2f} s")


def main() -> None:
    sizes = [int(word.replace(",", "")) for word in sys.argv[1:]] + [100_000, 10_000][len(sys.argv) - 1 :]
    with tempfile.TemporaryDirectory() as temporary:
        for name in ("plan", "finished"):
            Path(temporary, name).mkdir()
        process = os.fork()  # the peak of one must not hide in the other's
        if process == 0:
            plan(Path(temporary, "plan"), sizes[0])
            sys.stdout.flush()
            os._exit(0)
        if os.waitpid(process, 0)[1]:
            sys.exit("planning failed")
        finished(Path(temporary, "finished"), sizes[1])


if __name__ == "__main__":
    main()
