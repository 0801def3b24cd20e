"""Functions as registered PyTorch operators where something traces them, and as themselves where nothing does.

    operator         without a gradient
    differentiable   with one, given as torch.library.register_autograd takes it

An operator's first call imports the whole compiler, some 3 s, and every call costs the host tens of microseconds: small
batches wait for the host as it is. So a call with plain tensors, outside of torch.compile and of dispatch modes, goes
straight to the function, or to a torch.autograd.Function of it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode


def is_traced(args: tuple) -> bool:
    """Whether a call with these arguments is compiled, exported, traced or transformed, or seen by a dispatch mode or
    by a tensor's class, as selective checkpointing, FakeTensor and DTensor do."""
    # Two of these are private to PyTorch, which has no public way to ask; tests/test_backward.py fails if they go.
    return (torch.compiler.is_compiling() or torch.jit.is_tracing() or _get_current_dispatch_mode() is not None
            or torch._C._functorch.peek_interpreter_stack() is not None
            or any(isinstance(arg, Tensor) and type(arg) not in (Tensor, torch.nn.Parameter) for arg in args))


def wants_gradient(args: tuple) -> bool:
    """Whether autograd would record a call with these arguments."""
    return torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)


def on_its_gpu(function: Callable) -> Callable:
    """`function` with the GPU of its first tensor as the current one: Triton launches there, whatever it is given."""
    @functools.wraps(function)
    def call(*args):
        with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, Tensor))):
            return function(*args)

    return call


def operator(name: str, mutates_args: Collection[str] = ()) -> Callable[[Callable], Callable]:
    """Register a function as an operator, `.operator`, which is called where a call is traced, or where a gradient is
    asked for: there is none, and the operator says so."""
    def register(function: Callable) -> Callable:
        function = on_its_gpu(function)
        registered = torch.library.custom_op(name, function, mutates_args=mutates_args)
        mutated = [place for place, arg in enumerate(inspect.signature(function).parameters) if arg in mutates_args]

        @functools.wraps(function)
        def call(*args, **named):
            if named or is_traced(args) or wants_gradient(args):
                return registered(*args, **named)
            result = function(*args)
            for place in mutated:
                if args[place] is not None and not args[place].is_inference():
                    torch.autograd.graph.increment_version(args[place])  # who saved it is to notice
            return result

        call.operator = registered
        return call

    return register


def differentiable(name: str, setup_context: Callable, backward: Callable) -> Callable[[Callable], Callable]:
    """Register a function as an operator, `.operator`, whose gradients backward(ctx, *output_grads) gives from what
    setup_context(ctx, inputs, output) has put into ctx. A gradient of the gradients is refused, if what `backward`
    calls is an `operator`."""
    def register(function: Callable) -> Callable:
        function = on_its_gpu(function)
        registered = torch.library.custom_op(name, function, mutates_args=())
        registered.register_autograd(backward, setup_context=setup_context)

        def forward(ctx, *args):  # with a setup_context of its own, each call would look the signature up again
            output = function(*args)
            setup_context(ctx, args, output)
            return output

        untraced = type(function.__name__, (torch.autograd.Function,),
                        {"forward": staticmethod(forward), "backward": staticmethod(backward)})

        @functools.wraps(function)
        def call(*args, **named):
            return registered(*args, **named) if named or is_traced(args) else untraced.apply(*args)

        call.operator = registered
        return call

    return register
