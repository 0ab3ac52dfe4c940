"""Under torch.compile: the calls that stay ours in the graph. All others are torch's there, and the compiler's to fuse.

Each function answers as the gate does: with the result, or with None where the call is torch's. It decides by what a
graph is made for (op, dtype, device, dimensions, the sizes of weights), never by the number of rows, for a graph serves
any number of them. An exported program has torch's ops alone, and runs without nnfast.
"""

import torch
import torch.compiler.config
from torch import Tensor

from nnfast import __version__, backend
from nnfast._torch import constant_in_a_graph, forward_mode, function_modes, one_dnn_has, transforms

#: (op, dtype it computes in): how many times as fast a compiled training step of the op is with ours in its graph,
#: measured at GPT-2's sizes on a Zen 5. What is not here gains nothing, or loses what the compiler fuses. The code asks
#: only what is here; the numbers are for readers.
GAINS: dict[tuple[str, torch.dtype], float] = {
    ("linear", torch.float32): 2.0,
    ("linear_gelu", torch.float32): 1.9,
    ("cross_entropy", torch.float32): 5.3,
    ("cross_entropy", torch.bfloat16): 6.0,
    ("linear_cross_entropy", torch.float32): 2.0,
    ("linear_cross_entropy", torch.bfloat16): 1.05,
    ("scaled_dot_product_attention", torch.float32): 3.5,
    ("scaled_dot_product_attention", torch.bfloat16): 5.6,
}

_served = backend.native is not None and backend.native.cpu_kernels() is not None
_numbers = backend.native.thresholds() if _served else {}
for _op in ("linear", "linear_gelu", "linear_cross_entropy"):
    if not _numbers.get("product.one_dnn_float32"):
        # Our product and torch's are the same library's, so nothing is gained.
        GAINS.pop((_op, torch.float32))

if _numbers.get("product.gemm_16_bits", 0) > one_dnn_has(torch.bfloat16):
    # oneDNN has none for this CPU. Measured on a Zen 3, at 512 x 768 x 768 in bfloat16, else at sizes of some hundreds;
    # there cross-entropy gains 1.4 and 2.0 (float32, bfloat16) and attention 2.0 and 10.
    GAINS |= {
        ("linear", torch.bfloat16): 48.0,
        ("linear", torch.float16): 11.0,
        ("linear_gelu", torch.bfloat16): 42.0,
        ("linear_gelu", torch.float16): 11.0,
        ("linear_cross_entropy", torch.bfloat16): 37.0,
        ("linear_cross_entropy", torch.float16): 31.0,
        ("cross_entropy", torch.float16): 2.2,
        ("scaled_dot_product_attention", torch.float16): 15.0,
    }

# Where a weight has fewer elements, a call costs more than its product.
_SMALLEST_WEIGHT = 64 * 64
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_LOWERED = (torch.float32, torch.bfloat16, torch.float16)  # what autocast brings to its dtype
_ops = torch.ops.nnfast
_VERSION = f"nnfast-{__version__};"


def summary() -> str:
    """What stays ours where torch.compile makes a graph on this CPU."""
    if not _served or backend.forced() == "torch":
        return "nothing: torch's ops, for the compiler to fuse"
    dtypes: dict[str, list[str]] = {}
    for op, dtype in GAINS:
        dtypes.setdefault(op, []).append(str(dtype).removeprefix("torch."))
    return ", ".join(f"{op} ({', '.join(names)})" for op, names in dtypes.items()) + ", an optimizer's step"


@constant_in_a_graph
def _shut() -> bool:
    """Whether this is an export or in a transform: a constant to a graph, for another answer makes another graph.

    It also marks what is compiled and kept on disk with nnfast's version: another's ops may lay out outputs otherwise.
    """
    config = torch.compiler.config
    if _VERSION not in config.cache_key_tag:
        config.cache_key_tag += _VERSION
    return torch.compiler.is_exporting() or transforms() is not None


def _stays(op: str, *tensors: Tensor | None, lowered: bool = True) -> bool:
    """Whether this is a call of plain tensors, of one dtype or brought to one by autocast, that gains by being ours."""
    cast = lowered and torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if cast else tensors[0].dtype
    # The commonest reasons come first, for each check that is traced costs time.
    if (op, dtype) not in GAINS or not _served or backend.torch_is_held:
        return False
    if forward_mode() or function_modes() or _shut():
        return False
    for t in tensors:
        if t is not None:
            plain = type(t) is Tensor or type(t) is torch.nn.Parameter
            if not plain or t.device.type != "cpu" or t.layout is not torch.strided:
                return False
            if t.dtype is not dtype and not (cast and t.dtype in _LOWERED):
                return False
    return True


