"""One pass of a model over plain texts, for what watches its layers: the same for decoders alone and for encoder-decoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..training_model import padded, start_token


def text_inputs(model: nn.Module, documents: list[list[int]]) -> tuple[dict[str, Any], torch.Tensor]:
    """Arguments that run `model` (or its body) over `documents`, and where its tokens are real (rows x positions, bool).

    Of an encoder-decoder model the encoder reads the document, and the decoder its start token and the document after it, cut
    to the document's length, so that one mask holds for both stacks and for what passes between them.
    """
    device = model.get_input_embeddings().weight.device
    ids, mask = padded([tuple(d) for d in documents], device)
    given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    start = start_token(model)
    if start is not None:
        shifted = torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)
        given |= {"decoder_input_ids": shifted, "decoder_attention_mask": mask}
    return given, mask.bool()


def held_out(examples: list, every: int = 10) -> list[bool]:
    """Which calibration documents are measured on and not trained on: the last of each ten."""
    return [i % every == every - 1 for i in range(len(examples))]
