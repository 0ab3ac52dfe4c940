"""The private names of torch that nnfast uses, in one place, and what stands in for each where a torch lacks it.

Private names come and go from version to version. None of them may keep nnfast from being imported: where one is gone,
its stand-in gives the answer with which torch's own code runs, or does what torch documents.
"""

import functools
import importlib
from collections.abc import Callable

import torch
from torch.autograd import forward_ad


def _found(owner: str, name: str, otherwise):
    """``owner.name``, of a module or a class of torch's; ``otherwise`` where it is gone."""
    try:
        found = importlib.import_module(owner)
    except ImportError:
        found = functools.reduce(lambda outer, part: getattr(outer, part, None), owner.split(".")[1:], torch)
    return getattr(found, name, otherwise)


def _yes() -> bool:
    return True


def _without_gradients(step):
    """What torch.optim decorates ``step`` with, but for ``differentiable=True``, which then raises."""

    @functools.wraps(step)
    def wrapped(self, *args, **kwargs):
        if self.defaults.get("differentiable"):
            raise RuntimeError("nnfast does not know how this torch differentiates through an optimizer's step")
        with torch.no_grad():
            return step(self, *args, **kwargs)

    return wrapped


#: The decorator of an optimizer's step. Gone: gradients are off inside.
use_grad_for_differentiable: Callable = _found(
    "torch.optim.optimizer", "_use_grad_for_differentiable", _without_gradients
)


def _nothing(*args) -> None:
    pass


#: torch.optim's check that a step being captured into a graph may be, under its newer name and under torch 2.11's.
#: Gone: CUDA itself refuses what cannot be captured.
graph_capture_health_check: Callable[[torch.optim.Optimizer], None] = _found(
    "torch.optim.Optimizer",
    "_accelerator_graph_capture_health_check",
    _found("torch.optim.Optimizer", "_cuda_graph_capture_health_check", _nothing),
)


#: The functorch transform that is at work, or None. Gone: there may be one.
transforms: Callable = _found("torch._C._functorch", "peek_interpreter_stack", _yes)


#: How many modes in Python are active that see, and may change, calls of torch's functions. Gone: there may be one.
function_modes: Callable = _found("torch._C", "_len_torch_function_stack", _yes)


def forward_mode() -> bool:
    """Whether forward-mode AD is at work. Gone: it may be."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def constant_in_a_graph(function: Callable) -> Callable:
    """As ``torch.compiler.assume_constant_result``, but the compiler is not imported. The tracer calls the function."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


#: Makes the tracer call a function without tracing it. Gone: it traces it, and finds a call that it cannot trace.
outside_graphs: Callable = _found("torch._compile", "_disable_dynamo", lambda function: function)

#: Whether an op has a kernel at a dispatch key. Gone: yes, so that our Triton kernels are not put there.
has_kernel: Callable[[str, str], bool] = _found(
    "torch._C", "_dispatch_has_kernel_for_dispatch_key", lambda op, key: True
)

#: Tells TorchScript which builtin a function is. Gone: TorchScript sees a function in Python.
register_builtin: Callable = _found("torch.jit._builtins", "_register_builtin", _nothing)

#: The functions that project the inputs of multi-head attention. Gone: nobody calls them.
in_projection: Callable = _found("torch.nn.functional", "_in_projection", _nothing)
in_projection_packed: Callable = _found("torch.nn.functional", "_in_projection_packed", _nothing)

#: The base of torch's losses with weights. Gone: that of all modules.
WeightedLoss: type = _found("torch.nn.modules.loss", "_WeightedLoss", torch.nn.Module)


def one_dnn_has(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies bfloat16, or float16, on this CPU. Gone, as without oneDNN: it does not."""
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    asked = getattr(torch.ops.mkldnn, name, None)
    return asked is not None and asked()
