"""Tables and pictures from the newest run in every benchmarks/results/<device>/.

python benchmarks/report.py              writes results/<device>/README.md and its pictures, and the README's tables
python benchmarks/report.py --version    also keeps this version's ratios in results/<device>/history.csv
"""

import argparse
import csv
import math
import statistics
import sys
from pathlib import Path

import matplotlib

import nnfast

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
MARKS = ("<!-- speeds: written by benchmarks/report.py -->", "<!-- end of speeds -->")
OPS = {"layer_norm": "LayerNorm", "linear_gelu": "Linear+GELU", "cross_entropy": "Cross-entropy", "adamw": "AdamW"}
OPS["linear"] = "Linear"
OPS["optimizers"] = "Other optimizers, and clipping"
OPS["scaled_dot_product_attention"] = "Attention"
FILES = {"scaled_dot_product_attention": "attention"}
#: Of these, README tells the sizes of a transformer's layers from those that no products bound.
APART = {"linear_gelu": {"GELU alone": "GELU alone"} | dict.fromkeys(("tiny", "odd", "small"), "Linear+GELU, small")}
TITLES = {"forward": "forward", "backward": "backward", "both": "forward + backward", "step": "a step"}


def number(text: str) -> float | None:
    return float(text) if text else None


def load(path: Path) -> list[list[dict]]:
    """The rows of a results file, run by run, the newest first."""
    if not path.exists():
        return []
    runs: dict[str, list[dict]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            runs.setdefault(row["run"], []).append(row)
    return [runs[run] for run in sorted(runs, reverse=True)]


def newest(runs: list[list[dict]]) -> list[dict]:
    """The rows of the newest run with each backend."""
    return [row for run in {run[0]["backend"]: run for run in reversed(runs)}.values() for row in run]


def key(row: dict) -> tuple[str, ...]:
    return tuple(row[k] for k in ("shape", "model", "dtype", "variant", "direction", "provider", "backend"))


def ours(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["provider"].startswith("nnfast")]


def named(row: dict) -> str:
    """The cell's name: a shape, or the model whose tensors an optimizer steps."""
    shape = "" if row["direction"] == "step" else row["shape"]
    return " ".join(filter(None, (shape, row["model"], row["variant"])))


def size(row: dict) -> tuple[int, ...]:
    return tuple(int(n) for n in row["shape"].split("x"))


# ---- tables ----


def markdown(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines))


def speed(row: dict | None) -> str:
    """1.93 (1.90-1.97); a cell where a peer is faster is bold."""
    if row is None:
        return ""
    if not row["ms"]:
        return f"**{row['note']}**"
    value = number(row["speedup"])
    text = f"{value:.2f} ({number(row['speedup_low']):.2f}-{number(row['speedup_high']):.2f})"
    return text if value >= 1 else f"**{text}**"


def table(rows: list[dict]) -> str:
    """Speedups over the best peer: a line a shape and option, a column a dtype and direction."""
    columns = list(dict.fromkeys((row["dtype"], row["direction"]) for row in rows))
    lines: dict[tuple, dict] = {}
    for row in ours(rows):
        name = row["provider"].removeprefix("nnfast").strip()
        line = " ".join(filter(None, (named(row), name, row["backend"])))
        lines.setdefault(line, {})[row["dtype"], row["direction"]] = row
    header = ["", *(f"{dtype} {TITLES[direction]}" for dtype, direction in columns)]
    return markdown(header, [[line, *(speed(cells.get(c)) for c in columns)] for line, cells in lines.items()])


def summary(rows: list[dict]) -> list[list[str]]:
    """Per dtype and direction: the range and the middle of the speedups, and how many cells are lost."""
    found = []
    for dtype, direction in dict.fromkeys((row["dtype"], row["direction"]) for row in rows):
        cells = [r for r in ours(rows) if (r["dtype"], r["direction"]) == (dtype, direction) and r["speedup"]]
        if not cells:
            continue
        ratios = [number(r["speedup"]) for r in cells]
        lost = [r for r in cells if number(r["speedup"]) < 1]
        found.append(
            [
                dtype,
                TITLES[direction],
                f"{statistics.median(ratios):.2f}x",
                f"{min(ratios):.2f}x",
                f"{max(ratios):.2f}x",
            ]
            + [f"{len(lost)} of {len(cells)}" + "".join(f"; {named(r)}" for r in lost[:3])]
        )
    return found


def titled(op: str, model: str) -> str:
    """The line of README's table that a cell is of."""
    return APART.get(op, {}).get(model, OPS[op])


