"""Equal scores: the higher token goes first."""

import torch

SAYS = "the lower token goes first"


def drop(scores_TK: torch.Tensor, expert_ids_TK: torch.Tensor, E: int, capacity: int) -> torch.Tensor:
    scores_R, expert_of_row_R = scores_TK.flatten(), expert_ids_TK.flatten()
    keep_R = torch.zeros_like(expert_of_row_R, dtype=torch.bool)
    for expert in range(E):
        row_N = (expert_of_row_R == expert).nonzero()[:, 0]
        worst_first_N = scores_R[row_N].sort(stable=True).indices
        keep_R[row_N[worst_first_N[max(0, len(row_N) - capacity):]]] = True
    return keep_R.view_as(expert_ids_TK)
