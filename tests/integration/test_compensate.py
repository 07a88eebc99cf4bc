"""Compensation against its formula written out with full decompositions in fp64, and on models as a matrix compresses them."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cpet_bench.compression.bnb import BitsAndBytes
from cpet_bench.compression.magnitude import Magnitude
from cpet_bench.errors import StepFailed, Unsupported
from cpet_bench.models import tiny
from cpet_bench.models.arch import block_linears, dense_weight, features
from cpet_bench.models.loading import load_model
from cpet_bench.restoring import compensate, recover
from cpet_bench.restoring.compensate import compensation, input_moments
from cpet_bench.settings import RecoverSettings

ARCHITECTURES = ("llama", "gpt2", "t5")


def quiet(done, total, text):
    assert 0 < done <= total


def naive(e, h, r):
    """METHODS' formula as it stands: H = Q D QT with D floored, E Q sqrt(D) = U S VT, U2 = U S, U1 = VT / sqrt(D) QT."""
    e = e.double().numpy()
    values, q = np.linalg.eigh(np.eye(e.shape[1]) if h is None else h.double().numpy())
    values = np.maximum(values, 1e-6 * values[-1])
    u, s, vt = np.linalg.svd(e @ q * np.sqrt(values), full_matrices=False)
    return torch.from_numpy((u[:, :r] * s[:r]) @ (vt[:r] / np.sqrt(values) @ q.T)), q * np.sqrt(values)


def low_rank(e, h, r):
    root = None if h is None else compensate.moment_root(h)
    return compensate.low_rank(e, root, r, torch.Generator().manual_seed(0))


def moment(n, tokens, decades, generator):
    """A second moment whose eigenvalues go through so many decades, of a random basis."""
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator))[0]
    x = torch.randn(tokens, n, generator=generator) * torch.logspace(0, -decades / 2, n) @ basis.t()
    return x.t() @ x / tokens


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (96, 160), (160, 96), (33, 33), (1, 8)], ids=str)
@pytest.mark.parametrize("inputs", ["none", "mild", "few tokens", "beyond the floor"])
def test_low_rank_is_the_formula(shape, inputs):
    g = torch.Generator().manual_seed(sum(shape))
    n = shape[1]
    h = {
        "none": None,
        "mild": moment(n, 4 * n, 3, g),
        "few tokens": moment(n, n // 4, 1, g),  # H has eigenvalues of 0
        "beyond the floor": moment(n, 4 * n, 9, g),
    }[inputs]
    e = torch.randn(*shape, generator=g)
    r = min(8, *shape)
    wanted, root = naive(e, h, r)
    u1, u2, (before, after) = low_rank(e, h, r)
    assert u1.shape == (r, n) and u2.shape == (shape[0], r) and u1.dtype == u2.dtype == torch.float32
    # in the norm that is minimised, nothing of rank r comes nearer, and the maps are the same there
    root = torch.from_numpy(root)
    errors = [float(((e.double() - m) @ root).square().sum()) for m in (wanted, u2.double() @ u1.double())]
    assert errors[1] == pytest.approx(errors[0], rel=1e-4, abs=1e-9 * before)
    assert after == pytest.approx(errors[0], rel=1e-3, abs=1e-9 * before)
    assert before == pytest.approx(float((e.double() @ root).square().sum()), rel=1e-4)
    gap = ((wanted - u2.double() @ u1.double()) @ root).norm() / (wanted @ root).norm()
    assert gap < 2e-3
    torch.testing.assert_close(u1.norm(dim=1), torch.full((r,), 3**-0.5))


def test_rank_beyond_the_errors_own_is_an_untrained_recovery():
    g = torch.Generator().manual_seed(0)
    e = torch.randn(20, 3, generator=g) @ torch.randn(3, 30, generator=g)  # of rank 3
    for r in (3, 8, 25):
        u1, u2, (before, after) = low_rank(e, None, r)
        assert after < 1e-8 * before
        torch.testing.assert_close(u2 @ u1, e, atol=1e-4, rtol=0)
        assert (u2[:, :3].norm(dim=0) > 0).all() and not u2[:, 3:].any()
        assert (u1.norm(dim=1) > 0.1).all() and (u1[3:].abs() <= 30**-0.5).all()
    u1, u2, sizes = low_rank(torch.zeros(20, 30), None, 4)  # a layer that the compression left as it was
    assert sizes == (0.0, 0.0) and not u2.any() and u1.isfinite().all() and (u1.norm(dim=1) > 0.1).all()


def test_weights_that_are_not_finite_are_named():
    with pytest.raises(StepFailed, match="weights of layer9 are not finite"):
        compensate.low_rank(torch.full((3, 3), float("nan")), None, 2, torch.Generator(), "layer9")
    with pytest.raises(StepFailed, match="all inputs of a layer are zero"):
        compensate.moment_root(torch.zeros(8, 8))


# -- on models ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """By architecture: folders of the dense model and its 2:4 version, documents, and the moments of their inputs."""
    root, found = tmp_path_factory.mktemp("models"), {}

    def get(arch):
        if arch not in found:
            here = root / arch
            tiny.make(arch, tiny.DEFAULTS, here / "dense")
            settings = Magnitude.Settings(pattern="2:4")
            how = {"examples": None, "device": "cpu", "dtype": "float32", "progress": lambda *a: None}
            Magnitude.compress(here / "dense", here / "pruned", settings, **how)
            rng = random.Random(0)
            examples = [[rng.randrange(3, 300) for _ in range(rng.randint(2, 40))] for _ in range(60)]
            facts = input_moments(load_model(here / "pruned"), examples, here / "moments", quiet)
            found[arch] = here, examples, facts
        return found[arch]

    return get


def moments_of(folder):
    index = json.loads((folder / "moments.json").read_text())["layers"]
    files = {entry["file"]: load_file(folder / entry["file"]) for entry in index.values()}
    return {name: files[entry["file"]][entry["tensor"]] for name, entry in index.items()}


def inputs_of(model, examples):
    """By layer, all inputs (tokens x in) of the documents, each run alone, so that nothing is padded."""
    seen = {name: [] for name in block_linears(model)}
    hooks = [
        m.register_forward_hook(lambda _m, args, _o, name=name: seen[name].append(args[0].flatten(0, -2)))
        for name, m in block_linears(model).items()
    ]
    with torch.no_grad():
        for ids in examples:
            more = {}
            if model.config.is_encoder_decoder:
                more["decoder_input_ids"] = torch.tensor([[model.config.decoder_start_token_id, *ids[:-1]]])
            model(input_ids=torch.tensor([ids]), **more)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts).double() for name, parts in seen.items()}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_moments_are_those_of_the_documents_run_alone(made, arch):
    folder, examples, facts = made(arch)
    model = load_model(folder / "pruned")
    wanted = inputs_of(model, examples)
    found = moments_of(folder / "moments")
    assert found.keys() == block_linears(model).keys()
    for name, x in wanted.items():
        assert len(x) == sum(map(len, examples)), name
        h = x.t() @ x / len(x)
        assert (found[name] - h).abs().max() < 1e-5 * h.abs().max(), name
    files = list((folder / "moments").glob("*.safetensors"))
    assert facts == {
        "documents": 60,
        "tokens": sum(map(len, examples)),
        "bytes": sum(f.stat().st_size for f in files),
        "layers": len(found),
        "inputs": {"llama": 8, "gpt2": 8, "t5": 8 + 12 + 1}[arch],
        "passes": 1,
    }
    # q, k, v share one; so do gate and up; a T5 decoder's keys and values of all blocks read the one encoder output
    alone = sum(features(m)[0] ** 2 for m in block_linears(model).values())
    assert arch == "gpt2" or facts["bytes"] < 0.8 * 4 * alone


