"""Data-parallel training: each process has the whole model and a part of the batch; DDP averages the gradients.

torchrun --standalone --nproc-per-node 2 examples/ddp.py
"""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import nnfast.nn as nn  # nnfast: was `import torch.nn as nn`
import nnfast.optim as optim  # nnfast: was `import torch.optim as optim`


def main() -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank = dist.get_rank()
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).to(device)
    model = DistributedDataParallel(model)
    optimizer = optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(1 + rank)
    for step in range(50):
        x = torch.randn(128, 64, device=device)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), x.flip(1))
        loss.backward()
        optimizer.step()
        if step % 10 == 0 and rank == 0:
            print(f"step {step:2}  loss {loss.item():.4f}")
    same = [torch.empty_like(model.module[1].weight) for _ in range(dist.get_world_size())]
    dist.all_gather(same, model.module[1].weight.detach())
    assert all(torch.equal(w, same[0]) for w in same), "the processes have drifted apart"
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
