"""The weights of an adapter without its base, as used by checkpoints, LoRA files and fused networks."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cdm_lightning.lora.plan import Adapter


@dataclass(frozen=True)
class AdapterWeights:
    """The tensors of one adapter by name: "LAYER.lora_A.weight" (rank, in), "LAYER.lora_B.weight" (out, rank), ..."""

    adapter: Adapter
    tensors: Mapping[str, Tensor]

    def portable(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Return the tensors in the form of LoRA files, on the CPU.

        B is multiplied by the scale. LoRA files have no standard entry for a scale, and all readers use 1 without one.
        """
        return {
            name.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector"): (
                tensor.detach().float() * (self.adapter.scale if ".lora_B." in name else 1.0)
            )
            .to("cpu", dtype)
            .contiguous()
            for name, tensor in self.tensors.items()
        }
