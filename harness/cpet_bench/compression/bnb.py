"""bitsandbytes: LLM.int8() (arXiv 2208.07339), NF4 and FP4 (QLoRA, arXiv 2305.14314), through transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from ..errors import Unsupported
from ..settings import Settings
from .notes import read_note, write_note
from .rounding import refuse_packed_again
from .sizes import F32, ModelSize


class BitsAndBytes:
    """Linear layers of the blocks in 8 or 4 bits; head and embeddings stay as they are."""

    name = "bitsandbytes"
    version = 1
    packages = ("torch", "transformers", "bitsandbytes")
    calibrated = False
    tries = ({"type": "nf4"}, {"type": "int8"})  # settings that `doctor` tries

    class Settings(Settings):
        """type: int8, nf4 or fp4. double_quant: quantise the scales too (4 bits). threshold: int8's outlier threshold.

        compute_dtype: of the 4-bit layers' products; auto is the run's own number format.
        """

        type: Literal["int8", "nf4", "fp4"]
        double_quant: bool = False
        threshold: float = Field(6.0, ge=0)
        compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

        @model_validator(mode="after")
        def _fits(self):
            if self.type == "int8" and (self.double_quant or self.compute_dtype != "auto"):
                raise ValueError("double_quant and compute_dtype belong to nf4 and fp4, not to int8")
            if self.type != "int8" and self.threshold != 6.0:
                raise ValueError(f"threshold belongs to int8, not to {self.type}")
            return self

    @staticmethod
    def structure(settings) -> dict[str, Any]:
        return settings.model_dump(mode="json")

    @staticmethod
    def refuse(settings, before: list[str]) -> str | None:
        return refuse_packed_again(before)

    @staticmethod
    def memory(settings, size: ModelSize) -> int:
        """Bytes of what stays in float32, of the packed weights, and of a layer on its way: transformers reads one tensor at a
        time where it quantises. (On a CPU the mapped file comes on top, but the system can take its pages back.)"""
        packed = size.blocks if settings.type == "int8" else size.blocks * 9 // 16  # a scale in 32 bits for 64 weights
        return F32 * (size.total - size.blocks + 4 * size.layer) + packed

    @staticmethod
    def compress(
        source: Path,
        out: Path,
        settings,
        *,
        examples: list[list[int]] | None,
        device: str,
        dtype: str,
        progress: Callable[[int, int, str], None],
        seed: int = 0,
    ) -> dict[str, Any]:
        """Quantise and save in transformers' own format. Facts: bits, layers, bytes (stored)."""
        import importlib.util

        if importlib.util.find_spec("bitsandbytes") is None:
            raise Unsupported("bitsandbytes is not installed (pip install bitsandbytes)")
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BitsAndBytesConfig

        from ..models.arch import block_linears
        from ..models.loading import load_config, load_tokenizer, placement
        from ..models.widths import narrowed

        config = load_config(source)
        if config.get("quantization_config"):
            raise Unsupported(f"the model is quantised already ({config['quantization_config'].get('quant_method')})")
        compute = dtype if settings.compute_dtype == "auto" else settings.compute_dtype
        if settings.type == "int8":
            how = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=settings.threshold)
        else:
            how = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=settings.type,
                bnb_4bit_use_double_quant=settings.double_quant,
                bnb_4bit_compute_dtype=getattr(torch, compute),
            )
        auto = narrowed(AutoModelForSeq2SeqLM if config.get("is_encoder_decoder") else AutoModelForCausalLM, config)
        progress(0, 2, "quantising")
        model = auto.from_pretrained(
            source, quantization_config=how, dtype=torch.float32, use_safetensors=True, **placement(device)
        )
        wanted = "Linear8bitLt" if settings.type == "int8" else "Linear4bit"
        layers = block_linears(model)
        left = [name for name, layer in layers.items() if type(layer).__name__ != wanted]
        if len(left) == len(layers):
            raise Unsupported(f"bitsandbytes took none of this model's {len(layers)} linear layers")
        if wanted == "Linear4bit":
            _refuse_widths(layers)
        progress(1, 2, "saving")
        model.save_pretrained(out, safe_serialization=True)
        load_tokenizer(source).save_pretrained(out)
        if read_note(source):  # of the steps before; the format itself says what this one did
            write_note(source, out, {"backend": "bitsandbytes", **settings.model_dump(mode="json")})
        stored = sum(p.stat().st_size for p in out.glob("*.safetensors"))
        bits = 8 if settings.type == "int8" else 4
        return {"bits": bits, "layers": len(layers) - len(left), "left_dense": left, "bytes": stored}


def _refuse_widths(layers: dict[str, Any]) -> None:
    """On a CPU with bfloat16 products bitsandbytes packs 32 outputs and 64 inputs at a time, and other widths fail there."""
    from ..models.arch import features

    for name, layer in layers.items():
        packs = getattr(layer, "support_avx512bf16_for_cpu", False) and layer.weight.device.type == "cpu"
        inputs, outputs = features(layer)
        if packs and (inputs % 64 or outputs % 32):
            raise Unsupported(
                f"bitsandbytes' 4-bit layers on this CPU need inputs in multiples of 64 and outputs in multiples of 32; {name} "
                f"has {inputs} and {outputs}: type int8 works, and so does structured pruning with multiple: 64 and parts: mlp"
            )
