"""One comparison of systems for people to read: Markdown, a self-contained page, a terminal table.

Every text is tidied once, when a comparison comes in, and escaped once, where a block is written.
"""

from __future__ import annotations

import base64
import io
import math
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from html import escape
from typing import Any, NamedTuple

NONE = "\N{EN DASH}"
SIGNIFICANT = 0.05
WORDS = {"system", "verdict", "source", "what", "value"}  # columns that hold no numbers
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
# An image cannot see the page's colours: in the dark it is inverted and its hues turned back.
STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1b1b; --line: #ccc; --soft: #f3f3f3 }
body { max-width: 76rem; margin: 0 auto; padding: 1rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
.scroll, pre { overflow-x: auto; border: 1px solid var(--line); border-radius: .4rem }
pre { padding: .7rem; background: var(--soft) }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; white-space: nowrap; overflow-wrap: normal }
th { background: var(--soft); white-space: normal }
.words { min-width: 8rem; max-width: 24rem; text-align: left; white-space: normal;
  overflow-wrap: anywhere }
figure { display: inline-block; width: 35rem; max-width: 100%; margin: 0 1rem 1rem 0;
  vertical-align: top }
img { display: block; width: 100%; min-width: 29rem }
@media (prefers-color-scheme: dark) {
  :root { --paper: #141414; --ink: #e8e8e8; --line: #484848; --soft: #242424 }
  img { filter: invert(.92) hue-rotate(180deg) }
}"""

Writer = Callable[[Any], str]
Column = tuple[str, str, Writer]  # its name, the path of its values in a system, how to write one
System = dict[str, Any]
Series = list[tuple[System, list[tuple[float, float]]]]  # ascending points of each system


class Code(str):
    """Lines to be read as they are."""


class Table(NamedTuple):
    title: str
    header: list[str]
    rows: list[list[str]]


class Plot(NamedTuple):
    caption: str
    alt: str
    svg: bytes


Block = str | list[str] | Table  # a list is bulleted


def _writer(spec: str, scale: float = 1) -> Writer:
    return lambda value: NONE if value is None else format(scale * value, spec)


_count, _tenths, _hundredths, _four = map(_writer, (",.0f", ",.1f", ",.2f", ",.4f"))
_percent, _points = _writer(".2f", 100), _writer("+.2f", 100)


def _plain(value: Any) -> str:
    return NONE if value is None else str(value)


def _size(value: float | None) -> str:
    if value is None:
        return NONE
    power = min(int(math.log10(max(value, 1)) // 3), 3)
    return f"{_speed(value / 1000**power)} {('B', 'kB', 'MB', 'GB')[power]}"


def _speed(value: float) -> str:
    return f"{value:,.1f}".removesuffix(".0")


def _p(value: float | None) -> str:
    return "< 0.0001" if value is not None and value < 0.0001 else _four(value)


def _range(bounds: Sequence[float | None] | None, write: Writer) -> str:
    return " to ".join(map(write, bounds or [None]))


def _ranged(key: str, bounds: str, write: Writer) -> Writer:
    """Writes a value of a dict, and its range in brackets."""

    def cell(values: dict[str, Any] | None) -> str:
        if not values or values.get(key) is None:
            return NONE
        return f"{write(values[key])} ({_range(values.get(bounds), write)})"

    return cell


_accuracy_cell = _ranged("accuracy", "accuracy_interval_95", _percent)
_difference_cell = _ranged("difference", "interval_95", _points)
_speed_cell = _ranged("documents_per_second", "documents_per_second_range", _tenths)
SUMMARY: list[Column] = [
    ("accuracy, % (95 % interval)", "test", _accuracy_cell),
    ("verdict", "verdict", _plain),
    ("documents/s", "speed.best.documents_per_second", _tenths),
    ("on disk", "bytes_on_disk", _size),
    ("training, s", "train_seconds", _tenths),
]
QUALITY: list[Column] = [
    ("accuracy, % (95 % interval)", "test", _accuracy_cell),
    ("macro F1, %", "test.macro_f1", _percent),
    ("log loss", "test.log_loss", _four),
    ("calibration error", "test.calibration_error", _four),
    ("difference, points (95 % interval)", "versus_reference", _difference_cell),
    ("only this right", "versus_reference.only_this_right", _count),
    ("only reference right", "versus_reference.only_reference_right", _count),
    ("McNemar p", "versus_reference.mcnemar_p", _p),
    ("verdict", "verdict", _plain),
]
CITED: list[Column] = [
    ("cited accuracy, %", "cited.accuracy", _percent),
    ("source", "cited.source", _plain),
]
SIZE: list[Column] = [
    ("parameters", "parameters", _count),
    ("MACs per token", "macs_per_token", _count),
    ("bytes on disk", "bytes_on_disk", _count),
    ("training, s", "train_seconds", _tenths),
    ("training threads", "train_threads", _count),
    ("training peak memory, MiB", "train_peak_memory_mb", _count),
]
SPEED: list[Column] = [
    ("documents/s, batch 1", "speed.1", _speed_cell),
    ("tokens/s, batch 1", "speed.1.tokens_per_second", _count),
    ("documents/s, batch 32", "speed.32", _speed_cell),
    ("tokens/s, batch 32", "speed.32.tokens_per_second", _count),
    ("documents/s, best batch", "speed.best", _speed_cell),
    ("tokens/s, best batch", "speed.best.tokens_per_second", _count),
    ("latency p50, ms", "speed.latency_p50_ms", _hundredths),
    ("latency p99, ms", "speed.latency_p99_ms", _hundredths),
    ("latency n", "speed.latency_n", _count),
    ("scoring peak memory, MiB", "speed.peak_memory_mb", _count),
]


def to_markdown(comparison: dict[str, Any]) -> str:
    """The comparison as Markdown, without the plots."""
    comparison = _tidy(comparison)
    parts = [f"# {_markdown(_title(comparison))}"]
    for heading, blocks in _sections(comparison):
        parts += [f"## {heading}", *map(_markdown_block, blocks)]
    return "\n\n".join(parts) + "\n"


def to_html(comparison: dict[str, Any]) -> str:
    """The comparison as one page that needs nothing from outside itself."""
    comparison = _tidy(comparison)
    sections: list[tuple[str, Sequence[Block | Plot]]] = [*_sections(comparison)]
    if plots := _plots(_ranked(comparison)):
        sections.insert(1, ("Plots", plots))
    title = escape(_title(comparison))
    body = "\n".join(
        "\n".join([f"<h2>{heading}</h2>", *map(_html_block, blocks)])
        for heading, blocks in sections
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{STYLE}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def print_table(comparison: dict[str, Any]) -> None:
    """Print the figures that most people ask for to stderr."""
    comparison = _tidy(comparison)
    _, header, rows = _table("", _ranked(comparison), SUMMARY)
    rows = [[_short(cell, 40) for cell in row] for row in rows]
    from rich import box, console, table, text

    shown = table.Table(box=box.SIMPLE, pad_edge=False)
    for name in header:
        shown.add_column(name, justify="left" if name in WORDS else "right", overflow="fold")
    for row in rows:
        shown.add_row(*map(text.Text, row))  # a plain string would be read as markup
    width = None if sys.stderr.isatty() else 120  # a log file has no width of its own
    console.Console(stderr=True, width=width).print(shown)


def _title(comparison: dict[str, Any]) -> str:
    return f"Text classifiers compared on {comparison['dataset']}"


def _sections(comparison: dict[str, Any]) -> list[tuple[str, list[Block]]]:
    systems = _ranked(comparison)
    curve = _curve_table(systems)
    learning: list[tuple[str, list[Block]]] = [("Learning curve", [curve])] if curve else []
    return [
        ("In short", [_headline(systems, comparison["reference"])]),
        ("Accuracy", _quality(comparison, systems)),
        *learning,
        ("Cost", _cost(comparison["timing"], systems)),
        ("How each system was tuned", [[_tuning(system) for system in systems]]),
        ("Data and environment", [_conditions(comparison)]),
        ("Command", [Code(comparison["command"])]),
        *([("Notes", [comparison["notes"]])] if comparison["notes"] else []),
    ]


def _headline(systems: Sequence[System], reference: str) -> list[str]:
    """What follows from the numbers, a sentence each."""
    tested = [system for system in systems if _accuracy(system) is not None]
    said = [_best(tested)] if tested else ["No system was tested."]
    bounds = _bounds(tested[0], "test.accuracy_interval_95") if tested else None
    near = [system for system in tested if bounds and _accuracy(system) >= bounds[0]]
    if len(near) > 1:
        said.append(_fastest(f"Fastest of the {len(near)} within that interval", near))
    if len(tested) > 1:
        said.append(_fastest(f"Fastest of all {len(tested)}", tested))
    for word in ("better", "no real difference", "worse"):
        if group := [system for system in tested if system["verdict"] == word]:
            said.append(f"{word.capitalize()} against {reference}: {_names(group)}.")
    if failed := [system for system in systems if system["error"]]:
        said.append(f"Could not be trained: {_names(failed)}.")
    return [*filter(None, said)]


def _best(tested: Sequence[System]) -> str:
    test = tested[0]["test"]
    best = [system for system in tested if _accuracy(system) == test["accuracy"]]
    title = f"Most accurate of {len(tested)} systems tested" if len(tested) > 1 else "Tested"
    share = f"{_percent(test['accuracy'])} % of {_count(test['n'])} test examples"
    interval = _range(test["accuracy_interval_95"], _percent)
    return f"{title}: {_names(best)}, right on {share} (95 % interval {interval})."


def _fastest(title: str, systems: Sequence[System]) -> str:
    """Names the fastest, and those whose range over rounds overlaps the range of the fastest."""
    path = "speed.best.documents_per_second"
    timed = [system for system in systems if _at(system, path) is not None]
    if not timed:
        return ""
    best = max(timed, key=lambda system: _at(system, path))
    low, _ = _bounds(best, f"{path}_range") or (math.inf, math.inf)
    near = [s for s in timed if s is not best and (_bounds(s, f"{path}_range") or [0, 0])[1] >= low]
    also = f"; the range of {_names(near)} overlaps" if near else ""
    speed = f"{_speed_cell(best['speed']['best'])} documents/s"
    return f"{title}: {_names([best])}, {speed}, {_percent(_accuracy(best))} % accuracy{also}."


def _quality(comparison: dict[str, Any], systems: Sequence[System]) -> list[Block]:
    blocks: list[Block] = [
        _table("Quality on the test examples", systems, QUALITY),
        "Intervals are over test examples, for one training run each (seed "
        f"{comparison['seed']}); what another seed would change is not in them.",
    ]
    if any(system["versus_reference"] for system in systems):
        blocks.append(
            f"Differences and verdicts are against {comparison['reference']} on the same test "
            f"examples: better or worse where McNemar's test gives p < {SIGNIFICANT}. No "
            "correction for multiple comparisons is made: of twenty systems exactly as good as "
            "the reference, about one would be called better or worse."
        )
    if cited := [system for system in systems if system["cited"]]:
        blocks += [
            "Cited from the literature, not measured here, and in no ranking. These systems were "
            "timed with random weights:",
            _table("Cited accuracies", cited, CITED),
        ]
    return blocks


def _cost(timing: dict[str, Any] | None, systems: Sequence[System]) -> list[Block]:
    blocks: list[Block] = [
        _table("Size and training", systems, SIZE),
        _table("Scoring speed", systems, SPEED),
    ]
    if timing:
        blocks.append(
            f"Scoring, tokenization included: {_count(timing['rounds'])} rounds (their range in "
            f"brackets), {_count(timing['threads'])} threads, {_count(timing['documents'])} "
            f"documents of {_tenths(timing['mean_tokens'])} tokens on average."
        )
    if timing and timing["left_out"]:
        blocks += ["What the timer leaves out:", timing["left_out"]]
    return blocks


def _curve_table(systems: Sequence[System]) -> Table | None:
    """Test accuracy for each number of labelled examples that systems were trained on."""
    curves = {
        s["number"]: {p["examples"]: p["accuracy"] for p in s["curve"] or []} for s in systems
    }
    sizes = sorted({size for curve in curves.values() for size in curve})
    rows = [
        [str(s["number"]), s["name"], *(_percent(curves[s["number"]].get(n)) for n in sizes)]
        for s in systems
        if curves[s["number"]]
    ]
    header = ["no.", "system", *(f"{_count(size)} examples" for size in sizes)]
    title = "Test accuracy, %, by labelled examples (training and validation)"
    return Table(title, header, rows) if rows else None


def _tuning(system: System) -> str:
    said = (
        f"{system['number']} · {system['name']} ({system['kind']}): {_plain(system['description'])}"
    )
    if system["settings"]:
        settings = (f"{key} = {_plain(value)}" for key, value in system["settings"].items())
        said += f" Settings: {', '.join(settings)}."
    if (accuracy := _at(system, "validation.accuracy")) is not None:
        said += f" Validation accuracy: {_percent(accuracy)} %."
    return said + (f" Could not be trained: {system['error']}" if system["error"] else "")


def _conditions(comparison: dict[str, Any]) -> Table:
    labels, environment = comparison["label_names"], dict(comparison["environment"])
    sizes = {k: _count(comparison[k]) for k in comparison if k.endswith("_examples")}
    keys = ("data_source", "data_fingerprint", "seed", "precision")
    pairs = {
        **{key: comparison[key] for key in keys},
        **sizes,
        f"{len(labels)} classes": ", ".join(labels),
        "versions": ", ".join(f"{k} {v}" for k, v in environment.pop("versions").items()),
        **environment,
    }
    rows = [[key.replace("_", " "), _plain(value)] for key, value in pairs.items()]
    return Table("Data and environment", ["what", "value"], rows)


def _verdict(system: System, reference: str) -> str:
    if system["error"]:
        return "could not be trained"
    if system["name"] == reference:
        return "reference"
    p, difference = (_at(system, f"versus_reference.{key}") for key in ("mcnemar_p", "difference"))
    if p is None or difference is None:
        return NONE
    if p >= SIGNIFICANT or difference == 0:
        return "no real difference"
    return "better" if difference > 0 else "worse"


def _ranked(comparison: dict[str, Any]) -> list[System]:
    """The systems, numbered: most accurate first, those without a measured accuracy last."""
    systems = sorted(
        comparison["systems"], key=lambda s: (_accuracy(s) is None, -(_accuracy(s) or 0))
    )
    return [
        {**system, "number": number, "verdict": _verdict(system, comparison["reference"])}
        for number, system in enumerate(systems, 1)
    ]


def _at(values: Any, path: str) -> Any:
    for key in path.split("."):
        values = None if values is None else values.get(key)
    return values


def _bounds(values: Any, path: str) -> Any:
    bounds = _at(values, path)
    return bounds if bounds and None not in bounds else None


def _accuracy(system: System) -> Any:
    return _at(system, "test.accuracy")


def _names(systems: Sequence[System]) -> str:
    return ", ".join(system["name"] for system in systems)


def _table(title: str, systems: Sequence[System], columns: Sequence[Column]) -> Table:
    rows = [
        [str(s["number"]), s["name"], *(write(_at(s, path)) for _, path, write in columns)]
        for s in systems
    ]
    return Table(title, ["no.", "system", *(name for name, _, _ in columns)], rows)


def _tidy(value: Any) -> Any:
    """The same without NaN, infinity and characters that could take over a terminal."""
    if isinstance(value, dict):
        return {_tidy(key): _tidy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_tidy(item) for item in value]
    if isinstance(value, str):
        spaced = (c if c == "\n" else " " if c.isspace() else c for c in value)
        return "".join(c if c == "\n" or c.isprintable() else "\ufffd" for c in spaced)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _markdown(text: str) -> str:
    text = escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]#|~$])", r"\\\1", text)


def _markdown_block(block: Block) -> str:
    if isinstance(block, Code):
        fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", block))])
        return f"{fence}\n{block}\n{fence}"
    if isinstance(block, str):
        return _markdown(block)
    if isinstance(block, Table):
        rule = ["---" if name in WORDS else "---:" for name in block.header]
        header, *rows = ([*map(_markdown, row)] for row in (block.header, *block.rows))
        return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))
    return "\n".join(f"- {_markdown(item)}" for item in block)


def _html_block(block: Block | Plot) -> str:
    if isinstance(block, str):
        tag = "pre" if isinstance(block, Code) else "p"
        return f"<{tag}>{escape(block)}</{tag}>"
    if isinstance(block, Plot):
        source = f"data:image/svg+xml;base64,{base64.b64encode(block.svg).decode()}"
        image = f'<img src="{source}" alt="{escape(block.alt)}">'
        caption = f"<figcaption>{escape(block.caption)}</figcaption>"
        return f'<figure>\n<div class="scroll" tabindex="0">{image}</div>\n{caption}\n</figure>'
    if isinstance(block, Table):
        kinds = [' class="words"' if name in WORDS else "" for name in block.header]
        rows = [_row("th", kinds, block.header), *(_row("td", kinds, row) for row in block.rows)]
        table = "\n".join(["<table>", *rows, "</table>"])
        return f'<h3>{block.title}</h3>\n<div class="scroll" tabindex="0">\n{table}\n</div>'
    return "<ul>\n" + "\n".join(f"<li>{escape(item)}</li>" for item in block) + "\n</ul>"


def _row(tag: str, kinds: Sequence[str], cells: Sequence[str]) -> str:
    pairs = zip(kinds, cells, strict=True)
    return f"<tr>{''.join(f'<{tag}{kind}>{escape(cell)}</{tag}>' for kind, cell in pairs)}</tr>"


def _plots(systems: Sequence[System]) -> list[Plot]:
    """Accuracy against two costs, and, where it was measured, training examples and length."""
    plots = []
    for path, label, write in (
        ("speed.best.documents_per_second", "documents per second, best batch size", _speed),
        ("bytes_on_disk", "size on disk", _size),
    ):
        costs = [(s, _at(s, path), _accuracy(s), _at(s, "cited.accuracy")) for s in systems]
        points = [(s, [(x, cited if y is None else y)]) for s, x, y, cited in costs if x]
        plots.append(_plot(points, label, write))
    curves: Series = [
        (s, sorted((p["examples"], p["accuracy"]) for p in s["curve"] or [])) for s in systems
    ]
    if any(len(points) > 1 for _, points in curves):
        plots.append(_plot(curves, "labelled examples", _count))
    sizes = {(b["from"], b["to"]): b["n"] for s in systems for b in s["by_length"] or []}
    bins = sorted(sizes)
    names = [f"{low:,} to\n{high:,}\n(n = {sizes[low, high]:,})" for low, high in bins]
    lengths: Series = [
        (s, sorted((bins.index((b["from"], b["to"])), b["accuracy"]) for b in s["by_length"] or []))
        for s in systems
    ]
    plots.append(_plot(lengths, "tokens of the text", lambda x: names[int(x)], len(bins)))
    return [plot for plot in plots if plot]


def _plot(series: Series, label: str, write: Writer, bins: int = 0) -> Plot | None:
    """Test accuracy against something: a point or a line for each system.

    Args:
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
    if any(_accuracy(system) is None for system, _ in series):
        caption += " Hollow: cited from the literature, not measured here."
    said = [
        f"{_label(system)}: {' to '.join(f'{y:.2f} % at {write(x)}' for x, y in ends)}"
        for system, ends in ((s, dict.fromkeys((p[0], p[-1]))) for s, p in series)
    ]
    return Plot(caption, " ".join(f"{caption} {'; '.join(said)}.".split()), svg.getvalue())


def _label(system: System) -> str:
    cited = " (cited)" if _accuracy(system) is None else ""
    return f"{system['number']} {_short(system['name'], 32)}{cited}"


def _draw(axis: Any, series: Series) -> list[tuple[float, float]]:
    """Draw lines, or single points with their intervals, and return places on the intervals."""
    intervals = []
    kinds: Counter[str] = Counter()
    lone = all(len(points) == 1 for _, points in series)
    for system, points in series:
        kind, cited = system["kind"], _accuracy(system) is None
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
        interval = _bounds(system, "test.accuracy_interval_95")
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
