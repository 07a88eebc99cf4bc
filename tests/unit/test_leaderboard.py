"""The page against the records it is made of: every cell, every number, nothing that runs or loads from elsewhere."""

import base64
import hashlib
import html
import itertools
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import made_records as made
from cpet_bench.cli.main import main
from cpet_bench.errors import InputError
from cpet_bench.stats import tango_interval
from cpet_leaderboard import build, charts, payload, text, view


class Page(HTMLParser):
    """What a browser would make of the page, as far as the tests look: rows of cells, tags, scripts and styles."""

    def __init__(self, source: str):
        super().__init__()
        self.source, self.tags, self.rows, self.inline = source, [], [], []
        self._row = self._cell = self._raw = None
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self._row = (dict(attrs), [])
        elif tag in ("td", "th") and self._row is not None:
            self._cell = []
        elif tag in ("script", "style"):
            self._raw = (tag, dict(attrs), [])

    def handle_data(self, data):
        if self._raw is not None:
            self._raw[2].append(data)
        elif self._cell is not None:
            self._cell.append(data)

    def handle_endtag(self, tag):
        if tag in ("td", "th") and self._cell is not None:
            self._row[1].append(" ".join("".join(self._cell).split()))
            self._cell = None
        elif tag == "tr":
            self.rows.append(self._row)
            self._row = None
        elif tag in ("script", "style"):
            self.inline.append((tag, self._raw[1], "".join(self._raw[2])))
            self._raw = None

    @property
    def cells(self) -> dict[int, list[str]]:
        return {int(a["id"][1:]): found for a, found in self.rows if "id" in a}

    @property
    def headings(self) -> list[str]:
        return next(found for a, found in self.rows if "class" not in a and "id" not in a)

    @property
    def data(self) -> dict:
        return json.loads(next(body for tag, a, body in self.inline if a.get("id") == "data"))


def page_of(tmp_path, *folders) -> Page:
    return Page(build(list(folders), tmp_path / "page.html").read_text(encoding="utf-8"))


@pytest.fixture
def twelve(tmp_path):
    return made.twelve(tmp_path / "runs" / "made")


def records_of(folder) -> list[dict]:
    order = json.loads((folder / "run.json").read_text())["cells"]
    return [json.loads((folder / "records" / f"{name}.json").read_text()) for name in order]


def test_every_cell_and_its_numbers(tmp_path, twelve):
    page, records = page_of(tmp_path, twelve), records_of(twelve)
    assert len(page.cells) == len(records) == 12
    headings = [h.split(" ")[0] for h in page.headings]
    assert headings[:8] == ["compression", "PET", "restoring", "seed", "acc", "AUROC", "log-loss", "gap"]
    dense = {r["id"]: r for r in records}
    for i, record in enumerate(records):
        found = page.cells[i]
        axes = record["axes"]
        assert found[:4] == [axes["compression"], axes["pet"], axes["restoring"], str(axes["seed"])]
        if record["status"] != "done":
            assert len(found) == 5 and "failed" in found[4] and record["reason"]["message"] in found[4]
            continue
        m, probes, training = record["metrics"], record["probes"], record["training"] or {}
        acc = m["acc"]
        assert found[4] == f"{acc['value']:.3f} {acc['low']:.3f}–{acc['high']:.3f}"
        assert found[5:7] == [f"{m['auroc']['value']:.3f}", f"{m['log_loss']['value']:.3f}"]
        reference = record["references"]["dense_pet"]
        gap = acc["value"] - dense[reference]["metrics"]["acc"]["value"] if reference else None
        assert found[7] == ("–" if gap is None else f"{gap:+.3f}".replace("-", "−"))
        trainable = training.get("trainable_parameters")
        assert found[8] == ("0.001" if training else "–")
        assert found[9] == {None: "–", 921_600: "0.922", 9_805_824: "9.81"}[trainable]
        assert found[10] == f"{probes['disk']['value'] / 1e6:.0f}" and found[11] == f"{probes['resident']['value'] / 1e6:.0f}"
        simulated = "sim." if record["simulated"] else ""
        assert found[13].endswith(simulated) and found[13].startswith(f"{probes['decode']['value']:.1f}")
        assert found[14] == ("44" if record["compression"] else "–")
        assert found[16] == ("40" if (training or {}).get("inherited") else "–")
        assert found[17] == "410"


