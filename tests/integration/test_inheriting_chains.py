"""Inheriting through several cuts and other layers, what cannot be cut, and the whole way."""

import json
import shutil

import pytest
import torch
from inherited import EXAMPLES, LORA, STRUCTURED, answer, answer_of, cut, folders, masked, pruned, same, train_d  # noqa: F401
from safetensors.torch import load_file

from compressed import compress as run_backend
from conftest import SMOKE
from cpet_bench.compression.bnb import BitsAndBytes
from cpet_bench.compression.depth import Depth
from cpet_bench.compression.notes import carry_note, every_note
from cpet_bench.compression.rtn import Rtn
from cpet_bench.compression.structured import Structured
from cpet_bench.compression.student import Student
from cpet_bench.errors import StepFailed, Unsupported
from cpet_bench.models import tiny
from cpet_bench.models.loading import load_model
from cpet_bench.models.widths import parts
from cpet_bench.pet import methods
from cpet_bench.restoring.cuts import read_cuts
from cpet_bench.restoring.fairness import wider
from cpet_bench.restoring.inheriting import fits, start_of

CHAINS = {
    "structured, depth": [(Structured, STRUCTURED), (Depth, {"drop": [1]})],
    "structured but for a block, depth": [(Structured, {**STRUCTURED, "spare": [1, 0]}), (Depth, {"drop": [2]})],
    "structured but for the block that goes": [(Structured, {**STRUCTURED, "spare": [1, 0]}), (Depth, {"drop": [0]})],
    "depth, structured": [(Depth, {"drop": [1]}), (Structured, STRUCTURED)],
    "structured twice": [(Structured, {**STRUCTURED, "ratio": 0.2}), (Structured, {**STRUCTURED, "importance": "l2"})],
    "depth twice, structured": [(Depth, {"drop": [0]}), (Depth, {"drop": [1]}), (Structured, STRUCTURED)],
    # one step of a rate of next to nothing: a student that is its teacher, cut
    "student": [(Student, {"blocks": 3, "width": 0.8, "steps": 1, "lr": 1e-12, "warmup": 0, "weight_decay": 0})],
}


@pytest.mark.parametrize("chain", CHAINS)
def test_several_cuts_in_order(chain, folders, tmp_path):
    """What each step kept is in the notes; carried back to the dense model by hand, they say what to mask there."""
    dense = source = folders / "llama"
    adapter = train_d(dense, tmp_path / "d", "llama", **LORA)
    for number, (backend, how) in enumerate(CHAINS[chain]):
        run_backend(backend, source, tmp_path / str(number), EXAMPLES, **how)
        source = tmp_path / str(number)
    blocks, groups = list(range(4)), {}
    for note in every_note(source):
        if "kept_blocks" in note:
            blocks = [blocks[i] for i in note["kept_blocks"]["model.layers"]]
        for label, kept in note.get("kept", {}).items():
            _, _, number, *rest = label.split(".")
            name = ".".join(["model.layers", str(blocks[int(number)]), *rest])
            before = groups.get(name, list(range(48 if label.endswith("mlp.mlp") else 2)))
            groups[name] = [before[i] for i in kept]
    assert groups and any(len(kept) < 48 for kept in groups.values())
    cut(source, adapter, tmp_path / "cut", len(CHAINS[chain]))
    full = load_model(dense)
    methods.attach_saved(full, adapter, trainable=False)
    with masked(full, "llama", groups, {"model.layers": blocks}) as reference:
        wanted = answer(reference)
    same(answer_of(source, tmp_path / "cut"), wanted)


@pytest.mark.parametrize(("backend", "how"), [(Rtn, {"bits": 8}), (BitsAndBytes, {"type": "int8"})], ids=["rtn", "int8"])
def test_quantised_after_the_cut(backend, how, folders, tmp_path):
    narrow = tmp_path / "narrow"  # of widths that 32 divides
    run_backend(Structured, folders / "llama", narrow, EXAMPLES, ratio=0.15, spare=[0, 0], multiple=32, parts="mlp")
    adapter = train_d(folders / "llama", tmp_path / "d", "llama", **LORA)
    run_backend(backend, narrow, tmp_path / "q", EXAMPLES, **how)
    cut(narrow, adapter, tmp_path / "plain")
    cut(tmp_path / "q", adapter, tmp_path / "quantised", 2)
    one, other = (load_file(tmp_path / x / "adapter_model.safetensors") for x in ("plain", "quantised"))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert fits(load_model(tmp_path / "q"), tmp_path / "quantised")


def test_layers_of_classes_that_are_no_linear_of_torch():
    class Packed(torch.nn.Module):  # as GPTQ's
        def __init__(self, layer):
            super().__init__()
            self.in_features, self.out_features = layer.in_features, layer.out_features
            self.qweight = torch.zeros(1)

    model = load_tiny("llama")
    wanted = parts(model)
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, torch.nn.Linear):
            owner, _, last = name.rpartition(".")
            setattr(model.model.layers.get_submodule(owner), last, Packed(module))
    assert not parts(model) and parts(model, plain=False) == wanted and len(wanted) == 4


