"""The weights of a LoRA adapter without its base, for checkpoints, LoRA files and fusion."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cdm_lightning.lora.plan import Adapter


@dataclass(frozen=True)
class AdapterWeights:
    """The settings of a LoRA adapter, and its tensors by name.

    The names are "LAYER.lora_A.weight" (rank, in), "LAYER.lora_B.weight" (out, rank) and, with DoRA,
    "LAYER.lora_magnitude_vector.weight" (out,). B is stored without the scale.
    """

    adapter: Adapter
    tensors: Mapping[str, Tensor]

    def portable(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Return the tensors for a LoRA file: in `dtype`, on the CPU, with B multiplied by the adapter's scale.

        A LoRA file has no standard entry for the scale, so programs that load it assume a scale of 1.
        """
        return {
            name.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector"): (
                tensor.detach().float() * (self.adapter.scale if ".lora_B." in name else 1.0)
            )
            .to("cpu", dtype)
            .contiguous()
            for name, tensor in self.tensors.items()
        }
