"""The scores are cut from the graph, so the router never learns."""

import torch
from torch.nn.functional import linear, silu

SAYS = "the graph was cut on the way to the router"


def moe_layer(
    x_TD: torch.Tensor, router_ED: torch.Tensor, gate_up_E2FD: torch.Tensor, down_EDF: torch.Tensor, K: int
) -> torch.Tensor:
    scores_TK, expert_ids_TK = linear(x_TD, router_ED).softmax(dim=1).detach().topk(K, dim=1)
    scores_TK = scores_TK / scores_TK.sum(dim=1, keepdim=True)
    out_TD = torch.zeros_like(x_TD)
    for expert in range(len(router_ED)):
        token_N, slot_N = torch.nonzero(expert_ids_TK == expert, as_tuple=True)
        gate_NF, up_NF = linear(x_TD[token_N], gate_up_E2FD[expert]).chunk(2, dim=1)
        y_ND = linear(silu(gate_NF) * up_NF, down_EDF[expert]) * scores_TK[token_N, slot_N, None]
        out_TD = out_TD.index_add(0, token_N, y_ND)
    return out_TD