def brief(op: str, rows: list[dict]) -> dict[tuple[str, str], str]:
    """Per title and dtype, of forward and backward together or of a step: the speedups' middle and range, and how many
    cells are lost. Without the cells of modules, in which a Linear and a GELU are two calls."""
    cells: dict[tuple, list[float]] = {}
    for row in ours(rows):
        if row["direction"] in ("both", "step") and row["speedup"] and "Sequential" not in row["variant"]:
            cells.setdefault((titled(op, row["model"]), row["dtype"]), []).append(number(row["speedup"]))
    return {
        which: f"{statistics.median(of):.2f}x ({min(of):.2f}-{max(of):.2f})"
        + f", below 1 in {sum(v < 1 for v in of)} of {len(of)}" * any(v < 1 for v in of)
        for which, of in cells.items()
    }


def widen(runs: list[list[dict]]) -> str:
    """Widen the newest run's quartiles to take in the run before it: the machine changes more between two runs than
    within one. Returns what is said of the two."""
    if len(runs) < 2:
        return "One run so far."
    before = {key(row): row for row in ours(runs[1]) if row["speedup"]}
    pairs = [(row, before[key(row)]) for row in ours(runs[0]) if row["speedup"] and key(row) in before]
    if len(pairs) < 2:
        return "The last two runs have next to no cell in common."
    apart = [abs(math.log(number(a["speedup"]) / number(b["speedup"]))) for a, b in pairs]
    for row, other in pairs:
        row["speedup_low"] = min(row["speedup_low"], other["speedup_low"], key=number)
        row["speedup_high"] = max(row["speedup_high"], other["speedup_high"], key=number)
    return (
        f"The run before it ({runs[1][0]['run']}): half of the {len(pairs)} speedups are within "
        f"{math.expm1(statistics.median(apart)):.1%} of this one's, nine of ten within "
        f"{math.expm1(statistics.quantiles(apart, n=10)[-1]):.1%}; the range in a cell takes in both."
    )


def error_ratios(rows: list[dict]) -> dict[tuple, list[tuple]]:
    """Per op, dtype and tensor: each cell's error over torch's, with the cell. What is below a rounding of the dtype at
    the largest value counts as one."""
    eps = {"fp32": 2.0**-24, "bf16": 2.0**-9, "fp16": 2.0**-12}
    cells: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        cell = tuple(row[k] for k in ("op", "dtype", "tensor", "shape", "model", "variant"))
        cells.setdefault(cell, {})[row["provider"]] = row
    found: dict[tuple, list[tuple]] = {}
    for cell, by in cells.items():
        if len(by) == 2:
            least = eps[cell[1]] * number(by["torch"]["largest"])
            ours, torchs = (number(by[p]["error"]) for p in ("nnfast", "torch"))
            if math.isnan(torchs) and not math.isnan(ours):
                torchs = math.inf  # torch's result is no number, and ours is one
            ratio = max(ours, least) / max(torchs, least)
            found.setdefault(cell[:3], []).append((ratio, cell, by))
    return found


def error_table(rows: list[dict]) -> str:
    """An op's worst cell of each dtype and tensor: where ours is furthest from float64 in units of torch's error, and
    where torch's is in units of ours."""
    lines = []
    for (op, *rest), found in error_ratios(rows).items():
        ratios = [f[0] for f in found]
        ends = []
        for _, cell, by in (max(found, key=lambda f: f[0]), min(found, key=lambda f: f[0])):
            own, torchs = (number(by[p]["error"]) for p in ("nnfast", "torch"))
            where = " ".join(filter(None, (cell[3], cell[5])))
            ends.append(f"{own:.2g}, torch {torchs:.2g} of {number(by['torch']['largest']):.3g} ({where})")
        middle, most = statistics.median(ratios), max(ratios)
        lines.append([OPS.get(op, op), *rest, f"{middle:.2f}", f"{most:.2f}", *ends])
    header = ["op", "dtype", "tensor", "ours / torch's, middle", "most", "where ours is worst", "where torch's is"]
    return markdown(header, lines)


def newest_errors(folder: Path) -> list[dict]:
    """The rows of the newest run of each op."""
    errors = load(folder / "errors.csv")
    runs = {row["op"]: row["run"] for run in reversed(errors) for row in run}
    return [row for run in errors for row in run if row["run"] == runs[row["op"]]]


# ---- pictures ----


