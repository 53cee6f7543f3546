"""Plots of a comparison, as SVG, and how its figures are written.

Accuracy against throughput, size, parameters, training time, labelled examples and length of text.
Figures and looks are those of the tables in `comparison_report.py`: the same numbers, one colour
and marker for each kind.
"""

from __future__ import annotations

import io
import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

NONE = "\N{EN DASH}"
LOOKS = {  # kind: colour (Okabe and Ito's, told apart by the colour-blind) and marker
    "nin": ("#d55e00", "o"),
    "network": ("#0072b2", "s"),
    "fine-tuned": ("#009e73", "^"),
    "frozen": ("#cc79a7", "D"),
    "linear": ("#56b4e9", "v"),
    "fasttext": ("#e69f00", "P"),
    "architecture": ("#666666", "X"),
}
LINES = ("-", "--", ":", "-.", (0, (8, 2, 1, 2, 1, 2)))

Writer = Callable[[Any], str]
System = dict[str, Any]
Series = list[tuple[System, list[tuple[float, float]]]]  # ascending points of each system


class Plot(NamedTuple):
    name: str  # that its file gets
    caption: str
    alt: str
    svg: bytes


def writer(spec: str, scale: float = 1) -> Writer:
    return lambda value: NONE if value is None else format(scale * value, spec)


as_count, as_tenths, as_hundredths, as_four = map(writer, (",.0f", ",.1f", ",.2f", ",.4f"))
as_percent, as_points = writer(".2f", 100), writer("+.2f", 100)


def as_size(value: float | None) -> str:
    return NONE if value is None else f"{as_thousands(value)}B"


