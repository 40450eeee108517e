"""Draws the charts of docs/ from the measurements that are stored beside this file; measures nothing.

    python benchmarks/charts.py                              # make bench
    python benchmarks/charts.py towers growth --folder charts

Each chart is 840 pixels wide, as wide as a README is shown, with machine, versions and date below it.
"""

import argparse
import json
import logging
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
from bench_growth import fastest_peer, grown, slope
from timing import Ratios

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator  # noqa: E402

logger = logging.getLogger("charts")

HERE = Path(__file__).resolve().parent
WIDTH, DPI = 8.4, 100  # inches, dots an inch
ROW = 0.2  # inches of a row of dots
STYLE = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
}
OURS, HALF = ("vit_embed", "optimized"), "vit_embed, half the patches"
NAMES = {"vit_embed": "vit_embed", "optimized": "vit_embed, optimized()", "timm": "timm", "padded": "padded rows"}
COLOURS = {"vit_embed": "#56b4e9", "optimized": "#0b4f8a", "transformers": "#8c8c8c", "open_clip": "#d55e00"}
COLOURS |= {"timm": "#cc79a7", "padded": "#8c8c8c", HALF: "#009e73"}
CLOCKS = {"cpu": "processor time", "wall": "elapsed time", "none: tensors are counted": "bytes of tensors"}
GOAL = 1.05  # times as fast as the fastest peer, in every cell
Cells = list[dict]


class Span(NamedTuple):
    """Of a ratio: its median over the rounds, and its range; None where only the median was kept."""

    median: float
    lowest: float | None
    highest: float | None

    @classmethod
    def of(cls, cell: dict, over: str, under: str) -> "Span":
        """Seconds of one side over those of another."""
        if under == "vit_embed" and over in cell.get("ratios", {}):
            return cls(*cell["ratios"][over])
        found = Ratios.of(cell["seconds"][over], cell["seconds"][under])
        alone = len(cell["seconds"][over]) == 1
        return cls(found.median, *((None, None) if alone else (found.lowest, found.highest)))


# --- what every chart has ---


def origin(cells: Cells) -> str:
    """Machine, versions and dates of the cells."""
    named = {cell["about"]["machine"].partition(";")[0].replace("(R)", "") for cell in cells}
    machines = sorted(re.sub(r"\b1 thread\(s\)", "1 thread", name).replace("thread(s)", "threads") for name in named)
    versions = {name: number for cell in cells for name, number in cell["about"]["versions"].items()}
    packages = ", ".join(f"{name.removesuffix('_torch')} {number}" for name, number in versions.items())
    dates = sorted({cell["about"]["date"] for cell in cells})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    clock = " and ".join(sorted({CLOCKS[cell["about"]["clock"]] for cell in cells}))
    return f"{'; '.join(machines)}, a shared machine, {clock}. {packages}. {when}"


def finish(figure: Figure, title: str, cells: Cells, notes: Sequence[str] = ()) -> Figure:
    """The message above, and small letters below."""
    figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold")
    figure.supxlabel("\n".join([*notes, origin(cells)]), x=0.012, ha="left", fontsize=7, color="#555555")
    return figure


def rows_figure(rows: int, columns: int, ratios: Sequence[float] | None = None) -> tuple[Figure, list[Axes]]:
    """Panels side by side that share the rows."""
    height = min(7.0, 1.45 + ROW * rows)
    figure, axes = plt.subplots(
        1, columns, figsize=(WIDTH, height), sharey=True, squeeze=False, layout="constrained", width_ratios=ratios
    )
    return figure, list(axes[0])


def label_rows(axis: Axes, labels: Sequence[str]) -> None:
    """The first row on top."""
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)


