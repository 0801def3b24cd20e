"""The activation that triton_kernels fuses into its first GEMM. A file of its own, because it needs Triton."""

import triton
import triton.language as tl


@triton.jit(repr=lambda _: "silu_mul")
def silu_mul(columns):
    """(M, 2N) float32, gate and up in alternating columns -> (M, N)."""
    gate, up = tl.split(tl.reshape(columns, (columns.shape[0], columns.shape[1] // 2, 2)))
    return gate * tl.sigmoid(gate) * up