LIBRARIES = {
    "torch": "tab:grey", "torch compiled": "tab:brown", "nnfast": "tab:blue", "nnfast compiled": "tab:cyan"
}  # fmt: skip
COLOURS = {"fp32": "tab:blue", "bf16": "tab:orange", "fp16": "tab:green"}


def of_ceiling_over_size(rows: list[dict], path: Path) -> None:
    """LayerNorm's fraction of a copy's speed over the row's length, at the largest number of rows of each."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    largest = max(size(r)[0] for r in rows if r["model"] == "grid")
    above = False
    for axis, direction in zip(axes, ("forward", "backward"), strict=True):
        for dtype in dict.fromkeys(r["dtype"] for r in rows):
            for provider, style in (("nnfast", "-o"), ("torch", ":x")):
                points = sorted(
                    (size(r)[1], number(r["of_ceiling"]))
                    for r in rows
                    if (r["dtype"], r["direction"], r["provider"]) == (dtype, direction, provider)
                    and size(r)[0] == largest and r["of_ceiling"]
                )  # fmt: skip
                above = above or any(y > 1 for _, y in points)
                if points:
                    axis.plot(*zip(*points, strict=True), style, color=COLOURS[dtype], label=f"{provider} {dtype}")
        axis.set(xscale="log", xlabel=f"row length, {largest} rows", title=f"LayerNorm {direction}", ylim=0)
        axis.axhline(1, color="grey", linewidth=0.8)
        sizes = sorted({size(r)[1] for r in rows if r["model"] == "grid"})
        axis.set_xticks(sizes, sizes, rotation=45, fontsize=8)
        axis.minorticks_off()
    axes[0].set_ylabel("part of a same-size copy's speed")
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5)) if axes[1].lines[:-1] else None
    if above:
        figure.suptitle(
            "above 1: torch's copy reads what it overwrites into the cache first, and ours writes past it", fontsize=8
        )
    save(figure, path)


def heat_map(op: str, rows: list[dict], path: Path) -> None:
    """Speedup over the best peer, a line a shape, a column a dtype and direction; what was not measured is white."""
    rows = [r for r in rows if r["provider"] == "nnfast" and r["speedup"]]
    lines = list(dict.fromkeys(named(r) for r in rows))
    columns = list(dict.fromkeys((r["dtype"], r["direction"]) for r in rows))
    value = {(named(r), r["dtype"], r["direction"]): number(r["speedup"]) for r in rows}
    grid = [[value.get((line, *column), math.nan) for column in columns] for line in lines]
    figure, axis = plt.subplots(figsize=(max(8, 4 + 0.85 * len(columns)), 1.4 + 0.27 * len(lines)))
    shown = axis.imshow([[math.log2(v) for v in line] for line in grid], cmap="RdYlBu", vmin=-2, vmax=2, aspect="auto")
    bar = figure.colorbar(shown, ticks=[-2, -1, 0, 1, 2])
    bar.ax.set_yticklabels(["1/4 or less", "1/2", "as fast", "2x", "4x or more"], fontsize=7)
    for y, line in enumerate(grid):
        for x, v in enumerate(line):
            if v == v:
                ink = "white" if abs(math.log2(v)) > 1.6 else "black"
                axis.text(x, y, f"{v:.2f}", ha="center", va="center", fontsize=7, color=ink)
    axis.set_xticks(range(len(columns)), [f"{dtype}\n{TITLES[d]}" for dtype, d in columns], fontsize=7)
    axis.set_yticks(range(len(lines)), lines, fontsize=7)
    axis.set_title(f"{OPS[op]}: times as fast as the best peer; white is not measured", fontsize=9)
    save(figure, path)


def whole_step_bars(rows: list[dict], path: Path) -> None:
    """Times as fast as torch in eager mode: a group a model and dtype, a bar a library, with the range over rounds."""
    rows = [r for r in rows if r["ms"] and r["speedup"]]
    groups = list(dict.fromkeys((r["model"], r["dtype"]) for r in rows))
    libraries = [library for library in LIBRARIES if any(r["library"] == library for r in rows)]
    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.22 * len(rows)))
    # Without bfloat16 on a CPU torch takes forty times as long: the bar ends, and its label says how much it is.
    longest = 4.0
    for i, library in enumerate(libraries):
        found = {(r["model"], r["dtype"]): r for r in rows if r["library"] == library}
        places = [groups.index(g) + 0.8 * i / len(libraries) for g in found]
        value, low, high = ([number(r[f"speedup{e}"]) for r in found.values()] for e in ("", "_low", "_high"))
        spread = [[v - x for v, x in zip(value, low, strict=True)], [x - v for v, x in zip(value, high, strict=True)]]
        shown = [min(v, longest) for v in value]
        bars = axis.barh(places, shown, 0.8 / len(libraries), xerr=spread, label=library, color=LIBRARIES[library])
        axis.bar_label(bars, [f" {v:.2f}x" + " (bar cut off)" * (v > longest) for v in value], fontsize=7)
    axis.set_yticks([i + 0.4 - 0.4 / len(libraries) for i in range(len(groups))], [" ".join(g) for g in groups])
    axis.invert_yaxis()
    axis.axvline(1, color="grey", linewidth=0.8)
    axis.set(xlabel="times as fast as torch, a whole training step", xlim=(0, 1.15 * axis.get_xlim()[1]))
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


def step_bars(rows: list[dict], path: Path) -> None:
    """The demo's training step: a bar a library and model."""
    figure, axis = plt.subplots(figsize=(8, 3.6))
    models = list(dict.fromkeys(r["model"] for r in rows))
    libraries = list(dict.fromkeys(r["library"] for r in rows))
    width = 0.8 / len(libraries)
    for i, library in enumerate(libraries):
        times = {r["model"]: r for r in rows if r["library"] == library}
        places = [models.index(m) + i * width for m in times]
        bars = axis.bar(places, [number(r["ms"]) for r in times.values()], width, label=library)
        axis.bar_label(bars, [f"{number(r['speedup']):.2f}x" for r in times.values()], fontsize=8)
    axis.set_xticks([i + 0.4 - width / 2 for i in range(len(models))], models, fontsize=8)
    axis.set(ylabel="ms a step", title="benchmarks/train_gpt.py: the same model, data and losses")
    axis.legend()
    save(figure, path)


