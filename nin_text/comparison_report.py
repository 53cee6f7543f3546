"""One comparison of systems for people to read: Markdown, a self-contained page, a terminal table.

Every text is tidied once, when a comparison comes in, and escaped once, where a block is written.
"""

from __future__ import annotations

import base64
import math
import re
import sys
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

from nin_text.comparison_plots import (
    NONE,
    Plot,
    System,
    Writer,
    accuracy_of,
    as_count,
    as_four,
    as_hundredths,
    as_percent,
    as_points,
    as_size,
    as_tenths,
    bounds_at,
    plots_of,
    shortened,
    value_at,
)

SIGNIFICANT = 0.05
WORDS = {"system", "verdict", "source", "what", "value"}  # columns that hold no numbers
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

Column = tuple[str, str, Writer]  # its name, the path of its values in a system, how to write one


class Code(str):
    """Lines to be read as they are."""


class Table(NamedTuple):
    title: str
    header: list[str]
    rows: list[list[str]]


Block = str | list[str] | Table  # a list is bulleted


def _plain(value: Any) -> str:
    return NONE if value is None else str(value)


def _p(value: float | None) -> str:
    return "< 0.0001" if value is not None and value < 0.0001 else as_four(value)


def _range(bounds: Sequence[float | None] | None, write: Writer) -> str:
    return " to ".join(map(write, bounds or [None]))


def _ranged(key: str, bounds: str, write: Writer) -> Writer:
    """Writes a value of a dict, and its range in brackets."""

    def cell(values: dict[str, Any] | None) -> str:
        if not values or values.get(key) is None:
            return NONE
        return f"{write(values[key])} ({_range(values.get(bounds), write)})"

    return cell


_accuracy_cell = _ranged("accuracy", "accuracy_interval_95", as_percent)
_difference_cell = _ranged("difference", "interval_95", as_points)
_speed_cell = _ranged("documents_per_second", "documents_per_second_range", as_tenths)
SUMMARY: list[Column] = [
    ("accuracy, % (95 % interval)", "test", _accuracy_cell),
    ("verdict", "verdict", _plain),
    ("documents/s", "speed.best.documents_per_second", as_tenths),
    ("on disk", "bytes_on_disk", as_size),
    ("training, s", "train_seconds", as_tenths),
]
QUALITY: list[Column] = [
    ("accuracy, % (95 % interval)", "test", _accuracy_cell),
    ("macro F1, %", "test.macro_f1", as_percent),
    ("log loss", "test.log_loss", as_four),
    ("calibration error", "test.calibration_error", as_four),
    ("difference, points (95 % interval)", "versus_reference", _difference_cell),
    ("only this right", "versus_reference.only_this_right", as_count),
    ("only reference right", "versus_reference.only_reference_right", as_count),
    ("McNemar p", "versus_reference.mcnemar_p", _p),
    ("verdict", "verdict", _plain),
]
CITED: list[Column] = [
    ("cited accuracy, %", "cited.accuracy", as_percent),
    ("source", "cited.source", _plain),
]
SIZE: list[Column] = [
    ("parameters", "parameters", as_count),
    ("MACs per token", "macs_per_token", as_count),
    ("bytes on disk", "bytes_on_disk", as_count),
    ("training, s", "train_seconds", as_tenths),
    ("training threads", "train_threads", as_count),
    ("training peak memory, MiB", "train_peak_memory_mb", as_count),
]
SPEED: list[Column] = [
    ("documents/s, batch 1", "speed.1", _speed_cell),
    ("tokens/s, batch 1", "speed.1.tokens_per_second", as_count),
    ("documents/s, batch 32", "speed.32", _speed_cell),
    ("tokens/s, batch 32", "speed.32.tokens_per_second", as_count),
    ("documents/s, best batch", "speed.best", _speed_cell),
    ("tokens/s, best batch", "speed.best.tokens_per_second", as_count),
    ("latency p50, ms", "speed.latency_p50_ms", as_hundredths),
    ("latency p99, ms", "speed.latency_p99_ms", as_hundredths),
    ("latency n", "speed.latency_n", as_count),
    ("scoring peak memory, MiB", "speed.peak_memory_mb", as_count),
]


def to_markdown(comparison: dict[str, Any]) -> str:
    """The comparison as Markdown, without the plots."""
    comparison = _tidy(comparison)
    parts = [f"# {_markdown(_title(comparison))}"]
    for heading, blocks in _sections(comparison):
        parts += [f"## {heading}", *map(_markdown_block, blocks)]
    return "\n\n".join(parts) + "\n"


