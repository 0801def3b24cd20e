"""The softmax runs over the tokens."""

import torch
from torch.nn.functional import linear

SAYS = "softmax over the wrong axis"


def route(x_TD: torch.Tensor, router_ED: torch.Tensor, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    scores_TK, expert_ids_TK = linear(x_TD, router_ED).softmax(dim=0).topk(K, dim=1)
    return scores_TK / scores_TK.sum(dim=1, keepdim=True), expert_ids_TK
