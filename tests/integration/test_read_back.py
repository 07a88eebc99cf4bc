"""Records that a real run wrote are read back, shown and compared."""

import io
import shutil

import pytest
import yaml
from rich.console import Console

from cpet_bench import load_records, run
from cpet_bench.check import compare
from cpet_bench.records import Record, read_outcomes, read_records
from cpet_bench.table import print_table


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request):
    """A run of an untrained model, dense and in four bits, and of a task whose prompt it has no chat template for."""
    place = tmp_path_factory.mktemp("read_back")
    shutil.copytree(request.config.rootpath / "matrices" / "smoke_task", place / "smoke_task")
    for name, prompt in (("good", {}), ("bad", {"chat_template": True})):
        matrix = {
            "name": name,
            "model": {"tiny": {"source": "tiny:llama"}},
            "compression": {"none": "none", "nf4": {"backend": "bitsandbytes", "type": "nf4"}},
            "pet": {"none": "none"},
            "restoring": {"vanilla": {}},
            "task": {"smoke_sentiment": {"include": "smoke_task", "limit": 30}},
            "seed": 0,
            "prompt": prompt,
            "probes": {"throughput": {"prompt_tokens": 8, "new_tokens": 2, "repeats": 2}},
            "device": {"devices": ["cpu"], "dtype": "float32", "threads": 1},
        }
        (place / f"{name}.yaml").write_text(yaml.safe_dump(matrix))
        run(place / f"{name}.yaml", store=str(place / "store"), runs=place / "runs")
    return place / "runs"


def test_real_records_fit_their_schema(folder):
    found = read_records(folder)
    assert [(r["run"], r["status"]) for r in found] == [("bad", "failed")] * 2 + [("good", "done")] * 2
    for record in found:
        again = Record.model_validate(record).model_dump(mode="json", by_alias=True, exclude_unset=True)
        assert again == record  # nothing was left out or turned into something else


def test_real_outcomes_agree_with_their_record(folder):
    frame = load_records(folder / "good").set_index("axes.compression")
    for record in read_records(folder / "good"):
        outcomes = read_outcomes(folder / "good", record["id"])
        for name in ("acc", "log_loss"):
            rows = outcomes[outcomes.metric == name]
            assert len(rows) == 30 and rows.value.mean() == pytest.approx(frame[name][record["axes"]["compression"]])


def test_a_real_run_is_shown_and_compared(folder):
    stream = io.StringIO()
    print_table(read_records(folder / "good") + read_records(folder / "bad"), Console(file=stream, width=180))
    text = stream.getvalue()
    assert "nf4" in text and "has no chat template" in text and text.count("done") == 2
    report = compare(folder / "good", folder / "good")
    assert report.exit_code == 0 and {c.verdict for c in report.cells} == {"no regression shown"}
    assert compare(folder / "bad", folder / "good").exit_code == 1
