"""Records are read back whole, migrated, checked; damage is named."""

import json
import time

import pandas as pd
import pytest
from made_runs import metric, record, rows, write_run

from cpet_bench import load_records, records
from cpet_bench.errors import InputError
from cpet_bench.records import read_outcomes, read_records, record_schema


def test_order_is_the_matrixs(tmp_path):
    made = [record("wanda24"), record("nf4"), record("none")]
    run = write_run(tmp_path / "run", made)
    assert [r["id"] for r in read_records(run)] == [r["id"] for r in made]
    (run / "run.json").unlink()  # a run that was killed has none
    assert [r["axes"]["compression"] for r in read_records(run)] == ["nf4", "none", "wanda24"]


def test_folder_of_runs(tmp_path):
    for name in ("b", "a"):
        write_run(tmp_path / name, [record(compression=name)])
    (tmp_path / "notes").mkdir()
    assert [r["axes"]["compression"] for r in read_records(tmp_path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "key", "message"),
    [
        ("{", None, "damaged"),
        ("[]", "schema", "no record"),
        ('{"schema": 1}', "id", "required"),
        ('{"schema": 99}', "schema", "later than this program's"),
        ('{"schema": 1, "id": NaN}', None, "damaged"),
    ],
)
def test_damage_is_named(tmp_path, text, key, message):
    run = write_run(tmp_path / "run", [record()])
    path = run / "records" / "x.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_records(run)
    assert caught.value.file == path and caught.value.key == key


def test_unknown_and_wrong_fields_are_refused(tmp_path):
    for change in ({"surprise": 1}, {"status": "great"}, {"metrics": {"acc": {"value": 1.0}}}):
        run = write_run(tmp_path / f"run{len(list(tmp_path.iterdir()))}", [record() | change])
        with pytest.raises(InputError) as caught:
            read_records(run)
        assert caught.value.key.split(".")[0] == next(iter(change))


def test_missing_folder_suggests(tmp_path):
    write_run(tmp_path / "default", [record()])
    with pytest.raises(InputError, match="Did you mean default"):
        read_records(tmp_path / "defualt")
    with pytest.raises(InputError, match="holds no run"):
        read_records(tmp_path / "default" / "records")


def test_migrations_are_applied_in_order(tmp_path, monkeypatch):
    first = {k: v for k, v in record().items() if k != "simulated"} | {"flops": 7}
    second = record() | {"schema": 2, "simulated": ["two"]}
    run = write_run(tmp_path / "run", [first | {"id": "a"}, second | {"id": "b"}])

    def to_2(r):
        return {k: v for k, v in r.items() if k != "flops"} | {"simulated": ["one"]}

    def to_3(r):
        return r | {"simulated": [*r["simulated"], "three"]}

    monkeypatch.setattr(records, "MIGRATIONS", [to_2, to_3])
    found = read_records(run)
    assert [(r["schema"], r["simulated"]) for r in found] == [(3, ["one", "three"]), (3, ["two", "three"])]
    assert record_schema()["properties"]["schema"]["const"] == 3


def test_schema_is_closed_and_complete():
    schema = record_schema()
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(record())
    assert schema["properties"]["schema"]["const"] == record()["schema"]
    json.dumps(schema)


def test_load_records(tmp_path):
    metrics = {"acc": metric(0.81, 0.75, 0.86), "word_perplexity": metric(12.0, higher=False)}
    run = write_run(tmp_path / "run", [record(metrics=metrics, speed=(90, 100, 110)), record("wanda24", status="failed")])
    frame = load_records(run)
    assert len(frame) == 2 and list(frame["axes.compression"]) == ["nf4", "wanda24"]
    row = frame.iloc[0]
    assert (row["acc"], row["acc.low"], row["acc.high"]) == (0.81, 0.75, 0.86)
    assert row["word_perplexity"] == 12.0 and pd.isna(row["word_perplexity.low"])
    assert (row["probes.prefill"], row["probes.prefill.high"]) == (100, 110)
    assert row["training.trainable_parameters"] == 4_880_000 and row["costs.seconds"] == 75.0
    failed = frame.iloc[1]
    assert failed["status"] == "failed" and "not finite" in failed["reason"] and pd.isna(failed["acc"])


def test_read_outcomes(tmp_path):
    one = record()
    run = write_run(tmp_path / "run", [one], {one["id"]: rows([1, 0, None])})
    frame = read_outcomes(run, one["id"])
    assert list(frame.value[:2]) == [1.0, 0.0] and pd.isna(frame.value[2]) and set(frame.metric) == {"acc"}
    with pytest.raises(InputError, match="Did you mean tiny--nf4--lora--cpet--movies--s0"):
        read_outcomes(run, "tiny--nf4--lora--cpet--movie--s0")
    (run / "outcomes" / f"{one['id']}.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match="damaged"):
        read_outcomes(run, one["id"])


def test_many_records_are_read_fast(tmp_path):
    metrics = {name: metric(0.8, 0.7, 0.9) for name in ("acc", "acc_norm", "f1", "auroc", "log_loss")}
    made = record(metrics=metrics, speed=(90, 100, 110))
    write_run(tmp_path / "run", [made | {"id": f"cell{i}"} for i in range(2000)])
    started = time.process_time()
    assert len(read_records(tmp_path / "run")) == 2000
    assert time.process_time() - started < 1.5  # 0.6 is what 10,000 in 3 s allows; the rest is for a busy machine
