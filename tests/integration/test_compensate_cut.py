"""Compensation of models whose layers lost inputs, against a least-squares fit to what the dense model really computes."""

import pytest
import torch
from inherited import EXAMPLES, STRUCTURED, folders  # noqa: F401
from safetensors.torch import load_file
from test_compensate import inputs_of, quiet

from compressed import compress as run_backend
from cpet_bench.compression.depth import Depth
from cpet_bench.compression.rtn import Rtn
from cpet_bench.compression.structured import Structured
from cpet_bench.errors import StepFailed, Unsupported
from cpet_bench.models.arch import block_linears, dense_weight
from cpet_bench.models.loading import load_model
from cpet_bench.restoring.compensate import compensation, input_moments
from cpet_bench.restoring.cuts import read_cuts
from cpet_bench.restoring.lost_inputs import RIDGE

DOCUMENTS = [[int(i) for i in torch.randint(3, 200, (40,), generator=torch.Generator().manual_seed(n))] for n in range(24)]
CHAINS = {
    "structured": [(Structured, STRUCTURED)],
    "structured, depth, rtn": [
        (Structured, {**STRUCTURED, "multiple": 16}),
        (Depth, {"drop": [1]}),
        (Rtn, {"bits": 3, "group": 16}),
    ],
}


def made(source, out, chain):
    for number, (backend, how) in enumerate(chain):
        run_backend(backend, source, out / str(number), EXAMPLES, **how)
        source = out / str(number)
    model = load_model(source)
    return model, read_cuts(model, source, len(chain))


def outputs_left(cut, total):
    if not cut or not cut.outputs:
        return list(range(total))
    return [run * (total // cut.runs) + i for run in range(cut.runs) for i in cut.outputs]


@pytest.mark.parametrize(
    ("arch", "chain"),
    [("llama", "structured, depth, rtn"), ("gpt2", "structured"), pytest.param("t5", "structured", marks=pytest.mark.slow)],
)
def test_the_inputs_left_stand_in_for_those_lost(folders, tmp_path, arch, chain):
    dense = load_model(folders / arch)
    seen, layers = inputs_of(dense, DOCUMENTS), block_linears(dense)
    input_moments(dense, DOCUMENTS, tmp_path / "moments", quiet)
    model, cuts = made(folders / arch, tmp_path, CHAINS[chain])
    facts, found = {}, {}
    for r in (4, 256):  # more than any layer's width: the whole error
        facts[r] = compensation(folders / arch, model, tmp_path / "moments", r, "eora", tmp_path / "out", quiet, cuts)
        found[r] = load_file(tmp_path / "out/recovery.safetensors")
    now, sums, shares = block_linears(model), dict.fromkeys(("whole", "before", 4, 256), 0.0), {}
    names = {here: was for was in layers if (here := cuts.renamed(was))}
    assert names.keys() == now.keys() and len(names) < len(layers) or cuts.blocks == {}
    for here, was in names.items():
        cut, w, x = cuts.layers.get(here), dense_weight(layers[was]).double(), seen[was]
        inputs = list(cut.inputs) if cut and cut.inputs else list(range(w.shape[1]))
        outputs = outputs_left(cut, len(w))
        wanted, left = x @ w[outputs].t(), x[:, inputs]
        own = left @ w[outputs][:, inputs].t()
        weight = (RIDGE * len(inputs) * left.square().mean(dim=0)).sqrt().diag()  # tokens times the ridge, whose root it is
        least = torch.linalg.lstsq(torch.cat([left, weight]), torch.cat([wanted - own, torch.zeros(len(inputs), len(outputs))]))
        best = own + left @ least.solution
        given = left @ dense_weight(now[here]).double().t()
        scale = wanted.square().sum()
        before = (wanted - given).square().sum()
        for r in (4, 256):
            made_up = left @ (found[r][f"{here}.U2"].double() @ found[r][f"{here}.U1"].double()).t()
            error = (wanted - given - made_up).square().sum()
            sums[r] += float(error)
            if r == 4 and before > 1e-9 * scale:
                shares.setdefault(here.rpartition(".")[2], []).append(float(error / before))
            if r == 256:
                assert (given + made_up - best).square().sum() < 1e-6 * scale, here
        sums["whole"] += float(scale)
        sums["before"] += float(before)
    for r in (4, 256):
        assert facts[r]["error_before"] == pytest.approx(sums["before"] / sums["whole"], rel=1e-3)
        assert facts[r]["error_after"] == pytest.approx(sums[r] / sums["whole"], rel=1e-2)
    assert facts[4]["left"] == pytest.approx(sum(map(sum, shares.values())) / sum(map(len, shares.values())), rel=1e-2)
    assert facts[4]["left_by_kind"] == pytest.approx({kind: sum(each) / len(each) for kind, each in shares.items()}, rel=1e-2)
    assert facts[256]["error_after"] < facts[4]["error_after"] < facts[4]["error_before"]


def test_few_tokens_do_no_harm(folders, tmp_path):
    """On text that was not calibrated on, with as many tokens as inputs: least squares alone has twenty times the error."""
    model, cuts = made(folders / "llama", tmp_path, CHAINS["structured"])
    dense = load_model(folders / "llama")
    seen, layers, now = inputs_of(dense, DOCUMENTS[1:]), block_linears(dense), block_linears(model)
    input_moments(dense, DOCUMENTS[:1], tmp_path / "moments", quiet)
    compensation(folders / "llama", model, tmp_path / "moments", 8, "eora", tmp_path / "out", quiet, cuts)
    found, errors = load_file(tmp_path / "out/recovery.safetensors"), [0.0, 0.0]
    for name in (n for n in now if n.endswith("down_proj")):
        x, w = seen[name], dense_weight(now[name]).double()
        for i, more in enumerate((0, found[f"{name}.U2"].double() @ found[f"{name}.U1"].double())):
            off = x @ dense_weight(layers[name]).double().t() - x[:, list(cuts.layers[name].inputs)] @ (w + more).t()
            errors[i] += float(off.square().sum())
    assert errors[1] < errors[0]


def test_no_error_or_other_inputs(folders, tmp_path):
    source = folders / "llama"
    short, cuts = made(source, tmp_path, [(Depth, {"drop": [1]})])
    for dtype in (torch.float32, torch.bfloat16):  # rounding is no error of the cut
        with pytest.raises(Unsupported, match="each layer that is left computes what it did, so there is no error to make up$"):
            compensation(source, short.to(dtype), None, 4, "svd", tmp_path / "out", quiet, cuts)
    narrow, cuts = made(source, tmp_path / "n", CHAINS["structured"])
    with pytest.raises(Unsupported, match="no error to make up; eora looks at how the inputs that a layer lost"):
        compensation(source, narrow, None, 4, "svd", tmp_path / "out", quiet, cuts)
    input_moments(narrow, DOCUMENTS[:2], tmp_path / "moments", quiet)
    with pytest.raises(Unsupported, match="other shapes"):  # of a model that was not cut, but trained to be another
        compensation(source, narrow, tmp_path / "moments", 4, "eora", tmp_path / "out", quiet)
    dense = load_model(source)
    input_moments(dense, DOCUMENTS[:2], tmp_path / "moments", quiet)
    index = (tmp_path / "moments/moments.json").read_text()
    (tmp_path / "moments/moments.json").write_text(index.replace("layers.0", "layers.9"))
    with pytest.raises(StepFailed, match="those of another model"):
        compensation(source, narrow, tmp_path / "moments", 4, "eora", tmp_path / "out", quiet, cuts)
    assert not (tmp_path / "out").exists()
