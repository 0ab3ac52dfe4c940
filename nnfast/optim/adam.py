import torch
from torch.optim.adam import adam as adam

from nnfast.optim.adamw import AdamStep, _with_ours


class Adam(AdamStep, torch.optim.Adam):
    r"""``torch.optim.Adam`` whose step is one native call for all parameters.

    As ``nnfast.optim.AdamW``, its arguments beyond torch's included, with ``g = g + weight_decay p`` in place of
    the decay (Kingma and Ba, 2015; ``csrc/math/adamw.h``).
    """

    __signature__ = _with_ours(torch.optim.Adam)
