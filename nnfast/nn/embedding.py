import torch
from torch import Tensor

from nnfast import functional as F


class Embedding(torch.nn.Embedding):
    """``torch.nn.Embedding`` whose gradient reuses memory: the same arguments, parameters and ``state_dict``.

    Shape:
        Input ``(*)``, output ``(*, embedding_dim)``. See ``nnfast.nn.functional.embedding``.
    """

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(
            input,
            self.weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )
