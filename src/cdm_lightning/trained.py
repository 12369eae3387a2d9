"""The student of a run, read from its folder or from one of its checkpoints."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from cdm_lightning.backbones.base import Backbone
from cdm_lightning.checkpoint.stored import StoredCheckpoint, newest_checkpoint, read_checkpoint, require_good
from cdm_lightning.config import build
from cdm_lightning.errors import UserError
from cdm_lightning.export import CHECKPOINTS, choose_weights, find_run, read_config
from cdm_lightning.lora.plan import LoRAPlan
from cdm_lightning.lora.weights import AdapterWeights


@dataclass(frozen=True)
class TrainedStudent:
    """The student of a checkpoint: its backbone, which weights they are, and where they are, not yet a network."""

    backbone: Backbone
    plan: LoRAPlan
    stored: StoredCheckpoint
    weights: str
    run: Path

    @property
    def iteration(self) -> int:
        """Iterations of training."""
        return self.stored.iteration

    def network(self) -> nn.Module | AdapterWeights:
        """The network in eval mode, or for a LoRA its adapter's weights."""
        tensors = self.stored.network_weights(self.weights)
        adapter = self.plan.of("student")
        if adapter is not None:
            return AdapterWeights(adapter, tensors)
        network = self.backbone.build_network()
        network.load_state_dict(tensors)
        return network.eval()


def open_student(source: str | Path, weights: str = "auto", pretrained: str | None = None) -> TrainedStudent:
    """The student of a checkpoint, or of the newest one of a run folder; see `export_checkpoint`."""
    run, checkpoint = find_run(Path(source))
    config = read_config(run)
    if pretrained is not None:
        config["backbone"]["pretrained"] = pretrained
    backbone = build(config, "backbone")
    plan = build(config, "lora") if config.get("lora") else LoRAPlan()  # runs of older versions do not have it
    found = open_checkpoint(run, checkpoint)
    stored = read_checkpoint(found.path, backbone.fingerprint + plan.tag(found.trained_roles))
    weights = choose_weights(weights, stored.ema_updates, stored.path)
    return TrainedStudent(backbone, plan, stored, weights, run)


def open_checkpoint(run: Path, checkpoint: Path | None = None) -> StoredCheckpoint:
    """A checkpoint, or the newest good one of a run; UserError if there is none or its files are damaged."""
    if checkpoint is not None:
        return require_good(read_checkpoint(checkpoint))
    found = newest_checkpoint(run / CHECKPOINTS)
    if found is None:
        raise UserError(f"{run} holds no checkpoint yet; let the run train longer or pass a checkpoint")
    return found


def plain_network(backbone: Backbone, network: nn.Module | AdapterWeights) -> nn.Module:
    """A network without adapters, in eval mode: a LoRA is fused into a new copy of the pretrained one, in float32."""
    if isinstance(network, AdapterWeights):
        return network.fuse_into(backbone.build_network())
    return network.eval()