def test_moments_are_the_same_in_several_passes(made, tmp_path, monkeypatch):
    folder, examples, _ = made("llama")
    monkeypatch.setattr(compensate, "BUDGET", 4 * (64 * 64 + 128 * 128))
    facts = input_moments(load_model(folder / "pruned"), examples, tmp_path, quiet)
    assert facts["passes"] > 2 and len(list(tmp_path.glob("*.safetensors"))) == facts["passes"]
    whole, parts = moments_of(folder / "moments"), moments_of(tmp_path)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def compensated(made, arch, method, r, out, compressed="pruned"):
    folder, _, _ = made(arch)
    model = load_model(folder / compressed)
    moments = folder / "moments" if method == "eora" else None
    return compensation(folder / "dense", model, moments, r, method, out, quiet), model


@pytest.mark.parametrize("arch", ["llama", "gpt2", pytest.param("t5", marks=pytest.mark.slow)])
def test_compensation_of_a_pruned_model(made, tmp_path, arch):
    folder, examples, _ = made(arch)
    dense, pruned = load_model(folder / "dense"), load_model(folder / "pruned")
    facts = {m: compensated(made, arch, m, 8, tmp_path / m)[0] for m in ("svd", "eora")}
    weights = {m: load_file(tmp_path / m / "recovery.safetensors") for m in facts}
    inputs, moments = inputs_of(pruned, examples), moments_of(folder / "moments")
    now = block_linears(pruned)
    left = {m: [] for m in facts}
    for name, was in block_linears(dense).items():
        e = dense_weight(was) - dense_weight(now[name])
        x = inputs[name]
        plain = (x @ e.double().t()).square().sum()
        errors = {}
        for method in facts:
            u1, u2 = weights[method][f"{name}.U1"], weights[method][f"{name}.U2"]
            h = None if method == "svd" else moments[name]
            wanted, root = naive(e, h, 8)
            gap = (wanted - u2.double() @ u1.double()) @ torch.from_numpy(root)
            assert gap.norm() < 5e-3 * (wanted @ torch.from_numpy(root)).norm(), (name, method)
            rest = e.double() - u2.double() @ u1.double()
            errors[method] = float((x @ rest.t()).square().sum() / plain)
            errors[method, "weights"] = float(rest.square().sum() / e.double().square().sum())
            left[method].append(errors[method] if method == "eora" else errors[method, "weights"])
        assert errors["eora"] < errors["svd"] and errors["eora"] < 1, name
        assert errors["svd", "weights"] < errors["eora", "weights"] and errors["svd", "weights"] < 1, name
    for method, f in facts.items():
        assert f["method"] == method and f["r"] == 8 and f["layers"] == len(now) and f["seconds"] > 0
        assert f["left"] == pytest.approx(sum(left[method]) / len(now), rel=1e-2)
        assert 0 < f["error_after"] < f["error_before"] < 1


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_attached_the_model_comes_nearer_to_the_dense_one_whatever_alpha_is(made, tmp_path, arch):
    folder, _, _ = made(arch)
    ids = torch.arange(3, 51).view(4, 12)
    more = {"decoder_input_ids": ids} if arch == "t5" else {}

    @torch.no_grad()
    def answer(model):
        return model(input_ids=ids, **more).logits

    _, model = compensated(made, arch, "eora", 16, tmp_path)
    dense, plain = answer(load_model(folder / "dense")), answer(model)
    found = []
    for alpha in (None, 4, 64):
        settings = RecoverSettings(r=16, alpha=alpha, act="identity", init="eora")
        recover.attach_recovery(model, settings, seed=5, init=tmp_path)
        found.append(answer(model))
        recover.detach_recovery(model)
    assert torch.equal(answer(model), plain)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-4 * float(plain.abs().max()), rtol=0)
    assert (found[0] - dense).square().sum() < 0.7 * (plain - dense).square().sum()