def draw_spans(axis: Axes, spans: dict[int, Span], side: str, shift: float) -> None:
    """Dots with their ranges, in rows; an arrow where a range goes on beyond the edge."""
    left, right = axis.get_xlim()
    for row, span in spans.items():
        if span.lowest is not None:
            ends = max(span.lowest, left), min(span.highest, right)
            axis.plot(ends, [row + shift] * 2, color=COLOURS[side], linewidth=1.3, alpha=0.6, solid_capstyle="butt")
            if span.highest > right:
                axis.plot([right], [row + shift], ">", color=COLOURS[side], markersize=4, clip_on=False)
    axis.plot(
        [span.median for span in spans.values()],
        [row + shift for row in spans],
        "o",
        color=COLOURS[side],
        markersize=5,
        label=NAMES.get(side, side),
    )


def legend_above(axis: Axes, labels: Sequence[str] | None = None) -> None:
    handles, named = axis.get_legend_handles_labels()
    options = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": len(handles), "borderaxespad": 0.1}
    axis.legend(handles, labels or named, fontsize=9, handletextpad=0.1, **options)


def draw_bands(axis: Axes, rows: Sequence[int]) -> None:
    for row in rows:
        axis.axhspan(row - 0.5, row + 0.5, color="#f3f3f3", zorder=0, linewidth=0)


def show_times(axis: Axes) -> None:
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} x"))


# --- the charts ---


def draw_towers(cells: Cells) -> Figure:
    """How many times as fast as the fastest peer each of our sides is, cell by cell, eager and compiled."""
    cells = [cell for cell in cells if is_plain(cell)]
    order = {name: place for place, name in enumerate(("B/32", "B/16", "L/14", "fp32", "bf16"))}
    keys = sorted(
        {(cell["size"], cell["dtype"], cell["batch"]) for cell in cells}, key=lambda k: (order[k[0]], order[k[1]], k[2])
    )
    figure, axes = rows_figure(len(keys), 2)
    peers = {mode: most_peers([cell for cell in cells if cell["mode"] == mode]) for mode in ("eager", "compiled")}
    right = max(1.4, 0.05 + max(Span.of(cell, fastest_peer([cell]), side).median for cell in cells for side in OURS))
    alone = {mode: set() for mode in peers}
    for axis, (mode, names) in zip(axes, peers.items()):
        axis.set_xlim(0.9, right)
        draw_bands(axis, range(0, len(keys), 2))
        axis.axvline(1.0, color="black", linewidth=1)
        axis.axvline(GOAL, color="black", linewidth=1, linestyle=":")
        spans: dict[str, dict[int, Span]] = {side: {} for side in OURS}
        for cell in (cell for cell in cells if cell["mode"] == mode):
            key = cell["size"], cell["dtype"], cell["batch"]
            if set(names) != set(peers_of(cell)):
                alone[mode].add(key)
            for side in OURS:
                spans[side][keys.index(key)] = Span.of(cell, fastest_peer([cell]), side)
        for shift, side in zip((-0.17, 0.17), OURS):
            draw_spans(axis, spans[side], side, shift)
        axis.set_title(f"{mode} (peers: {', '.join(names)})", fontsize=9)
        show_times(axis)
    label_rows(
        axes[0],
        [f"ViT-{s} {d}, batch {b}{' *' * any((s, d, b) in each for each in alone.values())}" for s, d, b in keys],
    )
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", ncols=2, fontsize=9, handletextpad=0.1)
    notes = ["Dot: median of the rounds; line: their range. Full line: the fastest peer; dotted: 1.05 times as fast."]
    only = " and ".join(mode for mode, those in alone.items() if those)
    notes[0] += f" *: {only} against transformers alone." * bool(only)
    return finish(figure, "Image towers: times as fast as the fastest peer", cells, notes)


def is_plain(cell: dict) -> bool:
    """Whether a cell of the towers is measured as users have it."""
    return not cell["freezing"] and not cell["keep_freed_memory"]


def peers_of(cell: dict) -> list[str]:
    return [name for name in cell["seconds"] if name not in OURS]


