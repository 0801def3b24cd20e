"""The rows, sorted by expert, are summed as if they were still sorted by token."""

import torch

SAYS = "token order lost"


def aggregate(
    y_END: list[torch.Tensor], rows_E: list[tuple[torch.Tensor, torch.Tensor]], scores_TK: torch.Tensor
) -> torch.Tensor:
    y_TKD = torch.cat(y_END).unflatten(0, scores_TK.shape)
    return (y_TKD * scores_TK[:, :, None]).sum(dim=1)
