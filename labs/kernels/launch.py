"""What the launchers share: checks of their arguments, what the device can do, how kernels are launched."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar

import torch

import common.level  # isort: skip  # noqa: F401  (picks Triton's interpreter where there is no GPU)
import triton

from common.config import dtype_name

# The kernels' tiles are made for 2-byte values; the interpreter multiplies bfloat16 wrongly.
DTYPES = {"cuda": (torch.bfloat16, torch.float16), "cpu": (torch.float16, torch.float32)}
SHARED_BYTES = 200 * 1024  # of a Hopper SM's 227 KB, for pipelines
RESERVED_BYTES = 27 * 1024  # of what a program may use: for reductions


def require(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError, saying what `name` is and what it needs to be, unless it fits, is contiguous and starts at a
    multiple of 16 bytes."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but needs {shape}")
    if tensor.dtype != dtype or tensor.device != device:
        raise ValueError(f"{name} is {dtype_name(tensor.dtype)} on {tensor.device}, but needs {dtype_name(dtype)} "
                         f"on {device}")
    if not tensor.is_contiguous() or tensor.data_ptr() % 16:
        raise ValueError(f"{name} has strides {tensor.stride()} and starts at byte {tensor.data_ptr() % 16} of 16, "
                         f"but needs to be contiguous and aligned: pass "
                         f"{name}.clone(memory_format=torch.contiguous_format)")


def require_width(letter: str, width: int) -> None:
    """Raise ValueError unless the width is a multiple of 8: TMA wants rows of whole 16 bytes."""
    if width % 8:
        raise ValueError(f"{letter}={width}, but the kernels need a multiple of 8: pad the weights with zeros")


def require_dtype(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError unless the kernels multiply the tensor's dtype on its device."""
    allowed = DTYPES[tensor.device.type]
    if tensor.dtype not in allowed:
        raise ValueError(f"{name} is {dtype_name(tensor.dtype)} on {tensor.device}, but needs "
                         f"{' or '.join(map(dtype_name, allowed))} there")


@functools.cache
def sm_count(device: torch.device) -> int:
    """Multiprocessors of a GPU; the H200's 132 for the interpreter, so that it runs what was measured."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@functools.cache
def early_launch(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it still runs (programmatic dependent launch, sm_90 on)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(device: torch.device) -> dict[str, bool]:
    """Options of a launch that may start early: its kernel calls gdc_wait before it reads another's results."""
    return {"launch_pdl": True} if early_launch(device) else {}


@functools.cache
def pipeline_bytes(device: torch.device) -> int:
    """Shared memory for the pipelines of one program; the H200's for the interpreter and for shapes without memory."""
    if device.type != "cuda":
        return SHARED_BYTES
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin - RESERVED_BYTES


_compiling: ContextVar[bool] = ContextVar("compiling", default=False)


def launch(kernel: triton.JITFunction, grid: tuple[int, ...], *arguments: object, **options: object) -> None:
    """kernel[grid](*arguments, **options); within `compile_together` compiled for them, and not launched."""
    if _compiling.get():
        kernel.warmup(*arguments, grid=grid, **options)
    else:
        kernel[grid](*arguments, **options)


def compile_together(call: Callable[[], object]) -> None:
    """Compile all kernels that `call` launches, each in a thread of its own: a first call then waits for the slowest,
    not for all of them one after the other. `call` must not depend on what kernels compute, and launch by `launch`
    alone. Raises what a compilation raises."""
    with ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool):
        token = _compiling.set(True)
        try:
            call()
        finally:
            _compiling.reset(token)
