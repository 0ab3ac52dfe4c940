"""torch's own databases of inputs, run over ours beside torch's: op_db and module_db; optim_db is test_optimizers.py's.

What they hold differs a little between versions of torch, so it is asked for by name and all of it is run.
"""

import copy

import pytest
import torch
import torch.nn.functional as TF
from common import DTYPES, assert_close, assert_same_error, double
from test_linear_gelu import TorchsLinearGELU, torchs_linear_gelu
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.utils._pytree import tree_map

import nnfast
import nnfast.nn as nn
import nnfast.nn.functional as F
from nnfast import reference

OPS = {op.name: op for op in op_db if not op.variant_test_name}
MODULES = {info.module_cls: info for info in module_db}


def layer_norm_formula(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    return reference.layer_norm(input, normalized_shape, weight, bias, eps)


def cross_entropy_formula(input, target, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0):
    if input.shape == target.shape or input.numel() == 0:  # torch's, in any case
        return TF.cross_entropy(input, target, weight, None, ignore_index, None, reduction, label_smoothing)
    return reference.cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)


def linear_then_cross_entropy(input, linear_weight, target, *, linear_bias=None, ignore_index=None, **keywords):
    ignored = -100 if ignore_index is None else ignore_index
    bias = None if linear_bias is None else linear_bias.flatten()
    logits = TF.linear(input, linear_weight.flatten(0, -2), bias).unflatten(-1, linear_weight.shape[:-1])
    return TF.cross_entropy(logits, target, ignore_index=ignored, **keywords)


# The database's name, ours, torch's, the formula.
FUNCTIONS = [
    ("nn.functional.layer_norm", F.layer_norm, TF.layer_norm, layer_norm_formula),
    ("native_layer_norm", F.layer_norm, TF.layer_norm, layer_norm_formula),
    ("nn.functional.gelu", F.gelu, TF.gelu, reference.gelu),
    ("nn.functional.linear", F.linear, TF.linear, TF.linear),
    (
        "nn.functional.scaled_dot_product_attention",
        F.scaled_dot_product_attention,
        TF.scaled_dot_product_attention,
        reference.scaled_dot_product_attention,
    ),
    ("nn.functional.linear", F.linear_gelu, torchs_linear_gelu, reference.linear_gelu),
    ("nn.functional.cross_entropy", F.cross_entropy, TF.cross_entropy, cross_entropy_formula),
    (
        "nn.functional.linear_cross_entropy",
        F.linear_cross_entropy,
        getattr(TF, "linear_cross_entropy", None),
        linear_then_cross_entropy,
    ),
]
FUNCTIONS = [f for f in FUNCTIONS if f[0] in OPS]  # torch 2.12 has linear_cross_entropy
# Samples with dropout are left out: torch serves them, which test_attention.py looks at.
SKIPPED = {"nn.functional.scaled_dot_product_attention": lambda kwargs: kwargs.get("dropout_p", 0) > 0}


def tensors(*trees):
    """Every tensor in the arguments that requires a gradient."""
    found = []
    tree_map(lambda t: found.append(t) if isinstance(t, torch.Tensor) and t.requires_grad else None, trees)
    return found


def exactly(value):
    """A tensor of floats in float64; anything else, class indices too, as it is."""
    return double(value) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


FLOAT64 = pytest.mark.torch_serves("attention and GELU in float64")


