"""An adapter apart from its base: what a checkpoint holds of it, a file for other programs, a fused network."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cdm_lightning.lora.plan import Adapter


@dataclass(frozen=True)
class AdapterWeights:
    """The tensors of one adapter by name: "LAYER.lora_A.weight" (rank, in), "LAYER.lora_B.weight" (out, rank), ..."""

    adapter: Adapter
    tensors: Mapping[str, Tensor]

    def fuse_into(self, network: nn.Module) -> nn.Module:
        """`network`, a float32 copy of the base, with the update added to its weights in place; in eval mode."""
        from cdm_lightning.lora.shared import fuse

        return fuse(network, self.adapter, self.tensors).eval()

    def portable(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Tensors as LoRA files hold them, on the CPU.

        The scale is part of B: such files carry no scale that every reader would find, and without one all take 1.
        """
        return {
            name.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector"): (
                tensor.detach().float() * (self.adapter.scale if ".lora_B." in name else 1.0)
            )
            .to("cpu", dtype)
            .contiguous()
            for name, tensor in self.tensors.items()
        }
