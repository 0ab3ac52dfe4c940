import torch

from nnfast.nn.linear_gelu import GELU, LINEARS, gelu_of_linear

_GELUS = (torch.nn.GELU, GELU)


class Sequential(torch.nn.Sequential):
    """:class:`torch.nn.Sequential` in which a Linear directly followed by a GELU runs as one op.

    Children, names and ``state_dict`` keys are untouched, and looked at afresh at every call: a hook on either
    child, for one, turns the fusion off and fires as usual.
    """

    def forward(self, input):
        if torch.jit.is_scripting():
            for module in self:
                input = module(input)
            return input
        else:
            linear = None  # a Linear whose successor is not known yet
            for module in self._modules.values():
                if linear is not None:
                    if type(module) in _GELUS:
                        input, linear = gelu_of_linear(input, linear, module), None
                        continue
                    input, linear = linear(input), None
                if type(module) in LINEARS:
                    linear = module
                else:
                    input = module(input)
            return input if linear is None else linear(input)
