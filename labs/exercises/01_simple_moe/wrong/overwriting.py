"""Each expert replaces what the experts before it left in a token's row."""

import torch

SAYS = "overwriting instead of adding"


def aggregate(
    y_END: list[torch.Tensor], rows_E: list[tuple[torch.Tensor, torch.Tensor]], scores_TK: torch.Tensor
) -> torch.Tensor:
    out_TD = y_END[0].new_zeros(scores_TK.shape[0], y_END[0].shape[1])
    for y_ND, (token_N, slot_N) in zip(y_END, rows_E, strict=True):
        out_TD[token_N] = y_ND * scores_TK[token_N, slot_N, None]
    return out_TD