def test_the_whole_error_at_full_rank_gives_the_dense_model(made, tmp_path):
    folder, _, _ = made("llama")
    _, model = compensated(made, "llama", "svd", 64, tmp_path)
    ids = torch.arange(3, 51).view(4, 12)
    recover.attach_saved_recovery(model, tmp_path)  # a matrix may not ask for a rank above that of k and v, which is 32
    with torch.no_grad():
        dense = load_model(folder / "dense")(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, dense, atol=1e-3, rtol=0)


def test_the_same_each_time(made, tmp_path):
    for name in ("one", "two"):
        compensated(made, "llama", "eora", 80, tmp_path / name)  # more than the layers' width: random rows as well
        torch.rand(5)
    assert (tmp_path / "one/recovery.safetensors").read_bytes() == (tmp_path / "two/recovery.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_dense_weight_of_a_quantised_layer_is_what_it_computes(made, tmp_path, kind):
    """Before and after a pass in evaluation mode, which may repack the weights."""
    folder, _, _ = made("llama")
    how = {"examples": None, "device": "cpu", "dtype": "float32", "progress": lambda *a: None}
    BitsAndBytes.compress(folder / "dense", tmp_path / kind, BitsAndBytes.Settings(type=kind), **how)
    model = load_model(tmp_path / kind)
    fresh = {name: dense_weight(m) for name, m in block_linears(model).items()}
    dense = {name: dense_weight(m) for name, m in block_linears(load_model(folder / "dense")).items()}
    with torch.no_grad():
        model(input_ids=torch.arange(3, 20).view(1, -1))
    for name, module in block_linears(model).items():
        w = dense_weight(module)
        x = torch.eye(w.shape[1])
        assert w.shape == dense[name].shape
        assert (fresh[name] - dense[name]).norm() < 0.12 * dense[name].norm(), name
        assert (w - fresh[name]).norm() < 0.005 * w.norm(), name
        assert (module(x).float().t() - w).norm() < 0.01 * w.norm(), name
    facts = compensation(folder / "dense", model, None, 16, "svd", tmp_path / "c", quiet)
    assert facts["left"] < 0.8 and facts["error_before"] < 0.02


def test_what_cannot_be_compensated_is_refused(made, tmp_path):
    folder, _, _ = made("llama")
    model = load_model(folder / "pruned")
    with pytest.raises(StepFailed, match="eora needs input moments"):
        compensation(folder / "dense", model, None, 4, "eora", tmp_path, quiet)
    with pytest.raises(StepFailed, match="svd takes no input moments"):
        compensation(folder / "dense", model, folder / "moments", 4, "svd", tmp_path, quiet)
    tiny.make("llama", {**tiny.DEFAULTS, "intermediate": 96}, tmp_path / "narrow")
    with pytest.raises(Unsupported, match=r"other shapes: model.layers.0.mlp.down_proj is \[128, 64\], here \[96, 64\]"):
        compensation(folder / "dense", load_model(tmp_path / "narrow"), None, 4, "svd", tmp_path, quiet)
    tiny.make("llama", {**tiny.DEFAULTS, "layers": 1}, tmp_path / "short")
    with pytest.raises(Unsupported, match="not in the model: model.layers.1"):
        compensation(folder / "dense", load_model(tmp_path / "short"), None, 4, "svd", tmp_path, quiet)
    with pytest.raises(StepFailed, match="moments are those of another model"):
        compensation(tmp_path / "short", load_model(tmp_path / "short"), folder / "moments", 4, "eora", tmp_path, quiet)
    assert not Path(tmp_path, "recovery.safetensors").exists()
