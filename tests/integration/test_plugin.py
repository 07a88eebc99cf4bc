"""The tutorial's code, taken out of docs/plugin.md and run as a user would: as an installed plugin."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[2]

MATRIX = """
name: plugin
model:
  tiny: {{source: "tiny:llama", options: {{hidden: 64, layers: 2, heads: 4, seed: 0}}}}
compression:
  none: none
  round3: {{backend: rounding, bits: 3}}
  mix: [{{backend: magnitude, pattern: "2:4"}}, {{backend: rounding, bits: 4}}]
pet: {{none: none}}
restoring: {{vanilla: {{}}}}
task: {{smoke_sentiment: {{include: "{include}", limit: 20}}}}
probes: {{throughput: false}}
device: {{devices: [cpu], dtype: float32, threads: 1}}
"""


def test_tutorial_plugin_runs(tmp_path):
    text = (REPO / "docs/plugin.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    points = re.search(r'\[project.entry-points."(.*?)"\]\n(.*?)\n```', text, re.DOTALL)
    site = tmp_path / "site"
    info = site / "rounding_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "rounding_plugin.py").write_text(code)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rounding-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{points[1]}]\n{points[2]}\n".replace('"', ""))
    matrix = tmp_path / "plugin.yaml"
    matrix.write_text(MATRIX.format(include=REPO / "matrices/smoke_task"))
    env = {**os.environ, "PYTHONPATH": str(site), "CPET_BENCH_STORE": str(tmp_path / "store")}

    def cpet(*words):
        command = [sys.executable, "-m", "cpet_bench.cli.main", *words]
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=300)

    done = cpet("run", str(matrix))
    assert done.returncode == 0, done.stderr
    records = {p.stem: json.loads(p.read_text()) for p in (tmp_path / "runs/plugin/records").glob("*.json")}
    by_name = {r["axes"]["compression"]: r for r in records.values()}
    assert set(by_name) == {"none", "round3", "mix"} and all(r["status"] == "done" for r in records.values())
    assert by_name["round3"]["simulated"] == ["size", "speed"]
    steps = by_name["mix"]["compression"]["steps"]
    assert [s["backend"] for s in steps] == ["magnitude", "rounding"] and steps[0]["zeros_checked"] and steps[1]["bits"] == 4
    assert by_name["none"]["metrics"]["log_loss"]["value"] != by_name["round3"]["metrics"]["log_loss"]["value"]

    matrix.write_text(matrix.read_text().replace("bits: 3", "bitz: 3"))
    wrong = cpet("plan", str(matrix))
    assert wrong.returncode == 2 and "bits" in wrong.stderr and "Traceback" not in wrong.stderr
