import torch
from torch.optim.rmsprop import rmsprop as rmsprop

from nnfast.optim.native import NativeStep

_OPTIONS = "lr", "alpha", "eps", "weight_decay", "momentum", "centered", "foreach", "maximize", "differentiable"
_OPTIONS += ("capturable",)


class RMSprop(NativeStep, torch.optim.RMSprop):
    r"""``torch.optim.RMSprop`` whose step is one native call for all parameters.

    The same arguments, groups, state and checkpoints, in both directions. The update, in torch's order
    (Hinton, 2012; Graves, 2013, for ``centered``; ``csrc/math/rmsprop.h``):

        g = g + weight_decay p
        v = alpha v + (1 - alpha) g^2
        a = a + (g - a) (1 - alpha), and v - a^2 in place of v below, where it is centered
        u = g / (sqrt(v) + eps);  b = momentum b + u, and b in place of u below, with momentum
        p = p - lr u

    Dtypes and what is torch's as for ``nnfast.optim.AdamW``; on a GPU without the CUDA kernels torch's code serves.
    """

    _op = "rmsprop_"
    _torch = staticmethod(rmsprop)

    def _call(self, group):
        params, grads, square_avgs, buffers, grad_avgs, steps = lists = [], [], [], [], [], []
        has_complex = self._init_group(group, *lists)
        options = {"has_complex": has_complex, **{name: group[name] for name in _OPTIONS}}
        return [params, grads, square_avgs, grad_avgs, buffers, steps], options