def most_peers(cells: Cells) -> list[str]:
    return max((peers_of(cell) for cell in cells), key=len, default=["transformers"])


TITLES = {
    "pixels": "pixels of a side",
    "batch": "images a call",
    "tokens": "tokens of text",
    "towers": "ViT, patches of 16",
}


def draw_growth(cells: Cells) -> Figure:
    """Time and memory against pixels, batch, tokens and tower, with the exponents."""
    found = [(part, what, those) for (part, what), those in grown(cells).items() if len(those) > 1]
    found.sort(key=lambda each: (list(TITLES).index(each[0]), "B/32" in each[1]))
    shown = list({part: (part, what, those) for part, what, those in reversed(found)}.values())[::-1]
    figure, axes = plt.subplots(2, len(shown), figsize=(WIDTH, 5.4), squeeze=False, layout="constrained", sharex="col")
    for column, (part, what, those) in zip(axes.T, shown):
        counts, peer = [cell["count"] for cell in those], fastest_peer(those)
        for axis, unit in zip(column, ("seconds", "mib")):
            axis.set_xscale("log")
            axis.set_yscale("log")
            lines = []
            for side in (peer, *OURS):
                values = [statistics.median(cell[unit][side]) for cell in those]
                colour = COLOURS[side]
                axis.plot(
                    counts, values, "o-", color=colour, markersize=3.5, linewidth=1.5, label=NAMES.get(side, side)
                )
                lines.append((f"{slope(counts, values):.2f}", colour))
            for place, (text, colour) in enumerate(lines):
                axis.text(0.04 + 0.24 * place, 0.9, text, color=colour, transform=axis.transAxes, fontweight="bold")
            axis.set_xticks(counts, [tick_of(cell["at"]) for cell in those])
            axis.xaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_ylim(top=axis.get_ylim()[1] * 2.5)
        column[0].set_title(f"{TITLES[part]}\n{what}", fontsize=9)
    axes[0][0].set_ylabel("seconds")
    axes[1][0].set_ylabel("MiB above the weights")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=3, fontsize=8)
    notes = [
        "Numbers: exponents over pixels (of area), images, tokens, parameters; 1 is twice the time for twice as many."
    ]
    return finish(figure, "Growth of time and memory", cells, notes)


def tick_of(value: int | str) -> str:
    """224, 16k or S."""
    if isinstance(value, int) and value >= 1024:
        return f"{value // 1024}k"
    return str(value).removesuffix("/16")


def draw_text(cells: Cells) -> Figure:
    """How many times as long as vit_embed the others take for texts."""
    names = list(dict.fromkeys(cell["what"] for cell in cells))
    rows = sorted(cells, key=lambda c: (c["part"] != "prompts", names.index(c["what"]), c["dtype"] != "fp32"))
    figure, (axis,) = rows_figure(len(rows), 1)
    axis.set_xscale("log")
    axis.set_xlim(0.9, 42)
    draw_bands(axis, range(0, len(rows), 2))
    axis.axvline(1.0, color=COLOURS["optimized"], linewidth=1.5)
    for side in ("transformers", "open_clip"):
        spans = {i: Span.of(cell, side, "vit_embed") for i, cell in enumerate(rows) if side in cell["seconds"]}
        draw_spans(axis, spans, side, 0)
        for row, span in spans.items():
            text = f"{span.median:.0f} x" if span.median >= 10 else f"{span.median:.1f} x"
            axis.annotate(text, (span.highest or span.median, row), (6, 0), textcoords="offset points", va="center")
    label_rows(axis, [f"{cell['what']}, {cell['dtype']}" for cell in rows])
    axis.set_xticks([1, 2, 5, 10, 20], ["1 x", "2 x", "5 x", "10 x", "20 x"])
    axis.xaxis.set_minor_locator(NullLocator())
    legend_above(axis)
    notes = ["Dot: median of the rounds; line: their range. Line at 1: vit_embed. Of the class vectors a tenth is run."]
    return finish(figure, "Texts: times as long as vit_embed takes", cells, notes)