def test_data_is_the_records(tmp_path, twelve):
    data, records = page_of(tmp_path, twelve).data, records_of(twelve)

    def whole(x):
        if isinstance(x, dict) and "$" in x:
            x = data["pool"][x["$"]]
        return {k: whole(v) for k, v in x.items()} if isinstance(x, dict) else x

    for cell, record in zip(data["cells"], records, strict=True):
        for name in ("id", "axes", "status", "reason", "primary", "compression", "costs", "simulated", "settings"):
            assert whole(cell[name]) == record[name], name
        for part in ("metrics", "probes"):
            for name, (value, low, high, rest) in cell[part].items():
                wanted = record[part][name]
                assert {"low": None, "high": None, **wanted} == {**whole(rest), "value": value, "low": low, "high": high}
        assert whole(cell["provenance"]) == record["provenance"]
        if record["training"]:
            assert cell["losses"]["step"] == list(range(1, 41))
            wanted = [float(f"{row['loss']:.4g}") for row in record["training"]["losses"]]
            assert cell["losses"]["loss"] == wanted and "losses" not in cell["training"]
            assert ("distill" in cell["losses"]) == bool(record["training"]["inherited"])


NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;<!--\u2028"


def test_nothing_from_records_becomes_markup(tmp_path):
    axes = {"model": NASTY[:60], "compression": "a\"><b onclick='x'>", "pet": "lora", "restoring": "{{ 7*7 }}", "task": "<i>t"}
    axes["seed"] = 0
    good, bad = made.record(axes), made.record({**axes, "seed": 1}, acc=None)
    good["id"], bad["id"] = "good", "bad"
    bad["reason"] = {"type": "<svg/onload=1>", "message": NASTY, "step": NASTY, "log": NASTY}
    good["metrics"]["</td><script>m"] = good["metrics"]["acc"]
    good["primary"] = "</td><script>m"
    good["provenance"]["device"]["name"] = NASTY
    page = page_of(tmp_path, made.write(tmp_path / "runs" / "made", [good, bad], matrix_text=NASTY))
    assert [tag for tag, _ in page.tags].count("script") == 2 and not any(tag in ("img", "b onclick") for tag, _ in page.tags)
    assert not any(name.startswith("on") or name == "style" for _, attrs in page.tags for name in attrs)
    assert page.cells[0][:3] == ["a\"><b onclick='x'>", "lora", "{{ 7*7 }}"]
    assert page.cells[1][-1].startswith("failed <svg/onload=1>: </script><script>alert(1)</script>")
    raw = re.search(r'id="data"[^>]*>(.*?)</script>', page.source, re.DOTALL)[1]
    assert not re.search(r"[<>&\u2028\u2029]", raw)
    assert page.data["cells"][1]["reason"]["message"] == NASTY
    assert html.unescape(re.search(r"<pre[^>]*>(.*?)</pre>", page.source, re.DOTALL)[1]) == NASTY


