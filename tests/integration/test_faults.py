"""Steps that hang, crash, or take all memory, and slow ones at a stop: through a real plugin, in real workers."""

import json
import os
import signal
import time

import pytest

from conftest import REPO, Cli

PLUGIN = '''
import ctypes, os, resource, time
from pathlib import Path
from typing import Literal
from cpet_bench.settings import Settings

class Faulty:
    name, version, packages, calibrated = "faulty", 1, (), False

    class Settings(Settings):
        how: Literal["hang", "crash", "bytes", "tensor", "slow"]

    @staticmethod
    def structure(settings):
        return {}

    @staticmethod
    def refuse(settings, before):
        return None

    @staticmethod
    def compress(source, out, settings, *, examples, device, dtype, progress, seed=0):
        import torch
        print("about to", settings.how)
        progress(0, 1, settings.how)
        if settings.how == "hang":
            time.sleep(1000)
        if settings.how == "crash":
            ctypes.string_at(0)
        if settings.how in ("bytes", "tensor"):
            before = resource.getrlimit(resource.RLIMIT_AS)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), before[1]))
            try:
                bytearray(1 << 30) if settings.how == "bytes" else torch.zeros(1 << 30)
            finally:
                resource.setrlimit(resource.RLIMIT_AS, before)
        if settings.how == "slow":
            for _ in range(30):
                time.sleep(0.1)
        for name in os.listdir(source):
            (Path(out) / name).write_bytes((Path(source) / name).read_bytes())
        return {"simulated": []}
'''

MATRIX = """
name: faults
model:
  tiny: {{source: "tiny:llama", options: {{hidden: 64, layers: 2, heads: 4, seed: 0}}}}
compression: {{none: none, {compressions}}}
pet: {{none: none}}
restoring: {{vanilla: {{}}}}
task: {{smoke_sentiment: {{include: "{include}", limit: 20}}}}
probes: {{throughput: false, memory: false}}
device: {{devices: [cpu], dtype: float32, threads: 1}}
limits: {{compress: {limit}}}
"""


@pytest.fixture
def plugin(tmp_path):
    info = tmp_path / "site" / "faulty_plugin-1.0.dist-info"
    info.mkdir(parents=True)
    (tmp_path / "site/faulty_plugin.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[cpet_bench.compression]\nfaulty = faulty_plugin:Faulty\n")
    cli = Cli(tmp_path, PYTHONPATH=os.pathsep.join([str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]))

    def matrix(*ways: str, limit: str):
        path = tmp_path / "faults.yaml"
        found = ", ".join(f"{way}: {{backend: faulty, how: {way}}}" for way in ways)
        path.write_text(MATRIX.format(compressions=found, include=REPO / "matrices/smoke_task", limit=limit))
        return path

    cli.faulty = matrix
    return cli


def test_a_faulty_step_fails_its_own_cell_alone_and_says_how(plugin):
    done = plugin("run", plugin.faulty("hang", "crash", "bytes", "tensor", limit="2s"), "--no-page")
    records = {r["axes"]["compression"]: r for r in plugin.records("faults").values()}
    assert done.returncode == 4 and "Traceback" not in done.stderr
    assert {name: r["status"] for name, r in records.items()} == {
        "none": "done",
        **dict.fromkeys(("hang", "crash", "bytes", "tensor"), "failed"),
    }
    reasons = {name: r["reason"] for name, r in records.items() if r["reason"]}
    assert reasons["hang"]["type"] == "TimeLimit" and "longer than its limit of 2 s" in reasons["hang"]["message"]
    assert reasons["crash"]["type"] == "WorkerDied" and "ended twice" in reasons["crash"]["message"]
    assert "SIGSEGV" in reasons["crash"]["message"]
    for way in ("bytes", "tensor"):
        assert reasons[way]["type"] == "OutOfMemory" and "ut of memory" in reasons[way]["message"]
    for way, reason in reasons.items():
        assert f"about to {way}" in reason["log"] and reason["step"].startswith("compress")
    died = [e for e in plugin.events("faults") if e["event"] == "worker-died"]
    assert [e["code"] for e in died] == [-signal.SIGSEGV] * 2
    spent = {e["kind"]: e for e in plugin.events("faults") if e["event"] == "failed" and "hang" in e["label"]}
    assert spent  # and it is in the log, too


def test_a_stop_waits_for_a_slow_step_to_be_kept(plugin):
    matrix = plugin.faulty("slow", limit="1min")
    process = plugin.start("run", matrix, "--no-page", "--json", "--only", "compression=slow")
    for line in process.stdout:
        row = json.loads(line)
        if row["event"] == "progress" and row["text"] == "slow":
            break
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and 1.5 < time.monotonic() - began < 20, err
    done = [json.loads(line) for line in out.splitlines()]
    assert [e["label"] for e in done if e["event"] == "done"] == [row["label"]]
    assert "1 damaged" not in plugin("cache", "verify").stdout
    ls = plugin("cache", "ls").stdout
    assert "compress tiny to slow" in ls and "unfinished" not in ls
