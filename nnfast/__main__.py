"""``python -m nnfast``: what runs here, and which kernel serves each op on each device, and why.

``python -m nnfast bench --op layer_norm --shape 4096,768 --dtype bf16``: how fast, on this machine.
"""

import importlib.util
import platform
import sys

import torch

import nnfast
from nnfast import backend

OPS = ("layer_norm", "gelu", "linear_gelu", "cross_entropy", "adamw_", "sgd_", "rmsprop_", "total_norm")
OPS += ("scaled_dot_product_attention",)


def rows() -> list[tuple[str, str, str, str]]:
    """(op, device, who serves it, why) for every op and device of this machine."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return [(op, device, *backend.server(op, device)) for device in devices for op in OPS]


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
    print(f"Triton  {'installed' if importlib.util.find_spec('triton') else 'not installed'}")
    print(f"native  {'loaded' if backend.native else backend.why_not}")
    print()
    print_table([("op", "device", "served by", "because"), *rows()])
    return 0


if __name__ == "__main__":
    sys.exit(main())
