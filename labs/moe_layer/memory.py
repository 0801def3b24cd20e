"""What a forward keeps for its backward: predicted from the sizes, and measured."""

from __future__ import annotations

from collections.abc import Callable

import torch

# T tokens, D model width, F expert width, E experts, K top-k, R = T*K routed rows.


def predict_kept_bytes(T: int, rows: int, D: int, F: int, E: int, K: int, itemsize: int, backend: str,
                       recompute: bool, shared_ffn_dim: int = 0, by_entries: bool = False) -> int:
    """Bytes that autograd holds between forward and backward, x among them and weights not; without autocast. `rows`
    are those of the experts' buffers: T*K, or what token rounding may need. `by_entries`: scores of a token's rows come
    from a (T, E) matrix, as after token rounding.

    router    x, the probabilities of all experts, the chosen ids and scores
    kernels   + the pre-activations of gate and up, and three index arrays: what SonicMoE keeps (arXiv 2512.14080)
    grouped   + x of each row, the pre-activations, silu(gate), the product, the output of each row
    loop      as grouped, and the outputs once more, weighted
    recompute nothing of R times a width
    """
    kept = T * D * itemsize + 4 * T * E + 12 * T * K + 4 * T
    indices = 20 if by_entries else 12  # two index arrays and the scores; by entries, their place in the matrix too
    if shared_ffn_dim:
        kept += 4 * T * shared_ffn_dim * itemsize
    if recompute:
        return kept + indices * rows
    if by_entries:
        kept += 12 * T * E + 12 * T
    per_row = {"kernels": 2 * F, "grouped": 2 * D + 4 * F, "loop": 3 * D + 4 * F}[backend]
    return kept + rows * (per_row * itemsize + indices)


def measure_kept_bytes(forward: Callable[[], torch.Tensor], x: torch.Tensor, weights: list[torch.Tensor]) -> int:
    """The same, measured: forward() returns a tensor that depends on x and the weights.

    On a GPU by the allocator: how far allocated memory rose, less the output, plus x. On a CPU by what autograd saves,
    each storage once.
    """
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
        before = torch.cuda.memory_allocated(x.device)
        out = forward()
        torch.cuda.synchronize(x.device)
        return torch.cuda.memory_allocated(x.device) - before - out.nbytes + x.nbytes
    outside = {weight.untyped_storage().data_ptr() for weight in weights}
    saved: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in outside:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in saved.values())
