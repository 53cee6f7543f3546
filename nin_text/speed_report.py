"""The figures of `speed.py` as a page of Markdown, and the few that matter most."""

from __future__ import annotations

import statistics
from typing import Any

# The systems that models are compared with.
MINILM, INT8 = "MiniLM-L6, float32", "MiniLM-L6, ONNX int8"
FASTTEXT, SVM = "fastText", "TF-IDF + linear SVM"


def _rates(result: dict[str, Any], name: str, unit: str = "documents") -> list[float]:
    """Units per second of an entry in each round."""
    entry = result["entries"][name]
    return [entry[unit] / seconds for seconds in entry["seconds"]]


def ratio(result: dict[str, Any], name: str, other: str, unit: str = "documents") -> float | None:
    """Median over rounds of one rate divided by another; None if one was not measured."""
    if name not in result["entries"] or other not in result["entries"]:
        return None
    pairs = zip(_rates(result, name, unit), _rates(result, other, unit), strict=True)
    return statistics.median(a / b for a, b in pairs)


def headline(result: dict[str, Any]) -> dict[str, Any]:
    """For each model: how it compares, and how near it comes to the machine's limits."""
    found: dict[str, Any] = {}
    for name, about in result["models"].items():
        latency, tokenize = (
            statistics.median(result["entries"][entry]["latencies"]) * 1000
            for entry in (name, f"{name}: tokenize")
        )
        found[name] = {
            "documents_per_second": statistics.median(_rates(result, name)),
            "tokens_per_second": statistics.median(_rates(result, name, "tokens")),
            "of_its_tokenizer_alone": ratio(result, name, f"{name}: its tokenizer"),
            "of_padded_batches": ratio(result, name, f"{name}, padded batches"),
            "of_minilm_float32": ratio(result, name, MINILM),
            "of_minilm_int8": ratio(result, name, INT8),
            "of_fasttext": ratio(result, name, FASTTEXT),
            "of_svm": ratio(result, name, SVM),
            "share_of_peak": share_of_peak(result, name, "network", "defined"),
            "share_of_peak_done": share_of_peak(result, name, "network", "done"),
            "training_share_of_peak": share_of_peak(result, name, "training", "defined"),
            "latency_p50_ms": latency,
            "latency_beyond_tokenizing_ms": latency - tokenize,
            "cold_seconds": statistics.median(cold for _, cold in result["cold"][name]),
            "peak_memory_mb": max(result["memory"][name].values()),
            "bytes": about["bytes"],
        }
    return found


def share_of_peak(result: dict[str, Any], name: str, stage: str, which: str) -> float:
    """Operations of matrix products a second as a share of what a plain product reaches.

    Args:
        result: of a benchmark.
        name: of the model.
        stage: "network" or "training", whose operations are three times as many.
        which: "defined" counts the products of the definition, "done" those that remain when the
            convolution is folded into tables.
    """
    about = result["models"][name]
    operations = about[f"operations_per_token_{which}"] * (3 if stage == "training" else 1)
    share = ratio(
        result, f"{name}: {stage}", f"matrix product, {about['precision']}", unit="tokens"
    )
    assert share is not None
    return share * operations


def to_markdown(result: dict[str, Any]) -> str:
    """Tables that can be pasted into a page."""
    environment = result["environment"]
    parts = [
        f"`{result['command']}`",
        f"{result['dataset']} ({result['data_source']}), {result['texts']:,} test texts "
        f"({result['slow_texts']} for transformers), {result['rounds']} interleaved rounds; "
        f"{environment['threads']} threads of {environment['processor']}, "
        f"torch {environment['versions']['torch']}. Medians, with the range in brackets.",
        *result["notes"],
        _throughput(result),
        _latency(result),
        _shares(result),
        _processes(result),
        _growth(result),
    ]
    return "\n\n".join(parts) + "\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    if value == 0 or value >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def _throughput(result: dict[str, Any]) -> str:
    rows = []
    for name, entry in result["entries"].items():
        if not entry["documents"]:
            continue
        rates = _rates(result, name)
        rows.append(
            [
                name,
                f"{_number(statistics.median(rates))} [{_number(min(rates))}, "
                f"{_number(max(rates))}]",
                _number(statistics.median(_rates(result, name, "tokens"))),
                *(
                    _number(ratio(result, name, other))
                    for other in (MINILM, INT8, FASTTEXT, SVM)
                    if other in result["entries"]
                ),
            ]
        )
    others = [f"x {name}" for name in (MINILM, INT8, FASTTEXT, SVM) if name in result["entries"]]
    return _table(["", "texts per second", "tokens per second", *others], rows)