def test_policy_and_nothing_from_elsewhere(tmp_path, twelve):
    page = page_of(tmp_path, twelve)
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(r.strip().split(" ", 1) for r in policy.split(";"))
    assert rules["default-src"] == "'none'" and "unsafe" not in policy
    for tag, attrs, body in page.inline:
        if attrs.get("type") == "application/json":
            continue
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
    for tag, attrs in page.tags:
        assert not {"src", "srcset", "action", "data", "xlink:href"} & attrs.keys(), tag
        assert attrs.get("href", "#").startswith(("#", "data:,"))
    css = next(body for tag, _, body in page.inline if tag == "style")
    assert "url(" not in css and "@import" not in css
    script = [body for tag, attrs, body in page.inline if tag == "script" and "type" not in attrs][0]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(|XMLHttp", script)
    assert set(re.findall(r"https?://[^\"'\s<]+", page.source)) == {"http://www.w3.org/2000/svg"}


def test_what_is_not_done_says_why(tmp_path):
    axes = {"model": "m", "compression": "gptq", "pet": "lora", "restoring": "vanilla", "task": "t", "seed": 0}
    failed, unsupported, pending = (made.record({**axes, "seed": s}, acc=None) for s in range(3))
    unsupported |= {"status": "unsupported", "reason": {**failed["reason"], "type": "Unsupported", "message": "no gradient"}}
    pending |= {"status": "pending", "reason": None}
    page = page_of(tmp_path, made.write(tmp_path / "runs" / "made", [failed, unsupported, pending]))
    last = [page.cells[i][-1] for i in range(3)]
    assert last[0].startswith("failed StepFailed: the loss is not finite") and "tune m--gptq" in last[0]
    assert last[1].startswith("unsupported Unsupported: no gradient") and last[2] == "pending not run yet"
    assert page.data["cells"][0]["reason"]["log"].endswith("not finite at step 12")


def test_seeds_and_several_runs(tmp_path):
    one = made.twelve(tmp_path / "runs" / "one")
    two = made.twelve(tmp_path / "runs" / "two", seeds=(0, 1), tasks=("movie_reviews", "tweets"))
    assert "One seed (0): every figure is conditional on this seed" in page_of(tmp_path, one).source
    page = page_of(tmp_path, one, two)
    assert "2 seeds (0, 1)" in page.source and len(page.cells) == 12 + 48 and page.headings[0] == "run"
    assert page.source.count('<section class="group"') == 2
    again = page_of(tmp_path, tmp_path / "runs")  # a folder of runs; the same page
    assert again.source == page.source
    data = page.data["cells"]
    for cell in data:  # references stay within their run
        for name, row in cell["references"].values():
            assert data[row]["id"] == name and data[row]["run"] == cell["run"]


def test_gap_interval_is_paired(tmp_path, twelve):
    records = {r["id"]: r for r in records_of(twelve)}
    name, dense = "smollm2--nf4--lora--vanilla--movie_reviews--s0", "smollm2--none--lora--vanilla--movie_reviews--s0"
    a, b = made.rights(records[name]), made.rights(records[dense])
    gained, lost = sum(x > y for x, y in zip(a, b, strict=True)), sum(x < y for x, y in zip(a, b, strict=True))
    by_id = {c["id"]: c for c in page_of(tmp_path, twelve).data["cells"]}
    gap, low, high = by_id[name]["gap"]
    assert gap == pytest.approx((gained - lost) / 500) and (low, high) == pytest.approx(tango_interval(gained, lost, 500))
    assert by_id[dense]["gap"] == [None, None, None]
    made.outcomes(twelve, records[name], [1.0] * 500)  # not what the record says: no interval, but the gap stays
    assert {c["id"]: c for c in page_of(tmp_path, twelve).data["cells"]}[name]["gap"] == [gap, None, None]


def test_same_records_same_bytes(tmp_path, twelve):
    first = build([twelve], tmp_path / "a.html").read_bytes()
    assert build([twelve], tmp_path / "b" / "c.html").read_bytes() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "b", "runs"]


def test_columns_without_values_are_left_out(tmp_path):
    axes = {"model": "m", "compression": "none", "pet": "none", "restoring": "vanilla", "task": "g", "seed": 0, "adapters": 4}
    record = made.record(axes)
    record["metrics"] = {"g/exact_match": {**record["metrics"]["acc"], "low": None, "high": None}}
    record |= {"primary": "g/exact_match", "probes": {"disk": record["probes"]["disk"]}}
    page = page_of(tmp_path, made.write(tmp_path / "runs" / "made", [record]))
    first = [h.split(" ")[0] for h in page.headings]
    assert first == ["compression", "PET", "restoring", "seed", "adapters", "g/exact_match", "on", "in"]
    assert "no interval" in page.cells[0][5]


