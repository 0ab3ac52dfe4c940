"""SGD, RMSprop, Adam, and clipping with a step, beside torch's: ratios of medians, turn by turn in one process.

    python -m nnfast.benchmarks.bench_optimizers [--model "1000 of 64x64"]

Bytes bound all of them; per float32 parameter: clipping's norm 4, SGD with momentum 20, RMSprop 20, Adam 28.
"""

import argparse
import statistics
import time

import torch

import nnfast.nn.utils
import nnfast.optim
from nnfast.benchmarks.bench_adamw import MODELS

MODELS = {"1000 of 64x64": MODELS["1000 of 64x64"], "25M": [(4096, 3072)] * 2, "GPT-2": MODELS["GPT-2"]}


def contenders() -> dict:
    """name -> (torch's, ours): each (optimizer class, options, clip before the step)."""
    ours, torchs = nnfast.optim, torch.optim
    clip, torchs_clip = nnfast.nn.utils.clip_grad_norm_, torch.nn.utils.clip_grad_norm_
    momentum, fused = {"lr": 1e-4, "momentum": 0.9}, {"fused": True}
    return {
        "AdamW / fused": ((torchs.AdamW, fused, None), (ours.AdamW, {}, None)),
        "Adam / fused": ((torchs.Adam, fused, None), (ours.Adam, {}, None)),
        "SGD momentum / fused": ((torchs.SGD, momentum | fused, None), (ours.SGD, momentum, None)),
        "RMSprop / default": ((torchs.RMSprop, {}, None), (ours.RMSprop, {}, None)),
        "clip, AdamW / clip, fused": ((torchs.AdamW, fused, torchs_clip), (ours.AdamW, {}, clip)),
        "max_grad_norm / clip, fused": ((torchs.AdamW, fused, torchs_clip), (ours.AdamW, {"max_grad_norm": 1e9}, None)),
    }


def measure(shapes: list, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """name -> torch's time over ours. All share parameters and gradients, and each pair its state."""
    params = [torch.randn(s, dtype=dtype).requires_grad_() for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    ratios = {}
    for name, pair in contenders().items():
        steps, state = [], {}
        for kind, options, clip in pair:
            optimizer = kind(params, **options)
            optimizer.step()
            for p in params:
                for key, value in optimizer.state[p].items():
                    if key != "step":
                        optimizer.state[p][key] = state.setdefault((p, key), value)

            def step(optimizer=optimizer, clip=clip):
                if clip:
                    clip(params, 1e9)
                optimizer.step()

            steps.append(step)
        times = [[], []]
        for _ in range(rounds):
            for step, found in zip(steps, times, strict=True):
                start = time.perf_counter()
                step()
                found.append(time.perf_counter() - start)
        torchs, ours = (statistics.median(t) for t in times)
        ratios[name] = torchs / ours
        print(f"  {name:30} {torchs * 1e3:8.2f} ms {ours * 1e3:8.2f} ms  {ratios[name]:.2f}x")
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    for model, shapes in MODELS.items():
        if args.model in (None, model):
            print(model, args.dtype)
            measure(shapes, getattr(torch, args.dtype), args.rounds)


if __name__ == "__main__":
    main()
