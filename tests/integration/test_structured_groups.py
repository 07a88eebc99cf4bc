"""The groups that structured pruning takes out whole, against those that Torch-Pruning finds by tracing.

It traces Llama and OPT where every query head has a key head of its own, and T5's feed-forward networks. It does not end on
grouped keys with rotary positions, and GPT-2's layers are of a class that it does not know; those are held against the masked
dense model alone (test_structured.py).
"""

import pytest
import torch
import transformers as tr

from cpet_bench.models.widths import parts

tp = pytest.importorskip("torch_pruning")

SIZES = {"vocab_size": 100, "attn_implementation": "eager"}
DECODER = SIZES | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "llama": lambda: tr.LlamaForCausalLM(tr.LlamaConfig(**DECODER, num_key_value_heads=4, intermediate_size=48)),
    "opt": lambda: tr.OPTForCausalLM(tr.OPTConfig(**DECODER, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64)),
    "t5": lambda: tr.T5ForConditionalGeneration(
        tr.T5Config(**SIZES, d_model=32, d_ff=48, d_kv=8, num_heads=4, num_layers=2, feed_forward_proj="gated-gelu")
    ),
}


def traced(model):
    ids = torch.arange(3, 13)[None]
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {"use_cache": False}
    return tp.DependencyGraph().build_dependency(model, {"input_ids": ids} | more, lambda m, given: m(**given).logits)


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
@pytest.mark.parametrize("arch", MODELS)
def test_the_same_as_by_tracing(arch):
    torch.manual_seed(0)
    model = MODELS[arch]()
    graph, modules = traced(model), dict(model.named_modules())
    found = [p for p in parts(model) if p.kind == "mlp" or arch != "t5"]
    assert len(found) == 4  # two blocks' attentions and networks, or T5's four networks
    for part in found:
        for group in (0, part.groups - 1):
            first = next(iter(part.rows))
            start = modules[f"{part.name}.{first}"]
            theirs = {}
            for item in graph.get_pruning_group(start, tp.prune_linear_out_channels, part.outputs(first, [group])):
                layer = item.dep.target.module
                if isinstance(layer, torch.nn.Linear):
                    side = "in" if item.dep.handler.__name__ == "prune_in_channels" else "out"
                    theirs[item.dep.target.name.split(" ")[0], side] = sorted(item.idxs)
            ours = {(f"{part.name}.{name}", "out"): part.outputs(name, [group]) for name in part.rows}
            ours[f"{part.name}.{part.reader}", "in"] = part.inputs([group])
            assert theirs == ours, (part.label, group)