def test_a_rate_at_the_edge_of_what_was_tried_is_marked(tmp_path, twelve):
    assert "a better one may lie beyond" not in page_of(tmp_path, twelve).source
    axes = {"model": "m", "compression": "none", "pet": "lora", "restoring": "cpet", "task": "t"}
    records = [made.record({**axes, "seed": i}) for i in range(3)]
    for record, at_the_edge in zip(records, (True, False, True), strict=True):
        record["training"]["selection"] = {"chosen": {"lr": 1e-3}, "at_the_edge": at_the_edge}
    records[2]["training"]["steps"] = 0  # put together of what was trained elsewhere
    page = page_of(tmp_path, made.write(tmp_path / "runs" / "edge", records))
    assert [row[7] for row in page.cells.values()] == ["0.001edge", "0.001", "–"]
    assert "a better one may lie beyond" in page.source


def test_large_tables(tmp_path):
    axes = {"model": "m", "compression": "c", "pet": "lora", "restoring": "cpet", "task": "t"}
    every = [{**axes, "seed": i} for i in range(1200)]
    records = [made.record(a, acc=0.5 + i / 4000, disk=100 + i) for i, a in enumerate(every)]
    page = page_of(tmp_path, made.write(tmp_path / "runs" / "made", records))
    assert len(page.cells) == 1200 and len(page.source) < 1200 * 4500
    assert sum("more" in a.get("class", "").split() for a, _ in page.rows) == 1200 - 300  # there, and laid out when asked for
    assert len(page.data["cells"][0]["losses"]["step"]) <= 41 and page.data["cells"][0]["losses"]["step"][-1] == 40


def test_ranks_order_as_a_person_would():
    assert view.rank(["lora-r16", "lora-r8", "ia3", "lora-r8"]) == [2, 1, 0, 1]
    assert view.rank([3.0, None, -1, float("nan"), 3]) == [1, -1, 0, -1, 1]


def test_text_and_scales():
    assert [text.metric(x) for x in (0.12345, -0.5, 12.345, 1234.56, None)] == ["0.123", "−0.500", "12.35", "1,234.6", "–"]
    assert [text.figure(x) for x in (0.0123, 1.234, 12.34, 123.4)] == ["0.012", "1.23", "12.3", "123"]
    assert [text.figure(x) for x in (12345.6, 40, None)] == ["12,346", "40", "–"] and text.figure(5e6, 1e6) == "5"
    assert charts.ticks(0, 291) == [0, 100, 200] and charts.ticks(0.47, 0.93) == [0.5, 0.6, 0.7, 0.8, 0.9]
    assert charts.ticks(1, 1) == [1]
    low, high = charts.domain([0.9, 0.99, None])
    assert low < 0.9 and 0.99 < high <= 1.0
    drawn = charts.bar(0.5, 0.25, 0.75, None, (0.0, 1.0))
    left, right = drawn["ends"]
    assert drawn["x"] == (left + right) / 2 == charts.BAR[0] / 2 and drawn["reference"] is None
    rows = [{"step": i, "loss": 1.0, "task": 1.0, "distill": None} for i in range(1000)]
    assert payload.losses(rows, 100)["step"][-1] == 999
    for row in rows:
        row["validation"] = abs(row["step"] - 503) + 0.5 if row["step"] % 7 == 6 else None
    kept = payload.losses(rows, 100)
    seen = [v for v in kept["validation"] if v is not None]
    assert len(kept["step"]) < 300 and 50 < len(seen) < 150 and kept["validation"][kept["step"].index(503)] == min(seen) == 0.5
    assert kept["step"] == sorted(kept["step"]) and kept["step"][-1] == 999 and "task" not in kept


