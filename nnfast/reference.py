"""Each op in plain torch, written as its formula: the oracle of the tests, and the place to read what an op means.

Everything is differentiable and takes any floating dtype; in float64 it is what the kernels are measured against.
"""

import math

import torch
from torch import Tensor


def layer_norm(
    input: Tensor, normalized_shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last dimensions; var is the biased one."""
    dims = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(dims, keepdim=True)
    output = centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()
    if weight is not None:
        output = output * weight
    return output if bias is None else output + bias


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """``x P(x)``, P the cumulative normal distribution, or the tanh approximation of that."""
    if approximate == "tanh":
        return input * (1 + torch.tanh(math.sqrt(2 / math.pi) * (input + 0.044715 * input**3))) / 2
    # erfc, not 1 + erf, which has lost every digit for large negative x.
    return input * torch.erfc(-input / math.sqrt(2)) / 2


def linear_gelu(input: Tensor, weight: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """``gelu(x W^T + b)``."""
    pre = input @ weight.T
    return gelu(pre if bias is None else pre + bias, approximate)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """``-w_y log softmax(input)_y``, mixed with the classes' mean; a mean is over the weights of what counts."""
    input = input.movedim(1, -1) if input.dim() > 1 else input
    n = input.logsumexp(-1, keepdim=True) - input
    w = torch.ones_like(n[..., :1]).expand_as(n) if weight is None else weight.expand_as(n)
    counts = target != ignore_index
    y = target.where(counts, 0).unsqueeze(-1)
    loss = (1 - label_smoothing) * (w * n).gather(-1, y).squeeze(-1)
    if label_smoothing:
        loss = loss + label_smoothing * (w * n).mean(-1)
    loss = loss.where(counts, 0)
    if reduction == "none":
        return loss
    return loss.sum() / (w.gather(-1, y).squeeze(-1) * counts).sum() if reduction == "mean" else loss.sum()


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``softmax(scale Q K^T + mask) V``; a query that sees no key gets zeros."""
    assert not dropout_p
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    hidden = torch.zeros_like(scores, dtype=torch.bool)
    if is_causal:
        hidden = torch.ones_like(hidden).tril().logical_not()
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        hidden = attn_mask.logical_not().expand_as(scores)
    elif attn_mask is not None:
        scores = scores + attn_mask
        hidden = scores.detach().isneginf()
    nothing = hidden.all(-1, keepdim=True)
    scores = scores.masked_fill(hidden & ~nothing, -math.inf)
    return scores.softmax(-1).masked_fill(nothing, 0) @ value


def adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    step: int,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    maximize: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Step number ``step``, from 1: the new param, exp_avg, exp_avg_sq and max_exp_avg_sq (None: no amsgrad)."""
    if maximize:
        grad = -grad
    param = param * (1 - lr * weight_decay)
    exp_avg = exp_avg + (grad - exp_avg) * (1 - beta1)
    exp_avg_sq = exp_avg_sq * beta2 + grad * grad * (1 - beta2)
    largest = exp_avg_sq
    if max_exp_avg_sq is not None:
        largest = max_exp_avg_sq = torch.maximum(max_exp_avg_sq, exp_avg_sq)
    denominator = largest.sqrt() / math.sqrt(1 - beta2**step) + eps
    return param - lr / (1 - beta1**step) * exp_avg / denominator, exp_avg, exp_avg_sq, max_exp_avg_sq
