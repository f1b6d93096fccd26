"""What `scripts/bench --plots` does: two curves for docs/performance.md, each drawn as a small SVG."""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path

from bench_table import OURS, UPSTREAM, progress, run, servers

DOCS = Path(__file__).resolve().parent.parent / "docs"
BACKLOGS = (0, 1_000, 10_000, 100_000, 1_000_000)
BATCHES = (10, 25, 50, 100, 250, 500)
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 300, 70, 50, 40
COLOURS = ("#1f5fa8", "#b0562c")

Curve = list[tuple[float, float]]


def main(rounds: int) -> int:
    cost: Curve = [(max(backlog, 100), 0.0) for backlog in BACKLOGS]
    times: list[list[float]] = [[] for _ in BACKLOGS]
    for round_ in range(rounds):
        for place, backlog in enumerate(BACKLOGS):
            progress("cost against backlog", round_ * len(BACKLOGS) + place, rounds * len(BACKLOGS))
            times[place].append(run(f"track:{backlog}" if backlog else "track", OURS, ""))
    cost = [(x, statistics.median(each)) for (x, _), each in zip(cost, times)]
    labels = ["0" if not backlog else f"{backlog:,}" for backlog in BACKLOGS]
    draw("backlog.svg", "Microseconds for a call of track()", "events waiting", {"segment-durable": cost}, labels)

    curves: dict[str, Curve] = {}
    for library, name in ((OURS, "segment-durable"), (UPSTREAM, "segment-analytics-python")):
        curves[name] = []
        for place, size in enumerate(BATCHES):
            progress(f"throughput against batch size, {name}", place, len(BATCHES))
            rates = []
            for _ in range(rounds):
                with servers(True) as url:
                    rates.append(run(f"end_to_end_1:{size}", library, url))
            curves[name].append((size, statistics.median(rates)))
    labels = [str(size) for size in BATCHES]
    draw("batch.svg", "Events a second, tracked and delivered by one caller", "upload_size", curves, labels)
    print(f"wrote {DOCS / 'backlog.svg'} and {DOCS / 'batch.svg'}", file=sys.stderr)
    return 0


def draw(file: str, title: str, below: str, curves: dict[str, Curve], labels: list[str]) -> None:
    """A line chart with a logarithmic axis below and one from 0 at the left."""
    first = next(iter(curves.values()))
    low, high = math.log(first[0][0]), math.log(first[-1][0])
    top = nice(max(y for curve in curves.values() for _, y in curve))

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (math.log(x) - low) / (high - low) * (WIDTH - LEFT - 30)
        return round(across, 1), round(HEIGHT - BOTTOM - y / top * (HEIGHT - BOTTOM - TOP), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="14">{title}</text>',
        f'<text x="{WIDTH - 30}" y="{HEIGHT - 10}" text-anchor="end">{below}</text>',
    ]
    for step in range(5):
        value = top * step / 4
        _, y = place(first[0][0], value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 30}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{value:,.0f}</text>')
    for (x, _), label in zip(first, labels):
        across, _ = place(x, 0)
        parts.append(f'<text x="{across}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{label}</text>')
    for number, ((name, curve), colour) in enumerate(zip(curves.items(), COLOURS)):
        points = [place(x, y) for x, y in curve]
        line = " ".join(f"{x},{y}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in points]
        parts.append(f'<text x="{LEFT + 10 + number * 200}" y="36" fill="{colour}">{name}</text>')
    (DOCS / file).write_text("\n".join([*parts, "</svg>"]) + "\n")


def nice(value: float) -> float:
    """The next number above that is easy to divide by four."""
    unit = 10 ** math.floor(math.log10(value))
    return next(each * unit for each in (1, 2, 4, 8, 10, 20) if each * unit >= value)