def test_perplexities_of_many_sizes_are_drawn_by_their_logarithm():
    values = [10.0, 100.0, 1000.0]
    assert charts.wide(values) and not charts.wide([0.1, 0.9]) and not charts.wide([0.0, 900.0]) and not charts.wide([None])
    assert charts.powers(9, 1100) == [10, 20, 50, 100, 200, 500, 1000] and charts.powers(1, 1e4) == [1, 10, 100, 1000, 10000]
    span = charts.log_domain(values)
    places = [charts.bar(v, None, None, None, span, True)["x"] for v in values]
    assert places[1] - places[0] == pytest.approx(places[2] - places[1], abs=0.15) and places[1] == charts.BAR[0] / 2
    points = [
        {"x": 1.0, "y": v, "low": v / 1.1, "high": v * 1.1, "colour": 0, "shape": 0, "simulated": False, "row": 0, "text": ""}
        for v in values
    ]
    chart = charts.scatter(points, "t", "x", "y", None)
    assert [t for _, t in chart.y_ticks] == ["10", "20", "50", "100", "200", "500", "1,000"]
    ys = [p["y"] for p in chart.points]
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.15) and ys[0] > ys[1]


def test_of_one_compression_both_looks_stand_for_the_method_and_quality_for_what_was_trained():
    """Nine PET methods of 1,000 to 100 million parameters, and one that put together what was trained elsewhere."""
    axes = {"model": "tiny", "compression": "none", "restoring": "vanilla", "task": "movies", "seed": 0}
    records = [made.record(axes | {"pet": f"m{i}"}) for i in range(10)]
    for i, r in enumerate(records):
        r["training"] |= {"steps": 40 if i < 9 else 0, "trainable_parameters": round(10 ** (3 + i * 5 / 8))}
    table = view.fill(view.Table("tiny", "movies", [view.Entry(r, "made") for r in records]), ["compression", "pet"])
    chart = table.charts[0]
    assert chart.title == "Quality by trained parameters" and len(chart.points) == 9
    steps = {round(b["x"] - a["x"]) for a, b in itertools.pairwise(chart.points)}
    assert max(steps) - min(steps) <= 1 and [t for _, t in chart.x_ticks][0] == "1"
    looks = [(p["colour"], p["shape"]) for p in chart.points]
    assert len(set(looks)) == 9 and looks[8] == (0, 1) and table.coloured == "PET and restoring" and not table.shapes
    assert [(c, s) for _, c, s in table.colours][:9] == looks and table.colours[0][0] == "m0 · vanilla"
    for r in records:  # all of one size: nothing to draw by it
        r["training"]["trainable_parameters"] = 5
    table = view.fill(view.Table("tiny", "movies", [view.Entry(r, "made") for r in records]), ["compression", "pet"])
    assert [c.title for c in table.charts] == ["Quality by size on disk", "Quality by decoding speed"]


@pytest.mark.parametrize("case", ["missing", "empty", "no records", "damaged run.json", "damaged record"])
def test_clear_errors(tmp_path, twelve, case, capsys):
    folder = twelve.parent / "mode"
    if case != "missing":
        (folder / "records").mkdir(parents=True) if case != "empty" else folder.mkdir()
    if case.startswith("damaged"):
        made.twelve(folder)
        spoiled = folder / "run.json" if case == "damaged run.json" else next((folder / "records").glob("*.json"))
        spoiled.write_text("{")
    with pytest.raises(InputError):
        build([folder], tmp_path / "page.html")
    assert main(["leaderboard", "mode", "--runs", str(twelve.parent), "-o", str(tmp_path / "page.html")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("cpet-bench: ") and said.count("\n") == 1 and not (tmp_path / "page.html").exists()
    if case == "missing":
        assert "Did you mean made?" in said


def test_command_line_without_torch(tmp_path, twelve):
    code = (
        "import sys; from cpet_bench.cli.main import main; status = main(sys.argv[1:]);"
        "print([m for m in ('torch', 'transformers', 'peft', 'lm_eval', 'datasets') if m in sys.modules]); sys.exit(status)"
    )
    words = ["leaderboard", "made", "--runs", str(twelve.parent)]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == [str(twelve / "leaderboard.html"), "[]"]
    assert (twelve / "leaderboard.html").stat().st_size > 10_000
    assert main(["leaderboard", "made", "made", "--runs", str(twelve.parent)]) == 2  # several runs: where to?
    assert main(["leaderboard", "made", "--runs", str(twelve.parent), "-o", str(tmp_path)]) == 2  # a folder