def _latency(result: dict[str, Any]) -> str:
    rows = []
    for name, entry in result["entries"].items():
        times = sorted(entry["latencies"])
        if times:
            p99 = times[min(len(times) - 1, int(0.99 * len(times)))]
            rows.append(
                [
                    name,
                    f"{1000 * statistics.median(times):.3f}",
                    f"{1000 * p99:.3f}",
                    str(len(times)),
                ]
            )
    return _table(["one text of about 230 tokens", "p50, ms", "p99, ms", "n"], rows)


def _shares(result: dict[str, Any]) -> str:
    rows = []
    for precision in ("bf16", "fp32"):
        name = f"matrix product, {precision}"
        rates = [rate / 1e9 for rate in _rates(result, name, "tokens")]
        rows.append([name, f"{_number(statistics.median(rates))} GFLOP/s", "100", "100"])
    for name, about in result["models"].items():
        for stage in ("network", "training"):
            rows.append(
                [
                    f"{name}: {stage} ({about['precision']})",
                    f"{_number(statistics.median(_rates(result, f'{name}: {stage}', 'tokens')))} "
                    f"tokens/s",
                    f"{100 * share_of_peak(result, name, stage, 'defined'):.0f}",
                    f"{100 * share_of_peak(result, name, stage, 'done'):.0f}"
                    if stage == "network"
                    else "-",
                ]
            )
    head = ["", "rate", "% of the peak, products as defined", "% of the peak, products done"]
    return _table(head, rows)


def _processes(result: dict[str, Any]) -> str:
    rows = []
    for name, about in result["models"].items():
        imports, cold = (
            statistics.median(values) for values in zip(*result["cold"][name], strict=True)
        )
        memory = result["memory"][name]
        rows.append(
            [
                name + " (random weights)" * about["random_weights"],
                f"{about['bytes'] / 1e6:.1f}",
                f"{cold:.2f} ({imports:.2f})",
                f"{memory['libraries']:.0f}",
                f"{memory['the sample']:.0f}",
                _number(memory.get("a text of 5 MB")),
            ]
        )
    head = [
        "",
        "MB on disk",
        "s to the first answer (of these, importing torch)",
        "peak memory, MiB: with torch imported",
        "after the sample",
        "after a text of 5 MB",
    ]
    fits = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result["fit_seconds"].items())
    return _table(head, rows) + f"\n\nFitted to the training texts: {fits}."


def _growth(result: dict[str, Any]) -> str:
    tables = []
    for key, title in (
        ("length", "tokens of each text"),
        ("corpus", "texts"),
        ("classes", "classes"),
        ("vocab_size", "tokens in the vocabulary"),
    ):
        entries = result["growth"][key]
        of, rate = entries[0].keys()
        tables.append(
            _table(
                [title, *(f"{entry[of]:,}" for entry in entries)],
                [[rate.replace("_", " "), *(_number(entry[rate]) for entry in entries)]],
            )
        )
    first = next(iter(result["models"]))
    return (
        f"As one thing grows: length and number of texts with {first} end to end, classes and "
        f"vocabulary with nin-text-small of random weights, from token ids to logits. Each figure "
        f"is the best of three.\n\n" + "\n\n".join(tables)
    )
