"""python -m nnfast bench: one shape on this machine, every provider that can be imported."""

import argparse

import torch

from nnfast.__main__ import print_table

from . import (
    bench_adamw,
    bench_attention,
    bench_cross_entropy,
    bench_layer_norm,
    bench_linear,
    bench_linear_gelu,
    harness,
)

OPS = {
    module.OP: module
    for module in (bench_layer_norm, bench_linear, bench_linear_gelu, bench_cross_entropy, bench_adamw, bench_attention)
}
EXAMPLES = """\
--shape is  layer_norm: rows,size   linear: tokens,in_features,out_features
            linear_gelu: the same, or elements: GELU alone
            cross_entropy: rows,classes   adamw: the shape of one parameter
            scaled_dot_product_attention: batch,heads,length,size
for example --op layer_norm --shape 4096,768 --dtype bf16"""


def shape(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))


def parse(argv: list[str]) -> tuple[harness.Case, bool]:
    parser = argparse.ArgumentParser(
        prog="python -m nnfast bench",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", required=True, choices=OPS)
    parser.add_argument("--shape", required=True, type=shape)
    parser.add_argument("--dtype", default="fp32", choices=harness.DTYPES)
    parser.add_argument("--direction", default="both", choices=harness.DIRECTIONS, help="adamw: a step, always")
    parser.add_argument("--approximate", default="none", choices=("none", "tanh"), help="linear_gelu: which GELU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--compile", action="store_true", help="torch.compile as a provider as well")
    options = parser.parse_args(argv)
    lengths = {
        "layer_norm": (2,),
        "linear": (3,),
        "linear_gelu": (1, 3),
        "cross_entropy": (2,),
        "adamw": range(9),
        bench_attention.OP: (4,),
    }[options.op]
    if len(options.shape) not in lengths or min(options.shape, default=1) < 1:
        parser.error(f"--shape {','.join(map(str, options.shape))} is no shape of {options.op}\n{EXAMPLES}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    direction = "step" if options.op == "adamw" else options.direction
    variant = {"linear_gelu": options.approximate, bench_attention.OP: "causal"}.get(options.op, "")
    case = harness.Case(options.op, "", options.shape, options.dtype, direction, variant, options.device)
    return case, options.compile


def main(argv: list[str]) -> int:
    case, compile = parse(argv)
    torch.manual_seed(0)
    found = harness.run(case, OPS[case.op].task(case, compile))
    print(f"{case} on {found[0].device}, {found[0].versions}")
    rows = [("provider", "ms", "+-", "of ceiling", "ours is faster", "peak memory", "")]
    for row in found:
        if row.ms is None:
            rows.append((row.provider, "", "", "", "", "", row.note))
            continue
        ratio = "" if row.provider.startswith(harness.OURS) or not row.speedup else f"{1 / row.speedup:.2f}x"
        memory = f"{row.peak_bytes / 1e6:.1f} MB"
        rows.append(
            (row.provider, f"{row.ms:.4g}", f"{row.spread:.1%}", f"{row.of_ceiling:.0%}", ratio, memory, row.note)
        )
    print_table(rows)
    ceiling = "a bare matrix product's" if found[0].flops else "a copy's of the same bytes"
    print(f"ceiling: {ceiling} speed in the same run; times are medians of laps in which the providers take turns")
    return 0
