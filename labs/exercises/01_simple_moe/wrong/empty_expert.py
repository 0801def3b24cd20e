"""Sorted rows are split by counts, and counts has no entry for the experts after the last one chosen."""

import torch

SAYS = "an expert without tokens"


def assign(expert_ids_TK: torch.Tensor, E: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    K = expert_ids_TK.shape[1]
    row_R = expert_ids_TK.flatten().argsort(stable=True)
    counts_E = expert_ids_TK.flatten().bincount()
    return [(row_N // K, row_N % K) for row_N in row_R.split(counts_E.tolist())]
