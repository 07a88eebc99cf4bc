"""Compensation in sequence, against a ridge regression written out on what both models really compute."""

import shutil

import pytest
import torch
from inherited import folders  # noqa: F401
from safetensors.torch import load_file
from test_compensate import inputs_of, quiet
from test_compensate_cut import CHAINS, DOCUMENTS, made, outputs_left
from transformers import BartConfig, BartForConditionalGeneration

from cpet_bench.compression.depth import Depth
from cpet_bench.compression.magnitude import Magnitude
from cpet_bench.errors import Unsupported
from cpet_bench.models.arch import block_linears, dense_weight
from cpet_bench.models.loading import load_model
from cpet_bench.models.passes import text_inputs
from cpet_bench.restoring import recover
from cpet_bench.restoring.compensate import compensation, input_moments
from cpet_bench.restoring.cuts import Cuts
from cpet_bench.restoring.lost_inputs import RIDGE
from cpet_bench.restoring.sequential import sequential_compensation
from cpet_bench.settings import RecoverSettings

PRUNED = [(Magnitude, {"pattern": "2:4"})]
OTHER = [[int(i) for i in torch.randint(3, 200, (40,), generator=torch.Generator().manual_seed(n))] for n in range(100, 116)]
WHOLE = 256  # more than any layer's width: the whole of what a linear map of its inputs can make up


def sequential(source, model, r, out, cuts=None):
    return sequential_compensation(load_model(source), source, model, DOCUMENTS, r, out, quiet, cuts)


def written(model, folders, out):
    model.save_pretrained(out)
    for file in (folders / "llama").glob("*token*"):
        shutil.copy(file, out / file.name)
    return out


@torch.no_grad()
def answers(model, documents=OTHER):
    """Logits of text that was not calibrated on, (tokens x vocabulary)."""
    return torch.cat([model(**text_inputs(model, [document])[0]).logits[0].double() for document in documents])


@pytest.mark.parametrize(
    ("arch", "chain"),
    [("llama", "pruned"), ("llama", "structured, depth, rtn"), ("gpt2", "structured"), ("t5", "structured")],
)
def test_each_layer_is_the_ridge_regression_on_what_reaches_it(folders, tmp_path, arch, chain):
    """What reaches a layer is read off the model with all parts in place: those that run after it do not change that."""
    model, cuts = made(folders / arch, tmp_path, CHAINS.get(chain, PRUNED))
    dense, own = load_model(folders / arch), {n: dense_weight(m).double() for n, m in block_linears(model).items()}
    facts = {r: sequential(folders / arch, model, r, tmp_path / str(r), cuts) for r in (4, WHOLE)}
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())  # given back as it was
    theirs, layers, sums = inputs_of(dense, DOCUMENTS), block_linears(dense), {}
    cuts = cuts or Cuts()
    names = {here: was for was in layers if (here := cuts.renamed(was))}
    for r in (4, WHOLE):
        weights = load_file(tmp_path / str(r) / "recovery.safetensors")
        recover.attach_saved_recovery(model, tmp_path / str(r))
        ours = inputs_of(model, DOCUMENTS)
        recover.detach_recovery(model)
        sums[r] = [0.0, 0.0, 0.0]
        for here, was in names.items():
            cut, w = cuts.layers.get(here), dense_weight(layers[was]).double()
            kept = list(cut.inputs) if cut and cut.inputs else list(range(w.shape[1]))
            w = w[outputs_left(cut, len(w))]
            wanted, x = theirs[was] @ w.t(), ours[here]
            part = weights[f"{here}.U2"].double() @ weights[f"{here}.U1"].double()
            ridge = (RIDGE * x.shape[1] * x.square().mean(dim=0)).sqrt().diag()  # times the tokens, whose root this is
            a, b = torch.cat([x, ridge]), torch.cat([wanted, ridge @ w[:, kept].t()])
            least = torch.linalg.lstsq(a, b).solution.t()
            e = least - own[here]
            q, _, _ = torch.linalg.svd(e @ a.t(), full_matrices=False)
            best = q[:, :r] @ q[:, :r].t() @ e
            scale = (a @ w[:, kept].t()).square().sum()
            assert (a @ (part - best).t()).square().sum() < 1e-5 * scale, here
            for i, off in enumerate((wanted, wanted - x @ own[here].t(), wanted - x @ (own[here] + part).t())):
                sums[r][i] += float(off.square().sum())
        whole, before, after = sums[r]
        assert facts[r]["error_before"] == pytest.approx(before / whole, rel=1e-2)
        assert facts[r]["error_after"] == pytest.approx(after / whole, rel=1e-2)
    assert not [m for m in dense.modules() if m._forward_pre_hooks or m._forward_hooks]
    assert facts[4]["sequential"] and facts[4]["documents"] == 24 and facts[4]["tokens"] == 960