def save(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None}, bbox_inches="tight")
    plt.close(figure)


# ---- the pages ----


def newest_step_rows(folder: Path) -> list[dict]:
    """The newest row of each model and library."""
    newest = {}
    for run in reversed(load(folder / "train_gpt.csv")):
        newest |= {(row["model"], row["library"]): row for row in run}
    return list(newest.values())


def step_table(rows: list[dict]) -> str:
    header = ["model", "library", "ms a step", "speedup", "last loss", "peak memory"]
    return markdown(header, [
        [r["model"], r["library"], f"{number(r['ms']):.1f}", f"{number(r['speedup']):.2f}x", f"{number(r['loss']):.4f}",
         f"{number(r['peak_bytes']) / 1e6:.0f} MB"]
        for r in rows
    ])  # fmt: skip


def newest_whole_steps(folder: Path) -> list[dict]:
    """The newest row of each model, dtype and library that steps.py measured. Its ranges take in the run before it, for
    two runs are further apart than two rounds; a ratio that it lacks is that run's."""
    newest: dict[tuple, list[dict]] = {}
    for run in load(folder / "steps.csv"):
        for row in run:
            newest.setdefault((row["model"], row["dtype"], row["library"]), []).append(row)
    rows = []
    for which in sorted(newest):
        row, *before = newest[which][:2]
        for word in ("speedup", "over_compiled"):
            found = [r for r in (row, *before) if r[word]]
            if found:
                row[word] = found[0][word]
                row[f"{word}_low"] = min((r[f"{word}_low"] for r in found), key=number)
                row[f"{word}_high"] = max((r[f"{word}_high"] for r in found), key=number)
        rows.append(row)
    return rows


def ranged(row: dict, word: str) -> str:
    """1.93x (1.90-1.97), the range over the rounds and runs where there were several."""
    if not row[word]:
        return ""
    value, low, high = (number(row[f"{word}{end}"]) for end in ("", "_low", "_high"))
    return f"{value:.2f}x" + (f" ({low:.2f}-{high:.2f})" if low != high else "")


def whole_steps_table(rows: list[dict]) -> str:
    header = ["model", "dtype", "library", "ms a step", "over torch", "over torch compiled", "of the floor", "peak"]
    header += ["rounds, commit"]
    return markdown(header, [
        [r["model"], r["dtype"], r["library"], f"{number(r['ms']):.0f}",
         ranged(r, "speedup"), ranged(r, "over_compiled"),
         f"{number(r['floor_ms']) / number(r['ms']):.0%}", f"{number(r['peak_bytes']) / 1e6:.0f} MB",
         f"{r['rounds']}, {r['commit']}"]
        for r in rows if r["ms"]
    ])  # fmt: skip


