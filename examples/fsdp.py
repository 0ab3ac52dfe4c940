"""Training with FSDP2: every process holds a shard of each parameter; AdamW steps the shards where they lie.

torchrun --standalone --nproc-per-node 2 examples/fsdp.py
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import nnfast.nn as nn  # nnfast: was `import torch.nn as nn`
import nnfast.optim as optim  # nnfast: was `import torch.optim as optim`


def main() -> None:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    rank, mesh = dist.get_rank(), init_device_mesh(kind, (dist.get_world_size(),))
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).to(device) for _ in range(2)
    ]
    model = nn.Sequential(*blocks)
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(1 + rank)
    for step in range(30):
        x = torch.randn(128, 64, device=device)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), x.flip(1))
        loss.backward()
        optimizer.step()
        if step % 10 == 0 and rank == 0:
            print(f"step {step:2}  loss {loss.item():.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