def _known(condition) -> bool:
    """Whether ``condition`` holds for every call of the graph; False, with no new guard, where a size is not known."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(condition)


def _fits(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        input.dim() > 0
        and weight.dim() == 2
        and _known(input.shape[-1] == weight.shape[1])
        and _known(weight.shape[0] * weight.shape[1] >= _SMALLEST_WEIGHT)
        and (bias is None or (bias.dim() == 1 and _known(bias.shape[0] == weight.shape[0])))
    )


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    if not _stays("linear", input, weight, bias) or not _fits(input, weight, bias):
        return None
    return _ops.linear.default(input, weight, bias)


def linear_gelu(input: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor | None:
    if not _stays("linear_gelu", input, weight, bias) or not _fits(input, weight, bias):
        return None
    if approximate not in ("none", "tanh"):
        return None
    return _ops.linear_gelu.default(input, weight, bias, approximate=approximate, want_pre=False)[0]


def _counts(target: Tensor, weight: Tensor | None, classes, reduction: str, label_smoothing: float) -> bool:
    """Whether target and weight are those of a loss over ``classes`` classes that ours covers."""
    return (
        type(target) is Tensor
        and target.dtype is torch.int64
        and target.device.type == "cpu"
        and reduction in _REDUCTIONS
        and 0 <= label_smoothing <= 1
        and (weight is None or (weight.dim() == 1 and not weight.requires_grad and _known(weight.shape[0] == classes)))
    )


def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, label_smoothing: float
) -> Tensor | None:
    autocast = torch.is_autocast_enabled("cpu")
    # Under autocast, float32 logits come from a cast, which the compiler fuses into what reads them.
    if autocast and (weight is not None or input.dtype is torch.float32):
        return None
    if not _stays("cross_entropy", input, weight, lowered=False) or not 1 <= input.dim() <= 2:
        return None
    if target.dim() != input.dim() - 1 or (target.dim() and not _known(input.shape[0] == target.shape[0])):
        return None
    if not _known(input.shape[-1] > 0) or not _counts(target, weight, input.shape[-1], reduction, label_smoothing):
        return None
    how = _REDUCTIONS[reduction], ignore_index, label_smoothing
    return _ops.cross_entropy.default(input, target, weight, *how)[0]


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Tensor | None:
    if not _stays("linear_cross_entropy", input, linear_weight, linear_bias) or weight is not None:
        return None
    if input.dim() != 2 or not _fits(input, linear_weight, linear_bias):
        return None
    if target.dim() != 1 or not _known(input.shape[0] == target.shape[0]):
        return None
    if not _counts(target, None, linear_weight.shape[0], reduction, label_smoothing):
        return None
    how = _REDUCTIONS[reduction], ignore_index, label_smoothing
    return _ops.linear_cross_entropy.default(input, linear_weight, target, linear_bias, None, *how)[0]


@constant_in_a_graph
def _all_backends_allowed() -> bool:
    return torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor | None:
    mask = None if attn_mask is None or attn_mask.dtype is torch.bool else attn_mask
    if not _stays("scaled_dot_product_attention", query, key, value, mask) or not _all_backends_allowed():
        return None
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        return None
    (n, heads, queries, size), (kv_n, kv_heads, keys, kv_size) = query.shape, key.shape
    same = n == kv_n, size == kv_size, n == value.shape[0], kv_heads == value.shape[1], keys == value.shape[2]
    there = (length > 0 for length in (*query.shape, *key.shape, *value.shape))
    if not all(_known(each) for each in (*same, *there)):
        return None
    if not _known(heads == kv_heads if not enable_gqa else heads % kv_heads == 0):
        return None
    # As in eager mode (torch_attends_sooner in csrc/gate/python.cpp).
    lowered = torch.is_autocast_enabled("cpu") or query.dtype is not torch.float32
    if not lowered and not torch.is_grad_enabled() and _known(queries <= 2):
        return None
    if attn_mask is not None:
        if type(attn_mask) is not Tensor or attn_mask.device.type != "cpu" or not 2 <= attn_mask.dim() <= 4:
            return None
        if is_causal or attn_mask.requires_grad:
            return None
        for masked, whole in zip(reversed(attn_mask.shape), (keys, queries, heads, n), strict=False):
            if not _known(masked == 1) and not _known(masked == whole):
                return None
    return _ops.scaled_dot_product_attention.default(query, key, value, attn_mask, is_causal, scale=scale)[0]


def step_is_ours(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step of an optimizer that is being traced stays one native call. On a GPU torch's is fused."""
    params = optimizer.param_groups[0]["params"]
    return _served and not backend.torch_is_held and len(params) > 0 and params[0].device.type == "cpu"
