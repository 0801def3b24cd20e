"""An expert takes rows until it is full, in token order."""

import torch

SAYS = "dropping by position"


def drop(scores_TK: torch.Tensor, expert_ids_TK: torch.Tensor, E: int, capacity: int) -> torch.Tensor:
    chosen_RE = torch.nn.functional.one_hot(expert_ids_TK.flatten(), E)
    place_R = (chosen_RE.cumsum(dim=0) * chosen_RE).sum(dim=1)
    return (place_R <= capacity).view_as(expert_ids_TK)
