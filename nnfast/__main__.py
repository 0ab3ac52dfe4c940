"""``python -m nnfast``: what runs here, and which kernel serves each op on each device, and why.

``python -m nnfast bench --op layer_norm --shape 4096,768 --dtype bf16``: how fast, on this machine.
"""

import platform
import sys

import torch

import nnfast
from nnfast import backend

OPS = ("layer_norm", "gelu", "linear_gelu", "adamw_")


def rows() -> list[tuple[str, str, str, str]]:
    """(op, device, who serves it, why) for every op and device of this machine."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return [(op, device, *serves(device)) for device in devices for op in OPS]


def serves(device: str) -> tuple[str, str]:
    forced = backend.forced()
    if forced is not None:
        return forced, "NNFAST_BACKEND asks for it"
    for name in ("cuda", "triton") if device == "cuda" else ("cpu",):
        why_not = backend.available(name)
        if not why_not:
            return f"nnfast {name} ({backend.native.cpu_kernels()})", "float32, bfloat16, float16, float64"
    return "torch", why_not


def print_table(table: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main() -> int:
    if sys.argv[1:2] == ["bench"]:
        from nnfast.benchmarks import cli

        return cli.main(sys.argv[2:])
    print(f"nnfast {nnfast.__version__}   torch {torch.__version__}   Python {platform.python_version()}")
    print(f"CPU     torch uses {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use"
    print(f"GPU     {gpu}")
    print(f"native  {'loaded' if backend.native else backend.why_not}")
    print()
    print_table([("op", "device", "served by", "because"), *rows()])
    return 0


if __name__ == "__main__":
    sys.exit(main())