def as_thousands(value: float) -> str:
    """A number with the letter of its thousands: 20 M."""
    power = min(int(math.log10(max(value, 1)) // 3), 3)
    return f"{as_speed(value / 1000**power)} {('', 'k', 'M', 'G')[power]}"


def as_speed(value: float) -> str:
    return f"{value:,.1f}".removesuffix(".0")


def value_at(values: Any, path: str) -> Any:
    for key in path.split("."):
        values = None if values is None else values.get(key)
    return values


def bounds_at(values: Any, path: str) -> Any:
    bounds = value_at(values, path)
    return bounds if bounds and None not in bounds else None


def accuracy_of(system: System) -> Any:
    return value_at(system, "test.accuracy")


def shortened(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


COSTS: tuple[tuple[str, str, str, Writer], ...] = (
    ("speed.best.documents_per_second", "throughput", "documents per second, best batch", as_speed),
    ("bytes_on_disk", "size", "size on disk", as_size),
    ("parameters", "parameters", "parameters", as_thousands),
    ("train_seconds", "training", "seconds of training and tuning", as_speed),
)


def plots_of(systems: Sequence[System]) -> list[Plot]:
    """Accuracy against each cost, and, where it was measured, training examples and length."""
    plots = []
    for path, name, label, write in COSTS:
        costs = [
            (s, value_at(s, path), accuracy_of(s), value_at(s, "cited.accuracy")) for s in systems
        ]
        points = [(s, [(x, cited if y is None else y)]) for s, x, y, cited in costs if x]
        plots.append(_plot(name, points, label, write))
    curves: Series = [
        (s, sorted((p["examples"], p["accuracy"]) for p in s["curve"] or [])) for s in systems
    ]
    if any(len(points) > 1 for _, points in curves):
        plots.append(_plot("examples", curves, "labelled examples", as_count))
    sizes = {(b["from"], b["to"]): b["n"] for s in systems for b in s["by_length"] or []}
    bins = sorted(sizes)
    names = [f"{low:,} to\n{high:,}\n(n = {sizes[low, high]:,})" for low, high in bins]
    lengths: Series = [
        (s, sorted((bins.index((b["from"], b["to"])), b["accuracy"]) for b in s["by_length"] or []))
        for s in systems
    ]
    tokens = "tokens of the text"
    plots.append(_plot("length", lengths, tokens, lambda x: names[int(x)], len(bins)))
    return [plot for plot in plots if plot]


def _plot(name: str, series: Series, label: str, write: Writer, bins: int = 0) -> Plot | None:
    """Test accuracy against something: a point or a line for each system.

    Args:
        name: that its file gets.
        series: x and accuracy, which may be None.
        label: what x is.
        write: x in words.
        bins: x counts so many bins; 0 if it is a quantity, which gets a logarithmic axis.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    series = [(s, [(x, 100 * y) for x, y in points if y is not None]) for s, points in series]
    series = [(system, points) for system, points in series if points]
    if not series:
        return None
    below = (0.9 if bins else 0.6) + 0.2 * math.ceil(len(series) / 2)  # inches for the legend
    figure = Figure(figsize=(6.4, below + 3.2))
    axis = figure.add_axes((0.115, below / (below + 3.2), 0.84, 3.1 / (below + 3.2)))
    axis.set(xlabel=label, ylabel="test accuracy, %")
    axis.grid(alpha=0.3)
    axis.margins(y=0.1)
    intervals = _draw(axis, series)
    _scale(axis, [x for _, points in series for x, _ in points], write, bins)
    if all(len(points) == 1 for _, points in series):
        _number(axis, series, intervals)
    for text in figure.legend(loc="lower left", ncols=2, frameon=False, fontsize=9).get_texts():
        text.set_parse_math(False)
    svg = io.BytesIO()
    # A fixed salt and no date make the same comparison the same page.
    with rc_context({"svg.hashsalt": "nin-text"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # names may be in any script
        figure.savefig(svg, format="svg", metadata={"Date": None})

    caption = f"Test accuracy against {label}{', with 95 % intervals' if intervals else ''}."
    if any(accuracy_of(system) is None for system, _ in series):
        caption += " Hollow: cited from the literature, not measured here."
    said = [
        f"{_label(system)}: {' to '.join(f'{y:.2f} % at {write(x)}' for x, y in ends)}"
        for system, ends in ((s, dict.fromkeys((p[0], p[-1]))) for s, p in series)
    ]
    alt = " ".join(f"{caption} {'; '.join(said)}.".split())
    return Plot(name, caption, alt, svg.getvalue())


def _label(system: System) -> str:
    cited = " (cited)" if accuracy_of(system) is None else ""
    return f"{system['number']} {shortened(system['name'], 32)}{cited}"


def _draw(axis: Any, series: Series) -> list[tuple[float, float]]:
    """Draw lines, or single points with their intervals, and return places on the intervals."""
    intervals = []
    kinds: Counter[str] = Counter()
    lone = all(len(points) == 1 for _, points in series)
    for system, points in series:
        kind, cited = system["kind"], accuracy_of(system) is None
        color, marker = LOOKS.get(kind, ("#1b1b1b", "*"))
        line = LINES[kinds[kind] % len(LINES)]  # tells systems of a kind apart
        kinds[kind] += 1
        axis.plot(
            *zip(*points, strict=True),
            marker=marker,
            color=color,
            markerfacecolor="white" if cited else color,
            linestyle="" if lone else line,
            label=_label(system),
        )
        interval = bounds_at(system, "test.accuracy_interval_95")
        if lone and interval:
            x, (low, high) = points[0][0], (100 * bound for bound in interval)
            axis.plot([x, x], [low, high], color=color, alpha=0.6)
            intervals += [(x, low + (high - low) * i / 8) for i in range(9)]
    return intervals


def _scale(axis: Any, xs: Sequence[float], write: Writer, bins: int) -> None:
    from matplotlib.ticker import LogLocator

    if bins:
        axis.set_xticks(range(bins))
        axis.set_xlim(-0.3, bins - 0.5)
    else:  # at least a decade, so that at least two ticks are in it
        spread = max(1.4, math.sqrt(10 * min(xs) / max(xs)))
        decades = math.log10(max(xs) / min(xs) * spread**2)
        axis.set_xscale("log")
        axis.set_xlim(min(xs) / spread, max(xs) * spread**1.3)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1,)))
        axis.xaxis.set_minor_formatter(lambda x, _: "")
    axis.xaxis.set_major_formatter(lambda x, _: write(x))


def _number(axis: Any, series: Series, intervals: Sequence[tuple[float, float]]) -> None:
    """Write each system's number beside its point, where it hides no point, number or interval."""
    import numpy as np

    axis.set_ylim(axis.get_ylim())  # the places depend on the limits, which are final now
    scale = 72 / axis.figure.dpi  # points of type in a pixel
    inside = axis.get_window_extent().contains
    ends = [points[-1] for _, points in series]
    taken = [scale * axis.transData.transform(place) for place in (*ends, *intervals)]
    offsets = [
        radius * np.array([np.cos(angle), np.sin(angle)])
        for angles in ((0, 25, -25, 50, -50), (180, 150, 210, 90, 270))  # on the right if it fits
        for radius in (11, 19, 27)
        for angle in np.radians(angles)
    ]
    for (system, _), end, spot in zip(series, ends, taken[: len(ends)], strict=True):
        places = [offset for offset in offsets if inside(*((spot + offset) / scale))]
        room = [np.linalg.norm(np.array(taken) - spot - place, axis=1).min() for place in places]
        free = [place for place, gap in zip(places, room, strict=True) if gap >= 10]
        offset = (free or [places[np.argmax(room)]])[0]
        taken.append(spot + offset)
        line = {"arrowstyle": "-", "linewidth": 0.5} if np.hypot(*offset) > 12 else None
        at = {"textcoords": "offset points", "ha": "center", "va": "center", "fontsize": 9}
        axis.annotate(str(system["number"]), end, offset, arrowprops=line, **at)