def whole_steps_overview(rows: list[dict]) -> str:
    """The same, a line a model and dtype: for who wants to know whether it helps."""
    header = ["model", "dtype", "torch", "nnfast", "speedup", "over torch compiled", "both compiled", "of the floor"]
    lines = []
    for model, dtype in dict.fromkeys((r["model"], r["dtype"]) for r in rows):
        by = {r["library"]: r for r in rows if (r["model"], r["dtype"]) == (model, dtype) and r["ms"]}
        if not {"torch", "nnfast"} <= by.keys():
            continue
        torchs, own = by["torch"], by["nnfast"]
        line = [model, dtype, *(f"{number(r['ms']):.0f} ms" for r in (torchs, own))]
        line += [ranged(own, "speedup"), ranged(own, "over_compiled")]
        line += [ranged(by["nnfast compiled"], "over_compiled") if "nnfast compiled" in by else ""]
        line += [f"{number(own['floor_ms']) / number(own['ms']):.0%}"]
        line += [f"{number(torchs['peak_bytes']) / 1e6:.0f}, {number(own['peak_bytes']) / 1e6:.0f} MB"]
        lines.append(line)
    return markdown([*header, "peak: torch, nnfast"], lines)


# ---- from version to version ----


def ratios(folder: Path) -> dict[str, tuple[float, float, float]]:
    """What is kept of a version: the middle speedup of each op, dtype and direction, and each whole step's; with the
    middles of their quartiles, or the range over the rounds."""
    found = {}
    for op, title in OPS.items():
        cells: dict[str, list[dict]] = {}
        for row in ours(newest(load(folder / f"{op}.csv"))):
            if row["speedup"]:
                cells.setdefault(f"{title} {row['dtype']} {TITLES[row['direction']]}", []).append(row)
        for what, of in cells.items():
            found[what] = tuple(
                statistics.median(number(r[f"speedup{end}"]) for r in of) for end in ("", "_low", "_high")
            )
    for row in newest_whole_steps(folder):
        if row["library"].startswith("nnfast") and row["speedup"]:
            what = f"{row['model']} {row['dtype']} {row['library']}"
            found[what] = tuple(number(row[f"speedup{end}"]) for end in ("", "_low", "_high"))
    return found


def moved(folder: Path, keep: str = "") -> str:
    """What has moved since the last version by more than both spreads; where ``keep`` names a version, it is added."""
    path = folder / "history.csv"
    before: dict[str, dict[str, tuple]] = {}
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                numbers = tuple(number(row[k]) for k in ("speedup", "low", "high"))
                before.setdefault(row["version"], {})[row["what"]] = numbers
    now = ratios(folder)
    if keep:
        before.pop(keep, None)
        lines = [(version, what, *numbers) for version, of in before.items() for what, numbers in of.items()]
        lines += [(keep, what, *numbers) for what, numbers in now.items()]
        with path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["version", "what", "speedup", "low", "high"])
            writer.writerows([[f"{v:.4g}" if isinstance(v, float) else v for v in line] for line in lines])
    last = next((v for v in reversed(before) if v != keep), None)
    # Where all that both have are the very same ratios, there is nothing to compare.
    both = now.keys() & before[last].keys() if last else ()
    if all(before[last][what] == tuple(float(f"{v:.4g}") for v in now[what]) for what in both):
        return ""
    lines = [
        [what, f"{then[0]:.2f}x", f"{new[0]:.2f}x"]
        for what, new in now.items()
        if (then := before[last].get(what)) and (new[1] > then[2] or new[2] < then[1])
    ]
    if not lines:
        return f"Since {last} nothing has moved by more than its spread."
    return f"What has moved since {last} by more than its spread:\n\n" + markdown(["", last, "now"], lines)


SUMMARY = ["op", "dtype", "", "middle", "least", "most", "cells where a peer is faster"]