def load_tiny(arch):
    import transformers as tr

    config = tr.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    config.vocab_size = 64
    return tr.LlamaForCausalLM(config)


def test_extended_after_the_cut(folders, pruned, tmp_path):
    narrow, _ = pruned["llama"]
    adapter = train_d(folders / "llama", tmp_path / "d", "llama", **LORA)
    cut(narrow, adapter, tmp_path / "cut")
    target = 2 * sum(t.numel() for t in load_file(tmp_path / "cut/adapter_model.safetensors").values())
    wider(tmp_path / "cut", target, tmp_path / "wide")
    same(answer_of(narrow, tmp_path / "wide"), answer_of(narrow, tmp_path / "cut"))


@pytest.mark.parametrize(
    ("pet", "says"),
    [
        ({"method": "lokr", "r": 3}, "LOKR: model.layers.0.* cannot be cut"),
        ({"method": "nola", "k": 8, "target_modules": ["up_proj"]}, "width, which model.layers.0.mlp.up_proj lost"),
        ({"method": "vera", "r": 3, "target_modules": ["q_proj"]}, "vera_lambda_b cannot be cut: the layer lost outputs"),
        ({"method": "oft", "oft_block_size": 8}, r"(o|down)_proj.oft_R.\w+ cannot be cut: the layer lost inputs"),
        ({**LORA, "use_dora": True}, "say use_dora: true"),
    ],
)
def test_what_cannot_be_cut_is_unsupported(pet, says, folders, pruned, tmp_path):
    adapter = train_d(folders / "llama", tmp_path / "d", "llama", **pet)
    with pytest.raises(Unsupported, match=says):
        cut(pruned["llama"][0], adapter, tmp_path / "cut")


def test_an_adapter_of_another_model_is_named(folders, pruned, tmp_path):
    narrow, _ = pruned["llama"]
    for name, size in {
        "wide": {"intermediate": 64},
        "thin": {"intermediate": 24},
        "deep": {"layers": 5},
        "big": {"hidden": 48},
    }.items():
        tiny.make(
            "llama", {**tiny.DEFAULTS, "layers": 4, "hidden": 32, "heads": 4, "intermediate": 48, **size}, tmp_path / name
        )
        train_d(tmp_path / name, tmp_path / f"d-{name}", "llama", **LORA)
    for name, has in {"wide": 64, "thin": 24}.items():
        with pytest.raises(StepFailed, match=rf"mlp.\w+_proj.lora_\w.weight has {has} entries where the dense model has 48"):
            cut(narrow, tmp_path / f"d-{name}", tmp_path / "cut")
    old = tmp_path / "old"  # a note without the groups that there were
    shutil.copytree(narrow, old)
    note = json.loads((narrow / "cpet_compression.json").read_text())
    del note["groups"]
    (old / "cpet_compression.json").write_text(json.dumps(note))
    with pytest.raises(StepFailed, match="has 24 entries where the dense model has more than"):
        cut(old, tmp_path / "d-thin", tmp_path / "cut")
    train_d(tmp_path / "big", tmp_path / "d-big", "llama", **LORA, target_modules=["up_proj"])
    cut(narrow, tmp_path / "d-big", tmp_path / "cut")  # of other hidden states: says so where it is put on
    with pytest.raises(StepFailed, match=r"other shapes: .*lora_A.weight is \[3, 48\], here \[3, 32\]"):
        answer_of(narrow, tmp_path / "cut")
    run_backend(Depth, folders / "llama", tmp_path / "c", drop=[1])
    with pytest.raises(StepFailed, match="it has model.layers.4.*, and the dense model 4 blocks"):
        cut(tmp_path / "c", tmp_path / "d-deep", tmp_path / "cut")
    note = {**json.loads((narrow / "cpet_compression.json").read_text()), "kept": {"model.layers.9.mlp.mlp": [0]}}
    (old / "cpet_compression.json").write_text(json.dumps(note))
    with pytest.raises(StepFailed, match="notes what it kept of model.layers.9.mlp.mlp, which the compressed model"):
        read_cuts(load_model(old), old, 1)


@pytest.mark.parametrize("kind", ["narrow", "short"])
def test_an_adapter_that_was_trained_on_the_cut_model_is_taken_as_it_is(kind, folders, pruned, tmp_path):
    out = pruned["llama"][0]
    if kind == "short":
        out = tmp_path / "c"
        run_backend(Depth, folders / "llama", out, drop=[1])
    adapter = train_d(out, tmp_path / "d", "llama", **LORA)
    of_dense = train_d(folders / "llama", tmp_path / "dense", "llama", **LORA)
    model = load_model(out)
    cuts = read_cuts(model, out, 1)
    how = {"own": True}
    assert start_of(adapter, model, cuts, tmp_path / "cut", None, **how) == (adapter, {})
    found, facts = start_of(of_dense, model, cuts, tmp_path / "cut", None, **how)
    assert found == tmp_path / "cut" and facts["tensors"]["cut"] + facts["tensors"]["gone"] > 0
    if kind == "narrow":
        with pytest.raises(StepFailed, match="was not trained on the dense model"):
            start_of(adapter, model, cuts, tmp_path / "cut", None, own=False)


