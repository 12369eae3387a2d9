"""OCR accuracy: whether the text between quotation marks in a prompt can be read in the image."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Protocol

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from cdm_lightning.errors import UserError
from cdm_lightning.kinds import ComputeDtype, Model
from cdm_lightning.metrics.base import ImageBatch, MeasuredImages, Metric

QUOTED = re.compile('"([^"]+)"|“([^”]+)”|„([^“”]+)[“”]|«([^»]+)»|「([^」]+)」')
END = "<|im_end|>"  # what GOT-OCR writes after the text
LongestText = Annotated[int, Ge(1), Le(4096)]


class TextReader(Protocol):
    """An object that reads the text in images, such as `GotOcrReader`."""

    def read(self, images: Tensor) -> list[str]:
        """Return the text in each of the images (B, 3, H, W) in [0, 1], or "" where there is none."""
        ...


class GotOcrReader(nn.Module):
    """Reads the text in images by GOT-OCR 2.0 (see `backbones.got_ocr.load_got_ocr`), which writes at most `longest` tokens.

    `dtype` is that of its weights. Raises `UserError` if the model is missing or cannot be used.
    """

    def __init__(self, pretrained: Model, longest: LongestText = 128, dtype: ComputeDtype = "float32") -> None:
        super().__init__()
        from cdm_lightning.backbones.got_ocr import load_got_ocr  # takes seconds to import, so only where it is used

        self.network: Any
        self.network, self.processor = load_got_ocr(pretrained, getattr(torch, dtype))
        self.longest = longest

    @torch.no_grad()
    def read(self, images: Tensor) -> list[str]:
        """Return the text in each of the images (B, 3, H, W) in [0, 1], which are first rounded to 8 bits."""
        weight = next(self.network.parameters())
        pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        inputs = self.processor(list(pixels), return_tensors="pt").to(weight.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(weight.dtype)
        found = self.network.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=self.longest,
            tokenizer=self.processor.tokenizer,
            stop_strings=END,
        )
        texts = self.processor.batch_decode(found[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.partition(END)[0].strip() for text in texts]


def wanted_text(prompt: str) -> str:
    """Return the texts between quotation marks in a prompt, joined by spaces, or "" if there are none."""
    found = ["".join(groups) for groups in QUOTED.findall(prompt)]
    return " ".join(text.strip() for text in found if text.strip())


def plain_text(text: str) -> str:
    """Return `text` as it is compared: without differences of case, of the width of letters, and of white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def similarity(read: str, wanted: str) -> float:
    """Return 1 - the edit distance of two texts / the length of the longer one, of their `plain_text`. 1 means equal.

    The edit distance is that of Levenshtein: how many letters must be inserted, deleted or replaced.
    """
    from torchmetrics.functional.text import char_error_rate

    read, wanted = plain_text(read), plain_text(wanted)
    if not read or not wanted:
        return float(read == wanted)
    errors = round(float(char_error_rate(read, wanted)) * len(wanted))
    return 1 - errors / max(len(read), len(wanted))


class TextAccuracy(Metric):
    """How well the text in the images agrees with that between quotation marks in their prompts.

    The score of an image is the `similarity` of the text that `reader` reads in it and the quoted text. Other text in the
    image lowers it. If a prompt has several quoted texts, they are expected in their order. A prompt without quoted text is
    refused.
    """

    def __init__(self, reader: TextReader) -> None:
        self.reader = reader

    def check_prompt(self, prompt: str) -> None:
        """Raise `UserError` if `prompt` has no text between quotation marks."""
        if not plain_text(wanted_text(prompt)):
            raise UserError(f"{prompt[:60]!r} has no text in quotation marks that the image must show")

    def score(self, batch: ImageBatch) -> Tensor:
        """Return the scores (B,) in [0, 1] of the images in `batch`."""
        texts: Sequence[str] = self.reader.read(batch.images)
        wanted = map(wanted_text, batch.prompts)
        return torch.tensor([similarity(*pair) for pair in zip(texts, wanted, strict=True)])

    def figures(self, measured: MeasuredImages, others: Mapping[str, MeasuredImages]) -> dict[str, float] | None:
        """Return {"accuracy": the mean score, "exact": the share of images that show exactly the text}, or None without images."""
        scores = measured.scores
        if scores is None or not len(scores):
            return None
        return {"accuracy": float(scores.double().mean()), "exact": float((scores == 1).double().mean())}