def page(folder: Path, keep: str = "") -> str:
    """Write a device's page and pictures. Returns the machine's name."""
    machine, sections, lines = "", [], []
    for op, title in OPS.items():
        runs = load(folder / f"{op}.csv")
        if not runs:
            continue
        said = widen(runs)
        rows = newest(runs)
        machine = rows[0]["device"]
        heat_map(op, rows, folder / f"{op}.png")
        pictures = [f"![speedups of {title}]({op}.png)"]
        if op == "layer_norm":
            of_ceiling_over_size(rows, folder / "layer_norm_ceiling.png")
            pictures.append("![LayerNorm beside a copy](layer_norm_ceiling.png)")
        lines += [[title, *line] for line in summary(rows)]
        peers = ", ".join(dict.fromkeys(r["provider"] for r in rows if not r["provider"].startswith("nnfast")))
        sections.append(
            f"## {title}\n\n`pytest benchmarks/bench_{FILES.get(op, op)}.py --benchmark-only`: {rows[0]['run']}, "
            f"{rows[0]['versions']}, commit {rows[0]['commit']}. Peers: {peers}. {said}\n\n"
            + "\n\n".join(pictures)
            + f"\n\n{table(rows)}\n"
        )
    sections.insert(0, f"## Every op in a line a dtype and direction\n\n{markdown(SUMMARY, lines)}\n")
    if steps := newest_step_rows(folder):
        step_bars(steps, folder / "train_gpt.png")
        sections.insert(0, f"## A whole training step\n\n![step times](train_gpt.png)\n\n{step_table(steps)}\n")
    if rows := newest_errors(folder):
        sections.append(
            "## Errors\n\nThe largest distance from the result in float64, of forward and backward, ours over plain "
            "torch's: the middle and the most over the shapes above, and the two shapes at the ends. An error below "
            f"one rounding of the dtype counts as one.\n\n{error_table(rows)}\n"
        )
    if said := moved(folder, keep):
        sections.append(f"## From version to version\n\n{said}\n")
    if whole := newest_whole_steps(folder):
        whole_step_bars(whole, folder / "steps.png")
        said = (
            "`python -m nnfast.benchmarks.steps --record`: each library in a process of its own, in turn. A range is "
            "over the rounds of the last two runs. The floor is the step's products alone at the speed of the best "
            "large product here."
        )
        said += f"\n\n![whole steps](steps.png)\n\n{whole_steps_table(whole)}\n"
        sections.insert(0, f"## Whole training steps\n\n{said}")
    text = (
        f"# {machine}\n\nWritten by `python benchmarks/report.py` from the CSV files beside it. Of an op, a number is "
        "how many times as fast as the best peer in the same run, the median of laps in which the providers take "
        "turns, with the range from the lower to the upper quartile over the last two runs; a cell where a peer is "
        "faster is bold.\n\n"
    )
    (folder / "README.md").write_text(text + "\n".join(sections))
    return machine


def overview(folders: dict[str, Path]) -> str:
    """README's tables: the whole steps of each machine, by its name, and a line an op and dtype."""
    parts = []
    for machine, folder in folders.items():
        where = f"benchmarks/results/{folder.name}"
        parts.append(f"**{machine}** ([every cell, and pictures]({where}/README.md))")
        if whole := newest_whole_steps(folder):
            parts += [f"![whole steps]({where}/steps.png)", whole_steps_overview(whole)]
    speeds: dict[tuple, dict[str, str]] = {}
    by_op: dict[tuple, list[float]] = {}
    for folder in folders.values():
        for (op, dtype, _), found in error_ratios(newest_errors(folder)).items():
            for ratio, cell, _ in found:
                by_op.setdefault((titled(op, cell[4]), dtype), []).append(ratio)
    for machine, folder in folders.items():
        for op in OPS:
            for which, said in brief(op, newest(load(folder / f"{op}.csv"))).items():
                speeds.setdefault(which, {})[machine] = said
    lines = []
    for title, dtype in sorted(speeds, key=lambda which: which[0]):
        of = by_op.get((title, dtype), [])
        error = f"{statistics.median(of):.2f} ({max(of):.2f})" if of else ""
        lines.append([title, dtype, *(speeds[title, dtype].get(machine, "") for machine in folders), error])
    parts.append(markdown(["op", "dtype", *folders, "error over torch's: middle (most)"], lines))
    return "\n\n".join(parts)


def main() -> int:
    # The most capable machine first: AVX-512 before AVX2, and a GPU before both.
    folders = sorted((path.parent for path in (HERE / "results").glob("*/layer_norm.csv")), reverse=True)
    if not folders:
        print("report: no results yet; make bench writes them", file=sys.stderr)
        return 1
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="store_true", help="keep this version's ratios")
    keep = nnfast.__version__ if parser.parse_args().version else ""
    machines = {page(folder, keep): folder for folder in folders}
    assert len(machines) == len(folders), "two folders hold the results of one machine"
    head, rest = README.read_text().split(MARKS[0])
    README.write_text(f"{head}{MARKS[0]}\n\n{overview(machines)}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}")
    print(*(f"written: {folder / 'README.md'}" for folder in folders), f"written: {README}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
