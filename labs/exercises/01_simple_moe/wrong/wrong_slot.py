"""Every row is weighted with its token's best score."""

import torch

SAYS = "scores applied to the wrong slot"


def aggregate(
    y_END: list[torch.Tensor], rows_E: list[tuple[torch.Tensor, torch.Tensor]], scores_TK: torch.Tensor
) -> torch.Tensor:
    out_TD = y_END[0].new_zeros(scores_TK.shape[0], y_END[0].shape[1])
    for y_ND, (token_N, _) in zip(y_END, rows_E, strict=True):
        out_TD = out_TD.index_add(0, token_N, y_ND * scores_TK[token_N, 0, None])
    return out_TD
