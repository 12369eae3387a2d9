"""What each process holds of sharded networks, what it read for it, and what the networks compute."""

from types import SimpleNamespace

import torch
from processes import together
from torch import Tensor

from cdm_lightning.core.flow import VelocityField
from cdm_lightning.core.rollout import Rollout, walk
from cdm_lightning.data.batches import PADDING, PromptBatch, evaluation_batches
from cdm_lightning.distributed import sharding
from cdm_lightning.objectives.cdm import CDMObjective

CDM_ROLES = CDMObjective().roles


def test_two_processes_hold_and_read_half_of_each_network(tiny_pipeline_folder):
    together(2, look_at_shards, (str(tiny_pipeline_folder),))


def look_at_shards(folder: str) -> None:
    """Run by each of two processes."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    from cdm_lightning.backbones.base import BoundField
    from cdm_lightning.backbones.sd3 import SD3Backbone
    from cdm_lightning.distributed.ranks import gather
    from cdm_lightning.distributed.sharding import put_together
    from cdm_lightning.training.networks import Networks
    from cdm_lightning.training.placement import distribute

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (1, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    backbone = SD3Backbone(folder, max_sequence_length=8, teacher_dtype="bfloat16")
    whole, teacher = backbone.build_network(), backbone.build_teacher()
    read: dict[str, int] = {}
    read_rows = backbone.read_rows

    def recording(name: str, first: int, end: int) -> Tensor:
        read[name] = read.get(name, 0) + end - first
        return read_rows(name, first, end)

    backbone.read_rows = recording
    networks = Networks(backbone, CDM_ROLES, empty=True)
    layout = SimpleNamespace(device_mesh=mesh, root_device=torch.device("cpu"), shards=2, on_cpu=())
    distribute(networks, backbone, layout, torch.bfloat16)

    assert {name.split(".")[0] for name in networks.state_dict()} == {"student", "fake_score", "student_ema"}
    for role, pretrained in (("student", whole), ("fake_score", whole), ("student_ema", whole), ("teacher", teacher)):
        network = getattr(networks, role)
        for name, parameter in network.named_parameters():
            assert isinstance(parameter, DTensor)
            assert len(parameter.to_local()) <= -(-len(parameter) // 2)
            assert torch.equal(parameter.full_tensor(), pretrained.get_parameter(name)), (role, name)
        assert torch.equal(network.pos_embed.pos_embed, pretrained.pos_embed.pos_embed)
    rows = {name: len(parameter.to_local()) for name, parameter in networks.student.named_parameters()}
    assert read == {name: 4 * count for name, count in rows.items()}
    total = gather(sum(rows.values()))
    assert sum(total) == sum(len(parameter) for parameter in whole.parameters())

    widths = {"prompt_embeds": (20, whole.config.joint_attention_dim), "pooled": (whole.config.pooled_projection_dim,)}
    text = {name: torch.ones(2, *width) for name, width in widths.items()}
    x = torch.ones(2, *backbone.latent_shape)
    for role in ("student", "teacher"):
        field = BoundField(backbone, getattr(networks, role), text, torch.bfloat16)
        with torch.no_grad():
            near, nearer = field(x, torch.tensor([0.9000, 0.9003])), field(x, torch.tensor([0.9003, 0.9000]))
        assert near.dtype == torch.float32
        assert not torch.equal(near[0], near[1])  # a bfloat16 timestep of 900.3 would be 900
        assert torch.equal(near, nearer.flip(0))
        assert all(isinstance(parameter, DTensor) for parameter in getattr(networks, role).parameters())
    built = put_together(networks.student, backbone.build_network)
    assert (built is None) == (rank == 1)
    if built is not None:
        assert all(torch.equal(built.get_parameter(name), value) for name, value in whole.named_parameters())
    dist.destroy_process_group()


class Counted(VelocityField):
    """A velocity that is the state itself; counts the samples of each call."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.calls.append(len(x))
        return x


def test_a_rollout_makes_the_calls_that_were_agreed_on_with_the_same_result():
    noise, anchor = torch.randn(3, 2, 1, 1), torch.tensor([0, 1, 0])
    sigmas = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0]).expand(3, -1)
    alone, agreed, asked = Counted(), Counted(), []
    (expected,) = walk([Rollout(alone, noise, sigmas, anchor)])
    (found,) = walk([Rollout(agreed, noise, sigmas, anchor)], lambda calls: asked.append(calls) or 3)
    assert (alone.calls, agreed.calls, asked) == ([1], [1, 1, 1], [1])
    assert torch.equal(found, expected)


def test_validation_is_shared_out_in_equally_many_batches():
    for size, batch_size, ranks in ((5, 2, 2), (7, 1, 3), (4, 8, 4), (9, 2, 4), (10, 3, 1)):
        shares = [evaluation_batches(size, batch_size, rank, ranks) for rank in range(ranks)]
        assert len({len(share) for share in shares}) == 1
        draws = [draw for share in shares for batch in share for draw in batch if draw.key != PADDING]
        assert [draw.key for draw in draws] == [draw.prompt for draw in draws] == list(range(size))
        assert all(0 < len(batch) <= batch_size for share in shares for batch in share)


def test_a_batch_is_split_into_parts_in_order():
    batch = PromptBatch(list("abcde"), torch.arange(5))
    parts = batch.split(2)
    assert [len(part.prompts) for part in parts] == [2, 3]
    assert [prompt for part in parts for prompt in part.prompts] == batch.prompts
    assert torch.equal(torch.cat([part.indices for part in parts]), batch.indices)
    assert len(batch.split(9)) == 5


def test_figures_of_several_devices_are_averaged_on_the_device(monkeypatch):
    """The meta device stands for a GPU: a loss lies there, the gradient norm of a network that rests in host memory not."""
    reduced = []
    monkeypatch.setattr(sharding.ranks, "world_size", lambda: 2)
    monkeypatch.setattr(sharding.dist, "all_reduce", reduced.append)
    norm, loss = torch.tensor(3.0), torch.zeros((), device="meta", dtype=torch.bfloat16)
    figures = sharding.average_figures({"grad_norm": norm, "loss": loss})
    assert [(value.device.type, value.dtype) for value in figures.values()] == [("meta", torch.float32)] * 2
    assert [together.shape for together in reduced] == [(2,)]
    assert sharding.average_figures({"grad_norm": norm, "again": norm}) == {"grad_norm": 1.5, "again": 1.5}
