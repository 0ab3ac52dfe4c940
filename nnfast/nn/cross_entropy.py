import math

import torch
from torch import Tensor

from nnfast import functional as F
from nnfast._torch import WeightedLoss


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss`` with our kernels: the same arguments and ``state_dict``.

    Shape:
        See ``nnfast.nn.functional.cross_entropy``.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class _TorchsLinearCrossEntropyLoss(WeightedLoss):
    """torch's LinearCrossEntropyLoss, for a torch that has none: the same arguments, and keys ``linear.*``."""

    __constants__ = ["num_classes", "out_features", "reduction", "ignore_index", "label_smoothing"]

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device=None,
        dtype=None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options=None,
    ) -> None:
        super().__init__(weight=weight, reduction=reduction)
        self.num_classes, self.out_features, self.options = num_classes, out_features, options
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        outputs = math.prod(out_features, start=num_classes)
        self.linear = torch.nn.Linear(in_features, outputs, bias=bias, device=device, dtype=dtype)


class LinearCrossEntropyLoss(getattr(torch.nn, "LinearCrossEntropyLoss", _TorchsLinearCrossEntropyLoss)):
    """torch's LinearCrossEntropyLoss with our kernels: the same arguments and ``state_dict``. On torch 2.11 too.

    Shape:
        See ``nnfast.nn.functional.linear_cross_entropy``.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        classes, linear = (self.num_classes, *self.out_features), self.linear
        return F.linear_cross_entropy(
            input,
            linear.weight.reshape(*classes, linear.in_features),
            target,
            linear_bias=None if linear.bias is None else linear.bias.reshape(classes),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
        )