def draw_sizes(cells: Cells) -> Figure:
    """How many times as long as vit_embed padded rows and NaFlexVit take for images of many sizes."""
    rows = sorted(cells, key=lambda cell: (cell["kind"], cell["budget"], cell["dtype"] != "fp32"))
    figure, (axis,) = rows_figure(len(rows), 1)
    axis.set_xlim(0.9, 3.2)
    draw_bands(axis, range(0, len(rows), 2))
    axis.axvline(1.0, color=COLOURS["optimized"], linewidth=1.5)
    for shift, side in ((-0.17, "padded"), (0.17, "timm")):
        spans = {i: Span.of(cell, side, "packed") for i, cell in enumerate(rows) if side in cell["seconds"]}
        draw_spans(axis, spans, side, shift)
    padded = [f"{cell['padded_by'] - 1:.0%}" for cell in rows]
    names = [f"{cell['kind']}, at most {cell['budget']} patches, {cell['dtype']}" for cell in rows]
    label_rows(axis, [f"{name} (padding {share})" for name, share in zip(names, padded)])
    show_times(axis)
    legend_above(axis, ["rows padded and masked", "timm's NaFlexVit"])
    notes = ["Dot: median of the rounds; line: their range. Line at 1: vit_embed. ViT-S/16, pooled vector."]
    return finish(figure, "Images of many sizes: times as long as vit_embed takes", cells, notes)


def draw_embed(cells: Cells) -> Figure:
    """Pictures a second of each side, a panel for each size of picture."""
    figure, axes = rows_figure(max(len(cell["seconds"]) for cell in cells), len(cells))
    for axis, cell in zip(axes, cells):
        rates = {side: cell["count"] / statistics.median(seconds) for side, seconds in cell["seconds"].items()}
        colours = [COLOURS["optimized"] if side == "vit_embed" else "#c4c4c4" for side in rates]
        bars = axis.barh(range(len(rates)), list(rates.values()), color=colours, height=0.7)
        axis.bar_label(
            bars, [f"{rate:.0f}  ({rate / rates['transformers']:.2f} x)" for rate in rates.values()], padding=3
        )
        axis.set_xlim(0, 1.5 * max(rates.values()))
        axis.set_title(f"JPEGs of {cell['size']}", fontsize=9)
        label_rows(axis, list(rates))
    setting = f"ViT-B/32 in {cells[0]['dtype']}, {cells[0]['count']} pictures, {cells[0]['workers']} workers"
    notes = [f"{setting}; medians of the rounds, in brackets times as many as transformers."]
    return finish(figure, "Folders of pictures: embedded a second", cells, notes)


def draw_training(cells: Cells) -> Figure:
    """Steps of training: times as fast as transformers, and their peak memory as a share of its."""
    keys = list(dict.fromkeys(name_of(cell) for cell in cells))
    figure, axes = rows_figure(len(keys), 2)
    panels = ("seconds", "forward and backward: times as fast"), ("mib", "peak memory: share of transformers'")
    for axis, (field, title) in zip(axes, panels):
        rows = {keys.index(name_of(cell)): cell for cell in cells if field in cell and cell["what"] != "AdamW"}
        draw_shares(axis, rows, field)
        axis.set_title(title, fontsize=9)
    label_rows(axes[0], keys)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", ncols=2, fontsize=9, handletextpad=0.1)
    notes = ["Dot: median of the rounds; line: their range. Line at 1: transformers. Memory above weights and inputs."]
    return finish(figure, "Training steps beside transformers", cells, notes)


def draw_memory(cells: Cells) -> Figure:
    """Peak memory of inference as a share of the peer's, class by class."""
    figure, (axis,) = rows_figure(len(cells), 1)
    draw_shares(axis, dict(enumerate(cells)), "mib")
    label_rows(axis, [name_of(cell) for cell in cells])
    legend_above(axis)
    notes = ["Line at 1: the peer in transformers; left of it is less. Tensors alive above weights and inputs."]
    return finish(figure, "Memory of inference: share of the peer's", cells, notes)


