"""The student of a run, read from its folder or from one of its checkpoints."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from cdm_lightning.backbones.base import Backbone
from cdm_lightning.backbones.families import BACKBONES
from cdm_lightning.checkpoint.stored import StoredCheckpoint, read_checkpoint
from cdm_lightning.config import build
from cdm_lightning.config.registered import registered, require_registered
from cdm_lightning.errors import UserError
from cdm_lightning.lora.plan import LoRAPlan
from cdm_lightning.lora.weights import AdapterWeights
from cdm_lightning.run.folder import CONFIG, Run

LORA = ("cdm_lightning.lora.plan.LoRAPlan", "cdm_lightning.lora.plan.Adapter")
PARTS = {"backbone": BACKBONES, "lora": LORA}  # what is built from a run's folder, of which classes
GROUP = "cdm_lightning.{}"  # of the entry points that register more of them


@dataclass(frozen=True)
class TrainedStudent:
    """The student of an opened checkpoint, whose network is built only by `network`.

    `plan` says which networks are LoRA adapters, `stored` is the checkpoint, and `weights` the network that is read from it:
    "student" or "student_ema".
    """

    backbone: Backbone
    plan: LoRAPlan
    stored: StoredCheckpoint
    weights: str
    run: Run

    @property
    def iteration(self) -> int:
        """The number of iterations that the student was trained for."""
        return self.stored.iteration

    def network(self) -> nn.Module | AdapterWeights:
        """Return the student's network in eval mode, or its adapter's weights alone if the student is a LoRA."""
        tensors = self.stored.network_weights(self.weights)
        adapter = self.plan.of("student")
        if adapter is not None:
            return AdapterWeights(adapter, tensors)
        network = self.backbone.build_network()
        network.load_state_dict(tensors)
        return network.eval()


def open_student(source: str | Path, weights: str = "auto", pretrained: str | None = None) -> TrainedStudent:
    """Open the student of the checkpoint `source`, or of the newest checkpoint of the run's folder `source`.

    `weights` is "student", "student_ema" or "auto": the EMA if there is one. `pretrained` replaces the path of the pretrained
    pipeline in the run's configuration. Raises `UserError` for a checkpoint that is damaged, or of another backbone.
    """
    run, checkpoint = Run.find(source)
    backbone, plan = build_parts(run, pretrained)
    found = run.checkpoint(checkpoint)
    stored = read_checkpoint(found.path, backbone.fingerprint + plan.tag(found.trained_roles))
    weights = choose_weights(weights, stored.ema_updates, stored.path)
    return TrainedStudent(backbone, plan, stored, weights, run)


def build_parts(run: Run, pretrained: str | None = None) -> tuple[Backbone, LoRAPlan]:
    """Build the backbone and the LoRA plan that a run's configuration describes, the only objects built from a run's folder.

    `pretrained` replaces the path of the pretrained pipeline. Raises `UserError` before anything is built if the configuration
    names a class that is not registered (`config.registered`).
    """
    config = run.config()
    for key, own in PARTS.items():
        if key == "backbone" or config.get(key):  # runs of older versions do not have `lora`
            require_registered(
                config[key], registered(GROUP.format(key), own), f"{run.folder / CONFIG}: {key}", GROUP.format(key)
            )
    if pretrained is not None:
        config["backbone"]["pretrained"] = pretrained
    backbone = build(config, "backbone")
    plan = build(config, "lora") if config.get("lora") else LoRAPlan()
    if not isinstance(backbone, Backbone) or not isinstance(plan, LoRAPlan):
        raise UserError(
            f"{run.folder / CONFIG}: backbone and lora must be a backbone and a LoRA plan; restore it as training wrote it"
        )
    return backbone, plan


def choose_weights(weights: str, ema_updates: int, checkpoint: Path) -> str:
    """Return `weights`, or for "auto" the name of the network to use: "student_ema" if `ema_updates` is above 0, else "student".

    Raises `UserError`, which names `checkpoint`, for "student_ema" if it holds none.
    """
    if weights == "auto":
        return "student_ema" if ema_updates else "student"
    if weights == "student_ema" and not ema_updates:
        raise UserError(f"{checkpoint} holds no EMA of the student (ema.decay was null); use --weights student")
    return weights


def plain_network(backbone: Backbone, network: nn.Module | AdapterWeights) -> nn.Module:
    """Return a network in eval mode without adapters; the weights of a LoRA are fused in float32 into a new pretrained one."""
    if isinstance(network, AdapterWeights):
        from cdm_lightning.lora.fuse import fuse  # imports peft

        return fuse(network, backbone.build_network())
    return network.eval()
