"""The arena's pictures: gold reward against KL, a labelled point for each method; the frontiers, a panel for
each family."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastalign.arena.entries import FAMILIES

Box = tuple[float, float, float, float]  # left, bottom, right, top in pixels
_RADII = (0, 4, 10, 18, 28, 40, 55, 75, 100, 130, 165, 205, 250, 300, 360, 430, 510, 600)
_ANGLES = 24
_FEW_TICKS = (0, 0.5, 2, 5, 10, 20, 50, 100, 200, 500)
_TICKS = (*_FEW_TICKS, 0.1, 0.25, 1, 3, 7, 15, 30, 75)
_DETOUR = 30  # how much further away a label may stand to keep error bars clear


def overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def place(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    inside: Box,
    bars: Sequence[Box] = (),
    gap: float = 6.0,
) -> list[Box]:
    """A box for each label, near its point and inside the frame, that overlaps no other label and no point;
    all in pixels. Boxes of `bars` are kept clear where that costs no long way. The most crowded points choose
    first, each the nearest free place of a fan around it."""
    dots = [(x - gap, y - gap, x + gap, y + gap) for x, y in points]
    near = [sum(math.dist(p, q) < 60 for q in points) for p in points]
    taken: list[Box] = []
    boxes: dict[int, Box] = {}
    for i in sorted(range(len(points)), key=lambda i: (-near[i], i)):
        best, nearest = None, 0
        for radius, box in _fan(points[i], sizes[i], inside, gap):
            if best is not None and radius > nearest + _DETOUR:
                break
            if any(overlap(box, other) for other in (*taken, *dots)):
                continue
            clear = not any(overlap(box, bar) for bar in bars)
            if best is None or clear:
                best, nearest = box, radius
            if clear:
                break
        if best is None:  # a frame too small for its labels: rows from its upper edge down, over the points
            width, height = sizes[i]
            best = (inside[0], inside[3] - height, inside[0] + width, inside[3])
            while any(overlap(best, other) for other in taken):
                best = (best[0], best[1] - height, best[2], best[3] - height)
        taken.append(best)
        boxes[i] = best
    return [boxes[i] for i in range(len(points))]


def _fan(
    point: tuple[float, float], size: tuple[float, float], inside: Box, gap: float
) -> Iterator[tuple[int, Box]]:
    """(radius, box) of the places around a point that lie inside the frame, the nearest first. A box touches
    the circle around its point from outside."""
    (x, y), (width, height) = point, size
    for radius in _RADII:
        for turn in range(_ANGLES):
            angle = 2 * math.pi * (turn / _ANGLES + 1 / 16)
            cx = x + math.cos(angle) * (gap + radius + width / 2)
            cy = y + math.sin(angle) * (gap + radius + height / 2)
            box = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
            if box[0] >= inside[0] and box[1] >= inside[1] and box[2] <= inside[2] and box[3] <= inside[3]:
                yield radius, box


def _figure(*shape: int, **options: Any) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(*shape, **options)


def _root_axis(axis: Any, largest: float, ticks: Sequence[float]) -> None:
    """KL on a root scale, on which optimal reward grows about linearly near 0 (Gao et al. 2022, arXiv
    2210.10760)."""
    axis.set_xscale("function", functions=(lambda x: abs(x) ** 0.5, lambda x: x**2))
    axis.set_xlim(0, largest * 1.15)
    axis.set_xticks([tick for tick in ticks if tick <= largest * 1.1])
    axis.get_xaxis().set_major_formatter(lambda x, _: f"{x:g}")
    axis.minorticks_off()


def main(rows: Sequence[Mapping[str, Any]], sft: float, path: Path) -> None:
    """Every method at its own coefficient: gold reward over KL, bars of a standard error, SFT as a line and a
    point. rows: as `report.rows` makes them."""
    from matplotlib import pyplot

    figure, axis = _figure(figsize=(15, 8.6), layout="constrained")
    largest = max(0.5, max(row["kl_k3"] + row["kl_k3_se"] for row in rows))
    _root_axis(axis, largest, _TICKS)
    bottom = min([sft, *(row["gold_reward"] - row["gold_reward_se"] for row in rows)])
    top = max(row["gold_reward"] + row["gold_reward_se"] for row in rows)
    room = max(0.05, top - bottom)
    axis.set_ylim(bottom - 0.12 * room, top + 0.12 * room)
    axis.axhline(sft, color="#888888", linestyle="--", linewidth=1, zorder=1)
    axis.plot([0], [sft], marker="*", markersize=16, color="#888888", clip_on=False, zorder=4)
    for row in rows:
        axis.errorbar(
            row["kl_k3"], row["gold_reward"], xerr=row["kl_k3_se"], yerr=row["gold_reward_se"], fmt="none",
            ecolor=FAMILIES[row["family"]], elinewidth=1, alpha=0.35, zorder=2,
        )  # fmt: skip
        axis.plot(
            row["kl_k3"], row["gold_reward"], "o", markersize=7, color=FAMILIES[row["family"]], zorder=4
        )
    axis.set_xlabel("KL(policy, SFT), nats per sequence (root scale)", fontsize=14)
    axis.set_ylabel("gold reward of fresh samples", fontsize=14)
    axis.set_title(
        "What each method makes of the same SFT model and the same budget", fontsize=17, loc="left"
    )
    axis.tick_params(labelsize=12)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    own = [family for family in FAMILIES if any(row["family"] == family for row in rows)]
    handles = [
        axis.plot([], [], "o", color=FAMILIES[family], markersize=8, label=family)[0] for family in own
    ]
    axis.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.005, 1.0), fontsize=12, frameon=False)
    _label(figure, axis, rows, sft)
    figure.savefig(path, dpi=130, format="png")
    pyplot.close(figure)


def _label(figure: Any, axis: Any, rows: Sequence[Mapping[str, Any]], sft: float) -> None:
    """The names beside their points, far ones with a line."""
    from matplotlib import patheffects

    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    to_pixels, frame = axis.transData, axis.get_window_extent(renderer)
    where = [(row["kl_k3"], row["gold_reward"]) for row in rows] + [(0.0, sft)]
    points = [tuple(map(float, to_pixels.transform(each))) for each in where]
    names = [(row["shown"], FAMILIES[row["family"]], 11) for row in rows] + [("SFT", "#666666", 14)]
    sizes = []
    for name, _, size in names:
        text = axis.text(0, 0, name, fontsize=size)
        extent = text.get_window_extent(renderer)
        sizes.append((extent.width + 4, extent.height + 2))
        text.remove()
    inside = (frame.x0 + 3, frame.y0 + 3, frame.x1 - 3, frame.y1 - 3)
    outline = [patheffects.withStroke(linewidth=2.5, foreground="white")]
    to_data = axis.transData.inverted().transform
    bars = _bars(rows, to_pixels.transform)
    for (name, colour, size), point, box in zip(names, points, place(points, sizes, inside, bars)):
        centre = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        end = min(max(point[0], box[0]), box[2]), min(max(point[1], box[1]), box[3])
        if math.dist(point, end) > 14:
            axis.plot(*zip(*map(to_data, (point, end))), color=colour, linewidth=0.9, zorder=3)
        axis.text(
            *to_data(centre),
            name,
            color=colour,
            fontsize=size,
            ha="center",
            va="center",
            zorder=5,
            path_effects=outline,
        )


def _bars(rows: Sequence[Mapping[str, Any]], to_pixels: Any) -> list[Box]:
    """The error bars as boxes of no width."""
    found = []
    for row in rows:
        x, y, dx, dy = (float(row[name]) for name in ("kl_k3", "gold_reward", "kl_k3_se", "gold_reward_se"))
        for low, high in (((max(0.0, x - dx), y), (x + dx, y)), ((x, y - dy), (x, y + dy))):
            found.append((*map(float, to_pixels(low)), *map(float, to_pixels(high))))
    return found


def frontiers(rows: Sequence[Mapping[str, Any]], sft: float, path: Path) -> None:
    """Gold reward over KL along each method's coefficient, a panel for each family; the axes are shared."""
    from matplotlib import pyplot

    families = [family for family in FAMILIES if any(row["family"] == family for row in rows)]
    across = min(4, len(families))
    down = math.ceil(len(families) / across)
    figure, panels = _figure(
        down,
        across,
        figsize=(4.6 * across, 4.4 * down),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    largest = max(0.5, max(point["kl_k3"] for row in rows for point in row["frontier"]))
    for family, axis in zip(families, panels.flat):
        own = [row for row in rows if row["family"] == family]
        colours = pyplot.get_cmap("tab20")
        for i, row in enumerate(own):
            points = sorted(row["frontier"], key=lambda point: point["kl_k3"])
            xs, ys = [p["kl_k3"] for p in points], [p["gold_reward"] for p in points]
            errors = {"xerr": [p["kl_k3_se"] for p in points], "yerr": [p["gold_reward_se"] for p in points]}
            axis.errorbar(
                xs,
                ys,
                **errors,
                marker="o",
                markersize=4,
                elinewidth=0.7,
                color=colours(i % 20),
                label=row["shown"],
            )
        axis.axhline(sft, color="#888888", linestyle="--", linewidth=1)
        axis.set_title(family, fontsize=13, color=FAMILIES[family])
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, loc="lower right")
        _root_axis(axis, largest, _FEW_TICKS)
    for axis in list(panels.flat)[len(families) :]:
        axis.set_visible(False)
    figure.supxlabel("KL(policy, SFT), nats per sequence (root scale)")
    figure.supylabel("gold reward of fresh samples")
    figure.savefig(path, dpi=120, format="png")
    pyplot.close(figure)