def draw_shares(axis: Axes, rows: dict[int, dict], field: str) -> None:
    """Of each row, for each of our sides: the peer's seconds over ours, or our memory over the peer's."""
    sides = [side for side in (*OURS, HALF) if any(side in cell[field] for cell in rows.values())]
    spans: dict[str, dict[int, Span]] = {side: {} for side in sides}
    for row, cell in rows.items():
        peers = {name: statistics.median(cell[field][name]) for name in cell[field] if name not in (*OURS, HALF)}
        peer = min(peers, key=peers.__getitem__)
        for side in (side for side in sides if side in cell[field]):
            over, under = (peer, side) if field == "seconds" else (side, peer)
            found = Ratios.of(cell[field][over], cell[field][under])
            spans[side][row] = Span(found.median, found.lowest, found.highest)
    medians = [span.median for each in spans.values() for span in each.values()] or [1]
    axis.set_xlim(min(0.9, min(medians) - 0.1), max(1.15, max(medians) + 0.15))
    draw_bands(axis, range(0, len(rows), 2))
    axis.axvline(1.0, color="black", linewidth=1)
    for shift, side in zip((-0.17, 0.17) if len(sides) > 1 else (0,), sides):
        draw_spans(axis, spans[side], side, shift)
    show_times(axis)


def draw_lossy(cells: Cells) -> Figure:
    """Speed against accuracy, by the benchmark itself: it knows what its sides are."""
    from bench_lossy import draw  # for its models it needs packages that no other chart does

    return draw(cells)


def name_of(cell: dict) -> str:
    """What tells the cells of memory and of training apart, but for the part of a step."""
    what = cell.get("task") or cell["class"]
    parts = (what, cell.get("size"), cell.get("image_size"), cell.get("dtype"))
    return ", ".join(f"{part} pixels" if isinstance(part, int) else str(part) for part in parts if part)


class Chart(NamedTuple):
    """A picture, the file that it is drawn of, and what draws it."""

    picture: str
    file: str
    draw: Callable[[Cells], Figure]


CHARTS = {
    "towers": Chart("towers.png", "towers.json", draw_towers),
    "growth": Chart("growth.png", "growth.json", draw_growth),
    "training": Chart("training.png", "training.json", draw_training),
    "memory": Chart("memory.png", "memory.json", draw_memory),
    "text": Chart("text_speed.png", "text_speed.json", draw_text),
    "sizes": Chart("sizes.png", "sizes.json", draw_sizes),
    "lossy": Chart("lossy.png", "lossy.json", draw_lossy),
    "embed": Chart("embed_speed.png", "embed_speed.json", draw_embed),
}


def draw(names: Sequence[str], source: Path, folder: Path) -> Iterator[Path]:
    """Draws the charts whose files are in `source` into `folder`, and says which are not there."""
    for name in names:
        picture, file, make = CHARTS[name]
        if not (source / file).exists():
            logger.warning("%s is not drawn: %s is missing", picture, source / file)
            continue
        with plt.rc_context(STYLE):
            figure = make(json.loads((source / file).read_text()))
            figure.savefig(folder / picture, dpi=DPI)
            plt.close(figure)
        yield folder / picture


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {list(CHARTS)}; all by default")
    parser.add_argument("--source", type=Path, default=HERE, help="folder of the measurements")
    parser.add_argument("--folder", type=Path, default=HERE, help="folder for the pictures")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    unknown = set(args.names) - set(CHARTS)
    if unknown:
        parser.error(f"unknown charts {sorted(unknown)}; expected some of {list(CHARTS)}")
    for path in draw(args.names or list(CHARTS), args.source, args.folder):
        logger.info("drew %s", path)


if __name__ == "__main__":
    main()
