"""How a GPT learns whose weights are bfloat16: plainly, rounded stochastically, and with the bits that bfloat16 lacks.

    python benchmarks/bf16_weights.py [--steps 1500]

An update smaller than half a rounding of its weight is lost in plain bfloat16, and late in a training most are. Four
runs from one seed on the same batches; the curves are means over the last fifty steps.
"""

import argparse
from pathlib import Path

import matplotlib
import torch
from rich.progress import track

import nnfast.nn
import nnfast.optim
from nnfast.benchmarks import models
from nnfast.benchmarks.train_gpt import CONTEXT, VOCABULARY, read_text

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

WAYS = {
    "float32": (torch.float32, {}),
    "bfloat16, plain": (torch.bfloat16, {}),
    "bfloat16, stochastic_rounding=True": (torch.bfloat16, {"stochastic_rounding": True}),
    "bfloat16, master_weights=True": (torch.bfloat16, {"master_weights": True}),
}


def train(dtype: torch.dtype, options: dict, batches: list, lr: float) -> list[float]:
    """The losses, step by step. The learning rate falls to nothing, as it does in practice."""
    torch.manual_seed(0)
    model = models.gpt(nnfast.nn, 2, 128, VOCABULARY, CONTEXT).to(dtype)
    optimizer = nnfast.optim.AdamW(model.parameters(), lr=lr, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    losses = []
    for tokens, targets in track(batches, f"{dtype} {options}"):
        optimizer.zero_grad()
        loss = model(tokens, targets)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def smooth(losses: list[float], over: int = 50) -> list[float]:
    return torch.tensor(losses).unfold(0, min(over, len(losses)), 1).mean(-1).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path("docs/bf16_weights.png"))
    args = parser.parse_args()
    text = read_text(None)
    starts = torch.randint(len(text) - CONTEXT - 1, (args.steps, 8, 1), generator=torch.Generator().manual_seed(0))
    windows = text[starts + torch.arange(CONTEXT + 1)].long()
    batches = [(window[:, :-1], window[:, 1:]) for window in windows]
    figure, axis = plt.subplots(figsize=(7, 4))
    for name, (dtype, options) in WAYS.items():
        losses = smooth(train(dtype, options, batches, args.lr))
        print(f"{name}: {losses[-1]:.4f}")
        style = {"color": "black", "linestyle": ":", "zorder": 3} if dtype is torch.float32 else {}
        axis.plot(losses, label=f"{name}: {losses[-1]:.3f}", **style)
    axis.set(xlabel="step", ylabel="loss", title="A small GPT in bfloat16 weights: nnfast.optim.AdamW")
    axis.legend()
    figure.tight_layout()
    figure.savefig(args.out, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
