"""What a training costs: floating-point operations by formula, memory as measured."""

from __future__ import annotations

from .models.arch import block_linears, features, head
from .pet import own, prompts
from .training_rows import Document


def flops_of(model, documents: list[Document]) -> int:
    """Operations of training on `documents` (each as often as it was read), by formula.

    Per token 2 P forward, 2 P backward through the layers to their inputs, and 2 T for the gradients of the T trainable
    weights, with P the weights of the blocks' linear layers and of all modules beside them (for NOLA the numbers of its
    factors, not its coefficients; for differences to the weights themselves none, T apart); per scored position 4 V d for the
    head on its V rows that are used. Virtual tokens in front of a row count as tokens of it. Left out: attention's products
    (quadratic in length, small here), norms, activations, padding, and what is done once a pass (the making of NOLA's factors
    and of virtual tokens, the adding of differences).
    For an encoder-decoder model the encoder's layers count the text's tokens, the decoder's those it reads itself.
    """
    linear = {"decoder": 0, "encoder": 0}
    both = model.config.is_encoder_decoder

    def part(name: str) -> str:
        return "encoder" if both and "decoder" not in name.split(".")[:2] + name.split("/")[:2] else "decoder"

    for name, module in block_linears(model).items():
        n_in, n_out = features(module)
        linear[part(name)] += n_in * n_out
    beside, trained = {"decoder": 0, "encoder": 0}, {"decoder": 0, "encoder": 0}
    ours = tuple(f"cpet_{name}." for name in own.put_on(model)) + ("cpet_prompt.",)
    for name, p in model.named_parameters():
        if p.requires_grad and not name.startswith(ours):
            for counted in (beside, trained):
                counted[part(name.removeprefix("cpet_recovery.0."))] += p.numel()
    for module in own.put_on(model):
        for name, (multiplied, learned) in own.implementation(module).costs(model).items():
            beside[part(name)] += multiplied
            trained[part(name)] += learned
    front = prompts.in_front(model)
    weight, _, _ = head(model)
    total = 0
    for d in documents:
        rows = d.choices if d.kind == "single" else range(weight.shape[0])
        read = sum(len(r.ids) + front["decoder"] for r in d.rows)
        places = sum(len(r.places) for r in d.rows)
        total += read * (4 * (linear["decoder"] + beside["decoder"]) + 2 * trained["decoder"])
        text = len(d.rows[0].encoder) + front["encoder"]
        total += text * (4 * (linear["encoder"] + beside["encoder"]) + 2 * trained["encoder"])
        total += places * 4 * len(rows) * weight.shape[1]
    return total


def peak_memory(cuda: list[int]) -> int:
    """Bytes: the most that torch held on the devices, or that the process held in memory."""
    if cuda:
        import torch

        return sum(torch.cuda.max_memory_allocated(i) for i in cuda)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