def test_notes_of_what_was_done_before_are_never_lost(folders, pruned, tmp_path):
    narrow, kept = pruned["llama"]
    plugin = tmp_path / "plugin"
    plugin.mkdir()  # a backend that writes no note, one that copies all files, one that writes a note of its own
    carry_note(narrow, plugin, "mine")
    assert [n["backend"] for n in every_note(plugin)] == ["structured", "mine"]
    shutil.copy(narrow / "cpet_compression.json", plugin)
    carry_note(narrow, plugin, "mine")
    assert [n["backend"] for n in every_note(plugin)] == ["structured", "mine"] and every_note(plugin)[0]["kept"] == kept
    (plugin / "cpet_compression.json").write_text('{"backend": "theirs"}')
    carry_note(narrow, plugin, "mine")
    assert [n["backend"] for n in every_note(plugin)] == ["structured", "theirs"]
    (plugin / "cpet_compression.json").unlink()
    carry_note(folders / "llama", plugin, "mine")
    assert every_note(plugin) == []
    # and those of a model that came cut already are not taken for what was done here
    assert read_cuts(load_model(narrow), narrow, 0) is None


@pytest.mark.slow
def test_through_the_command_line(cli):
    """transfer, training on, and the control of equal size, on cut models and a mixture; adapters of the user's."""
    tiny.make("llama", {**tiny.DEFAULTS, "intermediate": 96}, cli.folder / "other")
    lora = {"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"]}
    train_d(cli.folder / "other", cli.folder / "theirs", "llama", **lora)
    done = cli(
        "run",
        cli.matrix(
            "name: cuts\n"
            f"pet: {json.dumps({'lora': lora, 'none': None})}\n"
            "compression:\n"
            "  wanda24: null\n  nf4: null\n  none: none\n"
            "  narrow: {backend: structured, ratio: 0.3, spare: [0, 0]}\n"
            "  short: [{backend: depth, drop: [0]}, {backend: bitsandbytes, type: nf4}]\n"
            "restoring:\n  cpet-eora: null\n  matched: null\n  vanilla: {}\n"
            "  transfer: {inherit: true, train: {steps: 0}}\n"
            "  cpet: {recover: {r: 1}}\n"
            "  wider: {inherit: true, control: wider, of: cpet}\n"
            "  theirs: {inherit: {from: local:theirs}}\n"
            "task:\n  smoke_sentiment: {include: SMOKE, limit: 20}\n"
            "train: {steps: 4, batch: 4, documents: 32}\nprobes: {throughput: false, memory: false}\n"
            "include:\n  - {compression: narrow, restoring: [transfer, wider, theirs]}\n"
            "  - {compression: short, restoring: [transfer, theirs]}\n"
            "exclude: [{pet: none}]\n".replace("SMOKE", str(SMOKE.parent / "smoke_task"))
        ),
    )
    found = {(r["axes"]["compression"], r["axes"]["restoring"]): r for r in cli.records("cuts").values()}
    assert done.returncode == 4, done.stderr
    shallow = found.pop(("short", "theirs"))["reason"]["message"]  # its blocks are there, its widths are others
    assert "inherit from local:theirs: The adapter does not fit this model: other shapes" in shallow
    assert "write inherit: true" in shallow
    wrong = found.pop(("narrow", "theirs"))
    assert wrong["status"] == "failed" and "inherit from local:theirs" in wrong["reason"]["message"]
    assert "has 96 entries where the dense model has 128" in wrong["reason"]["message"]
    assert "write inherit: true" in wrong["reason"]["message"]
    assert len(found) == 3 and {r["status"] for r in found.values()} == {"done"}
    facts = {name: r["training"] for name, r in found.items()}
    narrow, short = facts["narrow", "transfer"], facts["short", "transfer"]
    assert narrow["steps"] == 0 and narrow["inherited_cut"]["tensors"] == {"cut": 8, "renamed": 0, "gone": 0}
    assert short["inherited_cut"]["tensors"] == {"cut": 0, "renamed": 8, "gone": 8}
    assert narrow["trainable_parameters"] == narrow["inherited_cut"]["parameters"][1]
    wide = facts["narrow", "wider"]
    assert wide["inherited_cut"] == narrow["inherited_cut"] and wide["steps"] == 4
    assert wide["trainable_parameters"] > 1.05 * narrow["trainable_parameters"]
    assert found["narrow", "transfer"]["training"]["inherited"]["steps"] == 4
