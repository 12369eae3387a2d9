"""The student of a run, read from its folder or from one of its checkpoints."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from cdm_lightning.backbones.base import Backbone
from cdm_lightning.backbones.families import BACKBONES
from cdm_lightning.checkpoint.fitting import require_fit, shapes_of
from cdm_lightning.checkpoint.stored import StoredCheckpoint, read_checkpoint
from cdm_lightning.config import build
from cdm_lightning.config.registered import registered, require_registered, typed_nodes
from cdm_lightning.errors import UserError
from cdm_lightning.files import restoring
from cdm_lightning.lora.plan import LoRAPlan
from cdm_lightning.lora.weights import AdapterWeights
from cdm_lightning.run.folder import CONFIG, Run

LORA = ("cdm_lightning.lora.plan.LoRAPlan", "cdm_lightning.lora.plan.Adapter")
PARTS = {"backbone": BACKBONES, "lora": LORA}  # option: the classes that may be built from a run's folder
GROUP = "cdm_lightning.{}"  # the group of entry points that registers further classes


@dataclass(frozen=True)
class TrainedStudent:
    """The student in an opened checkpoint. Its method `network` builds the network with the trained weights.

    `backbone` and `plan` are built from the configuration of `run`; `plan` says which networks are LoRA adapters.
    `stored` is the opened checkpoint. `weights` says which of its weights are used: "student" or "student_ema".
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
        """Return the student's network in eval mode. If the student is a LoRA, return the weights of its adapter alone.

        Raises `UserError` if the names or shapes of the stored tensors are not those of the network's tensors, or if a
        stored tensor has whole numbers and the network's tensor has floating-point numbers, or vice versa.
        """
        adapter = self.plan.of("student")
        skeleton = self.backbone.build_empty(teacher=False)  # cheap, if the family has one
        network = self.backbone.build_network() if skeleton is None else skeleton
        if adapter is None:
            expected = shapes_of(network.state_dict())
        else:
            from cdm_lightning.lora.shared import adapter_shapes  # imports peft

            expected = adapter_shapes(network, adapter, self.backbone.lora_targets)
        require_fit(self.stored, self.weights, expected)
        tensors = self.stored.network_weights(self.weights)
        if adapter is not None:
            return AdapterWeights(adapter, tensors)
        network = self.backbone.build_network() if skeleton is not None else network
        network.load_state_dict(tensors)
        return network.eval()


def open_student(source: str | Path, weights: str = "auto", pretrained: str | None = None) -> TrainedStudent:
    """Open the student of a checkpoint, or of the newest checkpoint in a run's folder. `source` is the path of either.

    `weights` is "student", "student_ema" or "auto", which takes the EMA if there is one. `pretrained` replaces the path
    of the pretrained pipeline that the run's configuration names.

    Raises `UserError` if the checkpoint is damaged, or if it was trained with another backbone or other LoRA settings
    than the run's configuration and `pretrained` describe.
    """
    run, checkpoint = Run.find(source)
    backbone, plan = build_parts(run, pretrained)
    found = run.checkpoint(checkpoint)
    stored = read_checkpoint(found.path, backbone.fingerprint + plan.tag(found.trained_roles))
    weights = choose_weights(weights, stored.ema_updates, stored.path)
    return TrainedStudent(backbone, plan, stored, weights, run)


def build_parts(run: Run, pretrained: str | None = None) -> tuple[Backbone, LoRAPlan]:
    """Build the backbone and the LoRA plan that a run's configuration describes.

    The run may come from a stranger. Therefore nothing else is built from its configuration, and `UserError` is raised
    before anything is built if a class is not registered (see `config.registered`). `pretrained` replaces the path of
    the pretrained pipeline.
    """
    config, file = run.config(), run.kept or run.folder / CONFIG
    nodes = {
        key: config[key] for key in PARTS if key == "backbone" or config.get(key)
    }  # runs of older versions do not have `lora`
    for key, node in nodes.items():
        group = GROUP.format(key)
        require_registered(node, registered(group, PARTS[key]), f"{file}: {key}", group)
    with restoring(file, "restore the file that training wrote"):
        typed = typed_nodes(nodes, file)
        if pretrained is not None:
            typed.backbone.pretrained = pretrained
        backbone = build(typed, "backbone")
        plan = build(typed, "lora") if "lora" in nodes else LoRAPlan()
    if not isinstance(backbone, Backbone) or not isinstance(plan, LoRAPlan):
        wrong = (
            "`lora` must describe a LoRA plan"
            if isinstance(backbone, Backbone)
            else "`backbone` must describe a backbone"
        )
        raise UserError(f"{file}: {wrong}; restore the file that training wrote")
    return backbone, plan


def choose_weights(weights: str, ema_updates: int, checkpoint: Path) -> str:
    """Return the name of the stored weights to use: "student" or "student_ema".

    `ema_updates` is the number of updates of the EMA in `checkpoint`. "auto" means "student_ema" if this number is
    above 0, and otherwise "student". Other values of `weights` are returned unchanged. Raises `UserError` for
    "student_ema" if the number is 0, which means that the checkpoint has no EMA.
    """
    if weights == "auto":
        return "student_ema" if ema_updates else "student"
    if weights == "student_ema" and not ema_updates:
        raise UserError(f"{checkpoint} has no EMA of the student, because ema.decay was null; use --weights student")
    return weights


def plain_network(backbone: Backbone, network: nn.Module | AdapterWeights) -> nn.Module:
    """Return a network in eval mode that has no LoRA adapters.

    If `network` holds the weights of a LoRA, the result is a new pretrained network into which they are fused in
    float32. Otherwise the result is `network` itself.
    """
    if isinstance(network, AdapterWeights):
        from cdm_lightning.lora.fuse import fuse  # imports peft

        return fuse(network, backbone.build_network())
    return network.eval()
