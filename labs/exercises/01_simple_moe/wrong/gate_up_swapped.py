"""SiLU is applied to up."""

import torch
from torch.nn.functional import linear, silu

SAYS = "gate and up are swapped"


def expert_ffn(x_ND: torch.Tensor, gate_up_2FD: torch.Tensor, down_DF: torch.Tensor) -> torch.Tensor:
    up_NF, gate_NF = linear(x_ND, gate_up_2FD).chunk(2, dim=1)
    return linear(silu(gate_NF) * up_NF, down_DF)
