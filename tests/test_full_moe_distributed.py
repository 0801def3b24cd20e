"""OptimizedMoELayer inside DDP and FSDP2: two processes, two steps, against one process on the whole batch:
python -m pytest tests/test_full_moe_distributed.py"""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from common.measure import relative_error
from labs.full_moe import OptimizedMoELayer

T, D, F, E, K, WORLD, STEPS = 64, 32, 24, 8, 2, 2, 2
# How two processes train, and the relative error of the parameters against one process in float32. Adam turns rounding
# into whole steps where a gradient is near zero.
HOW = {"ddp": 1e-4, "fsdp": 1e-4, "fsdp of experts": 1e-4, "fsdp, bfloat16": 0.02, "fsdp of experts, bfloat16": 0.02}
OPTIONS = {
    "plain": {"capacity_factor": None},
    "bias, z-loss, checkpointing": {"capacity_factor": None, "bias_update_rate": 0.01, "z_loss_weight": 0.01,
                                    "gradient_checkpointing": True, "shared_ffn_dim": 16},
    # A loss of each process's own loads would not be that of the whole. No expert can have more than 4 times the mean.
    "no group": {"capacity_factor": 8.0, "adaptive_capacity": True, "bias_update_rate": 0.01,
                 "load_balance_weight": 0.0},
}


class Model(nn.Module):
    """A layer between two projections, so that it is not the whole model."""

    def __init__(self, options: dict, group: object | None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, D)
        self.moe = OptimizedMoELayer(D, F, E, K, **{"load_balance_weight": 0.1, **options}, balance_group=group,
                                     backend="grouped")

    def forward(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out_TD, aux_loss = self.moe(self.first(x_TD), return_aux_loss=True)
        return self.last(out_TD), aux_loss


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole batch of a step, and what to predict."""
    generator = torch.Generator().manual_seed(step)
    return tuple(torch.randn(T, D, generator=generator) for _ in range(2))


def train(model: nn.Module, moe: OptimizedMoELayer, part: slice) -> None:
    """STEPS of AdamW on this part of each batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        x_TD, target_TD = (whole[part] for whole in data(step))
        out_TD, aux_loss = model(x_TD)
        ((out_TD - target_TD).square().mean() + aux_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        moe.update_balance()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A parameter as a whole, whoever holds its parts."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()


def train_part(rank: int, how: str, name: str) -> dict[str, torch.Tensor]:
    """The parameters after training with OPTIONS[name] on this process's half of each batch."""
    model = Model(OPTIONS[name], None if name == "no group" else dist.group.WORLD)
    moe, wrapped = model.moe, model
    if how == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        options = {"mesh": dist.init_device_mesh("cpu", (WORLD,)),
                   "mp_policy": low if "bfloat16" in how else MixedPrecisionPolicy()}
        if "experts" in how:
            fully_shard(moe.experts, **options)
        fully_shard(moe, **options)
        fully_shard(model, **options)
    rows = T // WORLD
    train(wrapped, moe, slice(rank * rows, (rank + 1) * rows))
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


def worker(rank: int, port: int, name: str, path: str) -> None:
    """One of two processes, for all of HOW, since to start it takes longer than to train; the first leaves what it
    found in `path`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    try:
        found = {how: train_part(rank, how, name) for how in HOW}
        if rank == 0:
            torch.save(found, path)
    finally:
        dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("options", OPTIONS)
def test_two_processes_equal_one(options, tmp_path):
    path = tmp_path / "found.pt"
    mp.start_processes(worker, (free_port(), options, str(path)), nprocs=WORLD, start_method="spawn")
    model = Model(OPTIONS[options], None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, model.moe, slice(0, T))
    expected = model.state_dict()
    assert not [name for name in expected if torch.equal(expected[name], before[name])], "all were trained"
    all_found = torch.load(path)
    for how, found in all_found.items():
        assert found.keys() == expected.keys(), how
        for name, tensor in expected.items():
            assert relative_error(found[name], tensor.double()) < HOW[how], f"{how}: {name}"
    for name, tensor in all_found["fsdp, bfloat16"].items():
        assert torch.equal(all_found["fsdp of experts, bfloat16"][name], tensor), f"{name}: the scores were rounded"


def test_loads_of_one_process_alone_give_another_loss():
    """The comparison above can fail: the balance loss of half a batch is not that of the whole."""
    model = Model(OPTIONS["plain"], None)
    x_TD, _ = data(0)
    whole_loss = model(x_TD)[1]
    halves = [model(x_TD[:32])[1], model(x_TD[32:])[1]]
    assert abs(sum(halves) / 2 - whole_loss) > 1e-5 * whole_loss


def test_a_process_without_a_forward_takes_part_in_balancing(monkeypatch):
    """Else the others would wait for it for ever."""
    layer = OptimizedMoELayer(D, F, E, K, bias_update_rate=0.5)
    elsewhere_E = torch.tensor([9, 3, 3, 3, 3, 3, 0, 0])
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda rows_E, group: rows_E.add_(elsewhere_E))
    layer.update_balance()
    assert layer.gate.e_score_correction_bias.tolist() == [-0.5, 0, 0, 0, 0, 0, 0.5, 0.5]
