"""What the commands run: SD3-Medium and a quarter of LongCat-Image's depth at real widths, or toys of the same classes to rehearse."""

from dataclasses import dataclass, replace

from benchmarks.sizes import SIZES, Size

PEAKS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
# FLOP/s of bfloat16 products without sparsity, by what is in the name of the card; from NVIDIA's data sheets


@dataclass(frozen=True)
class Networks:
    """A size of benchmarks/sizes.py, and what is measured of it: batches, and for memory one of them in parts."""

    name: str
    batches: tuple[int, ...]
    parts: tuple[tuple[int, int], ...] = ()  # (batch, number of parts)

    def sizes(self, device: str) -> list[Size]:
        """One size for each batch and then for each batch in parts, on a device."""
        chosen = replace(SIZES[self.name], device=device)
        return [
            replace(chosen, batch=batch, accumulate=n) for batch, n in (*((b, 1) for b in self.batches), *self.parts)
        ]


FULL = (Networks("sd3_medium", (4, 8, 16), ((16, 4),)), Networks("longcat_quarter", (4, 8)))
TOY = (Networks("sd3_toy", (2, 3), ((4, 2),)), Networks("longcat_toy", (2,)))
NETWORKS = {"full": FULL, "toy": TOY}

ATTENTION_SHAPES = {  # (samples, heads, tokens, width of a head) of one call
    "full": {"SD3-Medium, 1024 pixels": (8, 24, 4429, 64), "LongCat, 1024 pixels": (4, 24, 4608, 128)},
    "toy": {"toy": (2, 2, 22, 8)},
}
CODECS = {"full": ("sd3_medium", "sana", "qwen_image"), "toy": ()}


def label(size: Size) -> str:
    """What a row is called: the batch, and its parts."""
    return f"batch {size.batch}" + (f" in {size.accumulate} parts" if size.accumulate > 1 else "")


def peak_of(card: str) -> float | None:
    """The FLOP/s of bfloat16 products on the data sheet of a card; None if it is not known here."""
    return next((rate for name, rate in PEAKS.items() if name in card), None)