def to_plots(comparison: dict[str, Any]) -> list[Plot]:
    """The plots of the page, one by one."""
    return plots_of(_ranked(_tidy(comparison)))


def to_html(comparison: dict[str, Any], plots: Sequence[Plot]) -> str:
    """The comparison with its plots as one page that needs nothing from outside itself."""
    comparison = _tidy(comparison)
    sections: list[tuple[str, Sequence[Block | Plot]]] = [*_sections(comparison)]
    if plots:
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
    rows = [[shortened(cell, 40) for cell in row] for row in rows]
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
    tested = [system for system in systems if accuracy_of(system) is not None]
    said = [_best(tested)] if tested else ["No system was tested."]
    bounds = bounds_at(tested[0], "test.accuracy_interval_95") if tested else None
    near = [system for system in tested if bounds and accuracy_of(system) >= bounds[0]]
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
    best = [system for system in tested if accuracy_of(system) == test["accuracy"]]
    title = f"Most accurate of {len(tested)} systems tested" if len(tested) > 1 else "Tested"
    share = f"{as_percent(test['accuracy'])} % of {as_count(test['n'])} test examples"
    interval = _range(test["accuracy_interval_95"], as_percent)
    return f"{title}: {_names(best)}, right on {share} (95 % interval {interval})."


def _fastest(title: str, systems: Sequence[System]) -> str:
    """Names the fastest, and those whose range over rounds overlaps the range of the fastest."""
    path = "speed.best.documents_per_second"
    timed = [system for system in systems if value_at(system, path) is not None]
    if not timed:
        return ""
    best = max(timed, key=lambda system: value_at(system, path))
    low, _ = bounds_at(best, f"{path}_range") or (math.inf, math.inf)
    near = [
        s for s in timed if s is not best and (bounds_at(s, f"{path}_range") or [0, 0])[1] >= low
    ]
    also = f"; the range of {_names(near)} overlaps" if near else ""
    speed = f"{_speed_cell(best['speed']['best'])} documents/s"
    return f"{title}: {_names([best])}, {speed}, {as_percent(accuracy_of(best))} % accuracy{also}."


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
            f"Scoring, tokenization included: {as_count(timing['rounds'])} rounds (their range in "
            f"brackets), {as_count(timing['threads'])} threads, {as_count(timing['documents'])} "
            f"documents of {as_tenths(timing['mean_tokens'])} tokens on average."
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
        [str(s["number"]), s["name"], *(as_percent(curves[s["number"]].get(n)) for n in sizes)]
        for s in systems
        if curves[s["number"]]
    ]
    header = ["no.", "system", *(f"{as_count(size)} examples" for size in sizes)]
    title = "Test accuracy, %, by labelled examples (training and validation)"
    return Table(title, header, rows) if rows else None


def _tuning(system: System) -> str:
    said = (
        f"{system['number']} · {system['name']} ({system['kind']}): {_plain(system['description'])}"
    )
    if system["settings"]:
        settings = (f"{key} = {_plain(value)}" for key, value in system["settings"].items())
        said += f" Settings: {', '.join(settings)}."
    if (accuracy := value_at(system, "validation.accuracy")) is not None:
        said += f" Validation accuracy: {as_percent(accuracy)} %."
    return said + (f" Could not be trained: {system['error']}" if system["error"] else "")


def _conditions(comparison: dict[str, Any]) -> Table:
    labels, environment = comparison["label_names"], dict(comparison["environment"])
    sizes = {k: as_count(comparison[k]) for k in comparison if k.endswith("_examples")}
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
    p, difference = (
        value_at(system, f"versus_reference.{key}") for key in ("mcnemar_p", "difference")
    )
    if p is None or difference is None:
        return NONE
    if p >= SIGNIFICANT or difference == 0:
        return "no real difference"
    return "better" if difference > 0 else "worse"


def _ranked(comparison: dict[str, Any]) -> list[System]:
    """The systems, numbered: most accurate first, those without a measured accuracy last."""
    systems = sorted(
        comparison["systems"], key=lambda s: (accuracy_of(s) is None, -(accuracy_of(s) or 0))
    )
    return [
        {**system, "number": number, "verdict": _verdict(system, comparison["reference"])}
        for number, system in enumerate(systems, 1)
    ]


def _names(systems: Sequence[System]) -> str:
    return ", ".join(system["name"] for system in systems)


def _table(title: str, systems: Sequence[System], columns: Sequence[Column]) -> Table:
    rows = [
        [str(s["number"]), s["name"], *(write(value_at(s, path)) for _, path, write in columns)]
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
