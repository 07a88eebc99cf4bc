"""Values of PET fields: what is mistyped is refused as the matrix is read, with its place; what PEFT takes is not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cpet_bench.doctor_tries import FIELDS
from cpet_bench.errors import InputError
from cpet_bench.matrix import load_matrix
from cpet_bench.pet.catalogue import peft_fields
from cpet_bench.pet.needs import NAMES_ALONE
from cpet_bench.pet.values import wrong

BASE = 'name: test\nmodel:\n  tiny: {source: "tiny:llama"}\npet:\n  mine: {method: %s}\ntask:\n  movie_reviews: {limit: 10}\n'


def load(pet, tmp_path):
    path = tmp_path / "matrix.yaml"
    path.write_text(BASE % pet)
    return load_matrix(path)


WRONG = [
    ("lora, r: -1", "r: it must be at least 1, not -1"),
    ("lora, r: 0", "r: it must be at least 1, not 0"),
    ("lora, r: 2.5", "r: it must be a whole number, not 2.5"),
    ("lora, r: abc", "r: it must be a whole number, not 'abc'"),
    ("lora, r: true", "r: it must be a whole number, not True"),
    ("lora, r: null", "r: it must be a whole number, not nothing"),
    ("lora, lora_alpha: abc", "lora_alpha: it must be a number, not 'abc'"),
    ("lora, lora_dropout: 2", "lora_dropout: it must be at least 0 and at most 1, not 2"),
    ("lora, lora_dropout: -0.1", "lora_dropout: it must be at least 0 and at most 1, not -0.1"),
    ("lora, init_lora_weights: foo", "init_lora_weights: 'foo' is not one of these. Allowed: corda, eva, false, gaussian, "),
    ("lora, init_lora_weights: pisa", "init_lora_weights: 'pisa' is not one of these. Did you mean pissa?"),
    ("lora, init_lora_weights: 5", "init_lora_weights: 5 is not one of these."),
    ("adalora, init_lora_weights: foo, total_step: 4", "init_lora_weights: 'foo' is not one of these."),
    ("lora, target_modules: 5", "target_modules: it must be a text, a list (each a text) or null, not 5"),
    ("lora, target_modules: [q_proj, 5]", "target_modules.1: it must be a text, not 5"),
    ("lora, layers_to_transform: [one]", "layers_to_transform.0: it must be a whole number, not 'one'"),
    ("lora, use_dora: 'yes'", "use_dora: it must be true or false, not 'yes'"),
    ("lora, bias: lora", "bias: 'lora' is not one of these. Did you mean lora_only? Allowed: all, lora_only, none."),
    ("lora, rank_pattern: {q_proj: 0}", "rank_pattern.q_proj: it must be at least 1, not 0"),
    ("lora, rank_pattern: {q_proj: all}", "rank_pattern.q_proj: it must be a whole number, not 'all'"),
    ("lora, alpha_pattern: {q_proj: all}", "alpha_pattern.q_proj: it must be a number, not 'all'"),
    ("lora, task_type: causal_lm", "task_type: 'causal_lm' is not one of these. Did you mean CAUSAL_LM?"),
    ("lokr, r: 0", "r: it must be at least 1, not 0"),
    ("vera, r: -2", "r: it must be at least 1, not -2"),
    ("vera, r: abc", "r: it must be a whole number, not 'abc'"),
    ("oft, r: -1", "r: it must be at least 0, not -1"),
    ("adalora, init_r: 0, total_step: 4", "init_r: it must be at least 1, not 0"),
    ("adalora, total_step: soon", "total_step: it must be a whole number or null, not 'soon'"),
    ("xlora, xlora_dropout_p: 3", "xlora_dropout_p: it must be at least 0 and at most 1, not 3"),
    ("prefix_tuning, num_virtual_tokens: 0", "num_virtual_tokens: it must be at least 1, not 0"),
    ("prompt_tuning, num_virtual_tokens: 4, prompt_tuning_init: text", "'text' is not one of these. Did you mean TEXT?"),
    ("lora, target_modules: []", "target_modules: it names no layer"),
    ("nola, target_modules: []", "target_modules: it names no layer"),
    ("ia3, target_modules: ''", "target_modules: it names no layer"),
    ("lora, target_modules: (q_proj", "target_modules: a text is a regular expression of whole names here, and '(q_proj'"),
    ("vera, target_modules: '*'", "target_modules: a text is a regular expression of whole names here, and '*' is none"),
    ("lora, exclude_modules: (q_proj", "exclude_modules: a text is a regular expression"),
    ("lora, target_modules: .*q_proj, layers_to_transform: [0]", "layers_to_transform: PEFT's lora takes it beside a list"),
    ("lora, target_modules: all-linear, layers_to_transform: []", "layers_to_transform: PEFT's lora takes it beside a list"),
    ("prompt_tuning", "num_virtual_tokens: prompt_tuning needs a number of virtual tokens"),
    ("prefix-tuning", "num_virtual_tokens: prefix_tuning needs a number of virtual tokens"),
    ("p_tuning, num_virtual_tokens: null", "num_virtual_tokens: p_tuning needs a number of virtual tokens"),
    ("adalora", "total_step: AdaLoRA needs the number of steps over which it deals out its ranks: write total_step: 40"),
    ("adalora, train: {steps: 7}", "write total_step: 7"),
    ("adalora, total_step: 0", "total_step: it must be at least 1, not 0"),
    ("adalora, total_step: 40, tinit: 30, tfinal: 10", "tinit: tinit (30) and tfinal (10) leave none of the 40 steps"),
    ("adalora, total_step: 40, tfinal: 50", "tfinal: tinit (0) and tfinal (50) leave none of the 40 steps"),
    ("oft, r: 4, oft_block_size: 16", "oft_block_size: OFT takes either r or oft_block_size: with r: 4 write oft_block_"),
    ("oft, r: 4", "oft_block_size: OFT takes either r or oft_block_size (32 where it is not given): with r: 4"),
    ("oft, oft_block_size: 0", "oft_block_size: OFT takes either r or oft_block_size, and one of the two"),
    ("road, variant: road_3", "variant: 'road_3' is not one of these. Did you mean road_"),
]


@pytest.mark.parametrize(("pet", "says"), WRONG, ids=[w[0] for w in WRONG])
def test_what_is_mistyped_is_refused_with_its_place(pet, says, tmp_path):
    with pytest.raises(InputError) as caught:
        load(pet, tmp_path)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'matrix.yaml'}:5: pet.mine.") and says in text
    assert caught.value.exit_code == 2


RIGHT = [
    "lora, r: 8, lora_alpha: 0.5, lora_dropout: 0",
    "lora, lora_dropout: 1",
    "lora, target_modules: null",
    "lora, target_modules: all-linear",
    "lora, target_modules: All-Linear",
    "lora, target_modules: '.*(q|v)_proj'",
    "lora, target_modules: [], target_parameters: [model.layers.0.mlp.experts.up]",
    "lora, target_modules: [(q_proj]",
    "loha, target_modules: .*q_proj, layers_to_transform: [0]",
    "oft",
    "cpt",
    "adalora, total_step: 40, tinit: 30, tfinal: 9",
    "lora, layers_to_transform: 0",
    "lora, rank_pattern: {q_proj: 2}, alpha_pattern: {q_proj: 0.5}",
    *[f"lora, init_lora_weights: {w}" for w in ("true", "false", "pissa", "pissa_niter_4", "lora_ga", "Gaussian", "OLoRA")],
    "lora, eva_config: {rho: 2.0}",
    "lora, loftq_config: {}",
    "hira, init_weights: Gaussian",
    "lokr, init_weights: lycoris, alpha: 1.5",
    "miss, init_weights: bat",
    "oft, r: 0, oft_block_size: 16",
    "oft, r: 4, oft_block_size: 0",
    "supertuning, r: null",
    "supertuning, r: 4",
    "gralora, hybrid_r: 0",
    "adalora, total_step: 4, rank_pattern: null",
    "osf, effective_rank: 0.5, rank_pattern: {q_proj: 0.5}",
    "vera, r: 4096",
    "delora, delora_lambda: 0.5",
    "p_tuning, num_virtual_tokens: 4, encoder_reparameterization_type: LSTM",
]


@pytest.mark.parametrize("pet", RIGHT)
def test_what_peft_takes_is_not_refused(pet, tmp_path):
    assert load(pet, tmp_path).pet["mine"].method == pet.partition(",")[0]


def test_it_is_known_which_methods_take_blocks_beside_a_list_alone():
    """As PEFT itself has it."""
    code = (
        "import json; from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as kinds\n"
        "known = json.loads(input()); found = []\n"
        "for kind, cls in kinds.items():\n"
        "    name = kind.value.lower()\n"
        "    if 'layers_to_transform' in cls.__dataclass_fields__:\n"
        "        try:\n"
        "            cls(target_modules='.*q', layers_to_transform=[0], **known.get(name, {}))\n"
        "        except ValueError as error:\n"
        "            found += [name] if 'cannot be used when `target_modules` is a str' in str(error) else []\n"
        "print('found', json.dumps(sorted(found)))"
    )
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(FIELDS) + "\n", capture_output=True, text=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("found ")]
    assert json.loads(line.removeprefix("found ")) == sorted(NAMES_ALONE)


def test_neither_is_what_doctor_tries(tmp_path):
    known = peft_fields()
    for method, fields in FIELDS.items():
        for field, value in fields.items() if method in known else ():
            assert wrong(method, field, value, known[method][field]) is None, (method, field)
        load(json.dumps({"method": method, **fields})[1:-1].replace('"method": ', "", 1), tmp_path)


def test_most_fields_are_known():
    """An annotation that can no longer be read would let everything pass."""
    takes = [t for fields in peft_fields().values() for t in fields.values()]
    assert sum("any" in t.get("kinds", ()) for t in takes) < len(takes) / 20 < 60
    assert all("kinds" in t or "words" in t for t in takes)
    assert all("int" in fields["r"]["kinds"] for fields in peft_fields().values() if "r" in fields)


def test_no_library_is_loaded_for_it(tmp_path):
    path = Path(tmp_path, "matrix.yaml")
    path.write_text(BASE % "lora, r: 8, init_lora_weights: pissa")
    load_matrix(path)  # the index is kept from here on
    code = (
        f"import sys; from pathlib import Path; from cpet_bench.matrix import load_matrix; load_matrix(Path({str(path)!r}));"
        "print([m for m in ('torch', 'peft', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