@pytest.mark.parametrize("chain", ["pruned", "structured"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5"])
def test_on_other_text_the_model_is_nearer_than_with_each_layer_by_itself(folders, tmp_path, arch, chain):
    model, cuts = made(folders / arch, tmp_path, CHAINS.get(chain, PRUNED))
    dense = load_model(folders / arch)
    wanted, apart = answers(dense), []
    input_moments(dense if chain == "structured" else model, DOCUMENTS, tmp_path / "moments", quiet)
    compensation(folders / arch, model, tmp_path / "moments", 8, "eora", tmp_path / "each", quiet, cuts)
    sequential(folders / arch, model, 8, tmp_path / "sequential", cuts)
    plain = float((answers(model) - wanted).square().sum())
    for way in ("each", "sequential"):
        settings = RecoverSettings(r=8, act="identity", init="eora", sequential=way == "sequential")
        recover.attach_recovery(model, settings, seed=5, init=tmp_path / way)
        apart.append(float((answers(model) - wanted).square().sum()))
        recover.detach_recovery(model)
    assert apart[1] < apart[0] < plain


def test_blocks_that_are_gone_are_made_up_for(folders, tmp_path):
    """No layer that is left has an error of its own, and plain compensation none to start from."""
    model, cuts = made(folders / "llama", tmp_path, [(Depth, {"drop": [1]})])
    wanted = answers(load_model(folders / "llama"))
    plain = float((answers(model) - wanted).square().sum())
    facts = sequential(folders / "llama", model, 8, tmp_path / "out", cuts)
    recover.attach_recovery(model, RecoverSettings(r=8, act="identity", init="eora"), seed=5, init=tmp_path / "out")
    assert float((answers(model) - wanted).square().sum()) < plain
    assert facts["left_by_kind"] and 0 < facts["left"] < 1


def test_nothing_is_left_behind_the_last_block(folders, tmp_path):
    model, cuts = made(folders / "llama", tmp_path, [(Depth, {"drop": [len(load_model(folders / "llama").model.layers) - 1]})])
    with pytest.raises(Unsupported, match="so there is no error to make up"):
        sequential(folders / "llama", model, 4, tmp_path / "out", cuts)


def test_a_model_that_was_not_compressed_has_nothing_to_make_up(folders, tmp_path):
    dense = load_model(folders / "llama")
    facts = sequential_compensation(dense, folders / "llama", dense, DOCUMENTS, 4, tmp_path, quiet)
    assert facts["error_before"] == facts["error_after"] == 0 and facts["left"] is None
    before = answers(dense)
    recover.attach_saved_recovery(dense, tmp_path)
    torch.testing.assert_close(answers(dense), before, atol=1e-6, rtol=0)


@pytest.mark.parametrize("inputs", ["one a thousand times as large", "some that are zero in the calibration text"])
def test_inputs_that_hardly_go_keep_their_weights(folders, tmp_path, inputs):
    """An uncompressed model stays as it is, and a pruned one comes nearer than with each layer by itself."""
    dense = load_model(folders / "llama")
    with torch.no_grad():
        if inputs.startswith("one"):
            for layer in dense.model.layers:
                for norm, readers in (
                    (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
                    (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
                ):
                    norm.weight[5] *= 1000
                    for reader in readers:
                        reader.weight[:, 5] /= 1000
        else:  # calibration text has no token above 199
            for layer in dense.model.layers:
                layer.self_attn.o_proj.weight[5:9] = layer.mlp.down_proj.weight[5:9] = 0
            dense.model.embed_tokens.weight[:200, 5:9] = 0
    source = written(dense, folders, tmp_path / "dense")
    other = [[int(i) for i in torch.randint(3, 400, (40,), generator=torch.Generator().manual_seed(n))] for n in range(16)]
    wanted = answers(dense, other)
    same = load_model(source)
    sequential_compensation(dense, source, same, DOCUMENTS, 8, tmp_path / "same", quiet)
    recover.attach_saved_recovery(same, tmp_path / "same")
    torch.testing.assert_close(answers(same, other), wanted, atol=1e-6, rtol=0)
    model, cuts = made(source, tmp_path, PRUNED)
    input_moments(model, DOCUMENTS, tmp_path / "moments", quiet)
    compensation(source, model, tmp_path / "moments", 8, "eora", tmp_path / "each", quiet, cuts)
    sequential(source, model, 8, tmp_path / "sequential", cuts)
    apart = []
    for way in ("each", "sequential"):
        recover.attach_saved_recovery(model, tmp_path / way)
        apart.append(float((answers(model, other) - wanted).square().sum()))
        recover.detach_recovery(model)
    assert apart[1] < apart[0]


def test_blocks_that_give_no_tuple(folders, tmp_path):
    """BART's: the decoder reads what the encoder's last block gave, as that gives it."""
    how = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 128, "init_std": 0.08}
    torch.manual_seed(0)
    dense = BartForConditionalGeneration(BartConfig(vocab_size=512, decoder_start_token_id=2, **how, **heads)).eval()
    source = written(dense, folders, tmp_path / "dense")
    model, cuts = made(source, tmp_path, PRUNED)
    wanted, plain = answers(dense), answers(model)
    facts = sequential(source, model, 8, tmp_path / "out", cuts)
    recover.attach_saved_recovery(model, tmp_path / "out")
    assert (answers(model) - wanted).square().sum() < 0.7 * (plain - wanted).square().sum()
    assert facts["error_after"] < facts["error_before"]
