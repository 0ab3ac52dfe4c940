"""A plain training loop: a small network learns to tell which of two spirals a point lies on.

python examples/plain.py
"""

import math

import torch

import nnfast.nn as nn  # nnfast: was `import torch.nn as nn`
import nnfast.optim as optim  # nnfast: was `import torch.optim as optim`


def spirals(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of the plane, (count, 2), and the spiral of each, (count,)."""
    label = torch.arange(count) % 2
    angle = torch.rand(count) * 3 * math.pi
    turned = angle + math.pi * label
    return torch.stack([angle * turned.cos(), angle * turned.sin()], dim=1), label


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(2, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 2)
    )
    optimizer = optim.AdamW(model.parameters(), lr=3e-3)
    loss_of = nn.CrossEntropyLoss()
    for step in range(300):
        points, labels = spirals(512)
        optimizer.zero_grad()
        loss = loss_of(model(points), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step:3}  loss {loss.item():.4f}")
    points, labels = spirals(2000)
    with torch.no_grad():
        right = (model(points).argmax(dim=1) == labels).float().mean().item()
    print(f"{right:.1%} of new points are told apart")
    assert right > 0.9


if __name__ == "__main__":
    main()
