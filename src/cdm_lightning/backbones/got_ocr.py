"""Load GOT-OCR 2.0 (Wei et al., arXiv:2409.01704), a model that reads the text in an image, and its processor."""

from typing import Any

import torch
from transformers import GotOcr2ForConditionalGeneration, GotOcr2Processor

from cdm_lightning.backbones.hub_folder import WEIGHTS, locate_model
from cdm_lightning.backbones.loaded_weights import load_model
from cdm_lightning.backbones.pipeline_folder import loading

NEEDED = ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS)
MORE = ("generation_config.json", "special_tokens_map.json", "processor_config.json")


def load_got_ocr(pretrained: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return the GOT-OCR 2.0 model `pretrained`, frozen and in `dtype`, and its processor of transformers.

    `pretrained` is a folder or a hub id, which is downloaded. It is the form that transformers has a class for, such as
    stepfun-ai/GOT-OCR-2.0-hf; the form with code of its own is refused. Raises `UserError` if it is neither, or if its
    files cannot be used.
    """
    folder = locate_model(pretrained, NEEDED, "GOT-OCR", "metric.ocr.reader.pretrained", MORE)
    with loading(folder):
        processor = GotOcr2Processor.from_pretrained(folder, trust_remote_code=False)
    model = load_model(GotOcr2ForConditionalGeneration, folder, dtype)
    return model.eval().requires_grad_(False), processor