@pytest.mark.parametrize(
    "name, ours, theirs, formula, dtype",
    [
        pytest.param(
            *f,
            dtype,
            id=f"{f[0]}-{dtype}",
            marks=[FLOAT64] if ("attention" in f[0] or "gelu" in f[0]) and dtype is torch.float64 else [],
        )
        for f in FUNCTIONS
        for dtype in DTYPES
    ],
)
def test_samples_of_an_op(name, ours, theirs, formula, dtype):
    """L4, L5, L6, G1: each sample's output and gradients, against float64 and beside torch's."""
    count = 0
    for sample in OPS[name].reference_inputs("cpu", dtype, requires_grad=True):
        args, kwargs = (sample.input, *sample.args), sample.kwargs
        if name in SKIPPED and SKIPPED[name](kwargs):
            continue
        assert ours(*args, **kwargs).stride() == theirs(*args, **kwargs).stride()
        true_args, true_kwargs = tree_map(exactly, (args, kwargs))
        results = []
        for f, a, k in ((ours, args, kwargs), (theirs, args, kwargs), (formula, true_args, true_kwargs)):
            output = f(*a, **k)
            torch.manual_seed(count)
            grad = torch.randn(output.shape, dtype=torch.float64).to(dtype).to(output.dtype)
            results.append([output, *torch.autograd.grad(output, tensors(a, k), grad)])
        for a, b, true in zip(*results, strict=True):
            scale = max((t.detach().abs().max().item() for t in tensors(true_args) if t.numel()), default=0.0)
            assert_close(a, b, true, str(sample), scale)
        count += 1
    assert count > 1


@pytest.mark.parametrize("name, ours, theirs, _", [f for f in FUNCTIONS if OPS[f[0]].error_inputs_func])
@pytest.mark.torch_serves("bad input is torch's to refuse")
def test_errors_of_an_op(name, ours, theirs, _):
    """L3, G1: type and text are torch's."""
    for error in OPS[name].error_inputs("cpu"):
        sample = error.sample_input
        assert_same_error(ours, theirs, sample.input, *sample.args, **sample.kwargs)


def encoder(*args, **kwargs):
    return nnfast.accelerate(torch.nn.TransformerEncoder(*args, **kwargs))


# The database's class, ours, torch's.
CLASSES = [
    (torch.nn.LayerNorm, nn.LayerNorm, torch.nn.LayerNorm),
    (torch.nn.GELU, nn.GELU, torch.nn.GELU),
    (torch.nn.Linear, nn.Linear, torch.nn.Linear),
    (torch.nn.Linear, nn.LinearGELU, TorchsLinearGELU),
    (torch.nn.CrossEntropyLoss, nn.CrossEntropyLoss, torch.nn.CrossEntropyLoss),
    (torch.nn.TransformerEncoderLayer, nn.TransformerEncoderLayer, torch.nn.TransformerEncoderLayer),
    (torch.nn.TransformerEncoder, encoder, torch.nn.TransformerEncoder),
]
if hasattr(torch.nn, "LinearCrossEntropyLoss"):  # from torch 2.12 on
    CLASSES.append((torch.nn.LinearCrossEntropyLoss, nn.LinearCrossEntropyLoss, torch.nn.LinearCrossEntropyLoss))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind, ours, theirs", CLASSES, ids=lambda c: getattr(c, "__name__", ""))
def test_inputs_of_a_module(kind, ours, theirs, training):
    """L1, L2, L4, G1, G6: constructed, run forward and backward, copied, as torch's."""
    info = MODULES[kind]
    dtype = torch.float32 if training or kind is torch.nn.GELU else torch.float64  # a GELU of doubles is torch's
    for sample in info.module_inputs_func(info, "cpu", dtype, requires_grad=True, training=training):
        construct, forward = sample.constructor_input, sample.forward_input
        if forward is None:
            continue
        results = []
        for make in (ours, theirs):
            torch.manual_seed(3)
            module = make(*construct.args, **construct.kwargs).to(dtype).train(training)
            state, leaves = module.state_dict(), [*module.parameters(), *tensors(forward.args, forward.kwargs)]
            again = copy.deepcopy(module)
            output = module(*forward.args, **forward.kwargs)
            grads = torch.autograd.grad(output.square().sum(), leaves, allow_unused=True)
            results.append((list(state), list(state.values()), output, again(*forward.args, **forward.kwargs), grads))
        assert results[0][0] == results[1][0]
        torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=0)
        torch.testing.assert_close(results[0][2:4], results[1][2:4], equal_nan=True)
        for a, b in zip(results[0][4], results[1][4], strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
