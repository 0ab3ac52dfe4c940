"""``python -m nnfast``: what runs here, and which kernel serves each op on each device, and why.

``python -m nnfast bench --op layer_norm --shape 4096,768 --dtype bf16``: how fast, on this machine.
"""

import importlib.util
import platform
import sys

import torch

import nnfast
from nnfast import backend, compiled
from nnfast._torch import one_dnn_has


def rows() -> list[tuple[str, str, str, str]]:
    """(op, device, who serves it, why) for every op and device of this machine."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    ops = backend.native.ops() if backend.native else ["every op"]
    return [(op, device, *backend.server(op, device)) for device in devices for op in ops]


def products() -> str:
    """Which library multiplies on this CPU: the same for the whole process."""
    numbers = backend.native.thresholds() if backend.native else {}
    if backend.available("cpu") or backend.forced() == "torch":
        return "torch's"
    if numbers["product.gemm_16_bits"]:
        ours = " and ".join(name for name in ("bfloat16", "float16") if not one_dnn_has(getattr(torch, name)))
        said = f"{ours}: ours, for oneDNN has none for this CPU (measured on AMD); all else: torch's"
        return said if ours else "torch's"
    if not torch.backends.mkldnn.is_available():
        return "torch's"
    if not numbers["product.one_dnn_float32"]:
        return "torch's: MKL is made for this CPU (assumed; not measured on Intel)"
    least = numbers["product.one_dnn_multiply_adds"]
    return (
        f"float32 from {least:,} multiply-adds on: oneDNN (measured on AMD; assumed elsewhere, but on Intel); all else:"
        " torch's"
    )


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
    print(f"products of matrices: {products()}")
    loaded = f"built for torch {backend.native.built_for}" if backend.native else ""
    print(f"native  {'; '.join(filter(None, (loaded, backend.why_not)))}")
    print(f"under torch.compile nnfast serves: {compiled.summary()}")
    if backend.native:
        live, kept = (size >> 20 for size in backend.native.memory())
        print(f"memory  {live} MB in use by large outputs, {kept} MB kept for the next until nnfast.empty_cache()")
    print()
    print_table([("op", "device", "served by", "because"), *rows()])
    return 0


if __name__ == "__main__":
    sys.exit(main())
