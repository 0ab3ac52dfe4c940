"""Modules as in a user's file that has never heard of us, and what is compared of an accelerated one."""

import torch
import torch.nn as tnn
import torch.nn.functional as F


class Own(torch.nn.LayerNorm):
    """A class of the user's own."""


class Centred(torch.nn.LayerNorm):
    def forward(self, input):
        return super().forward(input - 1)


def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(8, 16),
        torch.nn.GELU(),
        torch.nn.LayerNorm(16),
        torch.nn.TransformerEncoderLayer(16, 2, 32, 0.0, "gelu", batch_first=True),
        Centred(16),
        Own(16),
    )


class LayerNorm(tnn.Module):
    """nanoGPT's."""

    def __init__(self, size, bias=False):
        super().__init__()
        self.weight = tnn.Parameter(torch.ones(size))
        self.bias = tnn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, input):
        return F.layer_norm(input, self.weight.shape, self.weight, self.bias, 1e-5)


class MLP(tnn.Module):
    """nanoGPT's."""

    def __init__(self, size=8, gelu=None, dropout=0.0):
        super().__init__()
        self.c_fc = tnn.Linear(size, 4 * size)
        self.gelu = gelu or tnn.GELU()
        self.c_proj = tnn.Linear(4 * size, size)
        self.dropout = tnn.Dropout(dropout)
        self.flag = False

    def forward(self, x):
        x = self.c_fc(x)
        x = self.gelu(x)
        x = self.c_proj(x)
        return self.dropout(x)


class Block(tnn.Module):
    def __init__(self, size=8):
        super().__init__()
        self.ln_1, self.ln_2 = LayerNorm(size), LayerNorm(size, bias=True)
        self.attn = tnn.MultiheadAttention(size, 2, batch_first=True)
        self.mlp = MLP(size)

    def forward(self, x):
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Function(MLP):
    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


def kinds(model):
    return [type(m) for m in model.modules()]


def run(model, x, gradient=True):
    """Output, input's gradient and all parameters' gradients."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(1)
    with torch.set_grad_enabled(gradient):
        y = model(x)
    if gradient:
        y.square().sum().backward()
    return y.detach(), x.grad, [p.grad for p in model.parameters()]


def assert_same(model, plain, x, gradient=True):
    torch.testing.assert_close(run(model, x, gradient), run(plain, x, gradient), rtol=1e-4, atol=1e-5)
