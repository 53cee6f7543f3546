"""What a run leaves for a person to look at: numbers as JSON, plots as PNG, a model card."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import platform
import re
import resource
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCardData

from nin_text import image_data, sources
from nin_text.options import METRICS_FILE as METRICS_FILE

LIBRARIES = "nin-text torch transformers datasets tokenizers scikit-learn accelerate numpy".split()
MAX_CLASSES_SHOWN = 30
MISTAKES_FILE = "mistakes.html"  # of a NiN model
CLASS_MAPS_FILE = "class_maps.html"  # of an image model


def write_bytes(path: Path, content: bytes) -> None:
    """Write aside and rename into place, so that no reader sees half of it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_bytes(content)
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)  # a full disk is not to stay full of halves
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text as `write_bytes` does; lone surrogates become question marks."""
    write_bytes(path, text.encode("utf-8", "replace"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON as `write_text` does."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def move_files(source: Path, target: Path, last: str = "config.json") -> None:
    """Put the files of a folder into another one, over those of the same names.

    Args:
        source, target: the folders.
        last: the file without which nobody takes the target for a model. It is removed first and
            moved last, so that half of one model and half of another are never loaded as one.
    """
    (target / last).unlink(missing_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: path.name == last):
        path.replace(target / path.name)
    source.rmdir()


def slug(text: str) -> str:
    """A text as the name of a file or folder."""
    return re.sub(r"[^\w.-]+", "_", text).strip("._-")


def command() -> str:
    """What was typed to start this process, with the folder of the data, which decides as much."""
    folder = os.environ.get("NIN_TEXT_DATA")
    prefix = f"NIN_TEXT_DATA={shlex.quote(folder)} " if folder else ""
    return f"{prefix}python {shlex.join(sys.argv)}"


def peak_memory_mb() -> float:
    """Most memory that this process has held so far, in MiB; on Linux and macOS."""
    try:  # getrusage would tell the peak of the process that started this one, if that was larger
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split(maxsplit=1)[0]) / 2**10
    except (OSError, IndexError, ValueError):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, processor, threads: what a figure depends on besides the command."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "versions": {"python": platform.python_version(), **versions},
        "platform": platform.platform(),
        "processor": _processor(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _figure(width: float, height: float) -> Any:
    # The object interface draws without a display and leaves pyplot's global state alone.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _save(figure: Any, path: Path) -> None:
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write_bytes(path, png.getvalue())


def plot_curves(history: Sequence[dict[str, Any]], path: Path) -> None:
    """Training loss, validation loss and validation accuracy against epochs.

    Args:
        history: the Trainer's `log_history`.
        path: PNG file to write.
    """
    figure = _figure(9, 3.6)
    losses, accuracy = figure.subplots(1, 2)
    for axis, key, label in (
        (losses, "loss", "training loss"),
        (losses, "eval_loss", "validation log loss"),
        (accuracy, "eval_accuracy", "validation accuracy"),
    ):
        points = [(entry["epoch"], entry[key]) for entry in history if key in entry]
        if points:
            style = "-" if key == "loss" else "o-"
            axis.plot(*zip(*points, strict=True), style, label=label)
    for axis in (losses, accuracy):
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        axis.legend()
    losses.set_ylim(bottom=0)
    _save(figure, path)


def plot_confusion(matrix: Sequence[Sequence[int]], names: Sequence[str], path: Path) -> None:
    """Confusion matrix as shares of the true class, with counts where there is room."""
    import numpy as np

    counts = np.asarray(matrix, dtype=float)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = min(2.6 + 0.55 * len(names), 14)
    figure = _figure(size + 0.8, size)
    axis = figure.subplots()
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axis, label="share of the true class", shrink=0.8)
    if len(names) <= MAX_CLASSES_SHOWN:
        short = [name if len(name) <= 18 else name[:17] + "…" for name in names]
        axis.set_xticks(range(len(names)), short, rotation=45, ha="right", parse_math=False)
        axis.set_yticks(range(len(names)), short, parse_math=False)
    if len(names) <= 12:
        for (i, j), share in np.ndenumerate(shares):
            color = "white" if share > 0.5 else "black"
            axis.text(j, i, f"{counts[i, j]:.0f}", ha="center", va="center", color=color)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    _save(figure, path)


# ---- the model card ----------------------------------------------------------------------------


def model_card(metrics: dict[str, Any]) -> str:
    """The README.md of a run folder, in the hub's format, without the names of local folders.

    Args:
        metrics: what `metrics.json` holds.
    """
    test, validation = metrics["test"], metrics["validation"]
    low, high = test["accuracy_interval_95"]
    labels = ", ".join(map(_code, metrics["label_names"][:MAX_CLASSES_SHOWN]))
    more = len(metrics["label_names"]) - MAX_CLASSES_SHOWN
    table = metrics.get("ngram_table_entries")
    kind = _kind(metrics)
    notes = "".join(f"- {note}\n" for note in metrics["notes"])
    model, dataset = (_without_folders(metrics[key]) for key in ("model", "dataset"))
    name = f"{model} on {dataset}"
    ours = metrics["architecture"].startswith(("NiN", "Baseline"))
    mistakes = (
        f"The most confident mistakes on the validation split, with the evidence of every "
        f"{'region' if kind == 'image' else 'token'}, are in `{MISTAKES_FILE}`: a page that shows "
        f"{kind}s of the data.\n\n"
        if metrics["architecture"].startswith("NiN")
        else ""
    )
    return f"""---
{_card_data(metrics, " ".join(name.split())).to_yaml().rstrip()}
---
# {_plain(name)}

{"An image" if kind == "image" else "A text"} classifier with {metrics["parameters"]:,} parameters\
{f", a table of n-gram evidence with {table:,} entries," if table else ""} and \
{len(metrics["label_names"])} classes: {labels}{f" and {more} more" if more > 0 else ""}.

| split | n | accuracy | macro F1 | log loss | calibration error |
|---|---|---|---|---|---|
| validation | {validation["n"]:,} | {validation["accuracy"]:.4f} | {validation["macro_f1"]:.4f} \
| {validation["log_loss"]:.4f} | {validation["calibration_error"]:.4f} |
| test | {test["n"]:,} | {test["accuracy"]:.4f} | {test["macro_f1"]:.4f} \
| {test["log_loss"]:.4f} | {test["calibration_error"]:.4f} |

95 % interval of the test accuracy (Wilson's, of the test examples alone, one training run):
{low:.4f} to {high:.4f}. The model was chosen on the validation split; the test split was read
once, at the end.

{mistakes}## Use

```python
{"import nin_text  # registers the architecture with transformers" + chr(10) if ours else ""}\
from transformers import pipeline

classify = pipeline("{kind}-classification", model="path/to/this/folder")  # or its id on the hub
classify("{"picture.png" if kind == "image" else "Your text here."}")
```

## Training

- data: {_plain(dataset)} ({_source(metrics)}), {metrics["train_examples"]:,} training
  examples, fingerprint `{metrics["data_fingerprint"]}`
- command: `{_command_without_folders(metrics["command"])}`
- {metrics["train_seconds"]:.0f} s on {metrics["environment"]["processor"]}, \
{metrics["environment"]["threads"]} threads, seed {metrics["seed"]}, {metrics["precision"]}
{notes}
## Limits

{_mistakes(test["confusion_matrix"], metrics["label_names"], kind)}
It gives one of its classes to any {kind}, also to one that belongs to none of them{
        " or is in another" + chr(10) + "language" if kind == "text" else ""
    }. The classifier knows the kind of {kind} it was trained on. It has not been examined for
bias, and its probabilities are only as well calibrated as the table says, on {kind}s like those of
the test split.

The licence is for whoever publishes the model to state; that of the training data has a say.
"""


def _kind(metrics: dict[str, Any]) -> str:
    return "image" if metrics["architecture"].startswith("NiNImage") else "text"


def _card_data(metrics: dict[str, Any], name: str) -> ModelCardData:
    """What the hub reads of a card."""
    kind = _kind(metrics)
    hub_id = _hub_id(metrics)
    dataset = _without_folders(metrics["dataset"])
    values = {
        "accuracy": ("accuracy", metrics["test"]["accuracy"]),
        "f1": ("macro F1", metrics["test"]["macro_f1"]),
    }
    return ModelCardData(
        license="unknown",
        library_name="transformers",
        pipeline_tag=f"{kind}-classification",
        tags=["nin-text", f"{kind}-classification"],
        datasets=[hub_id or slug(dataset)],
        metrics=list(values),
        model_name=name,
        eval_results=[
            EvalResult(
                task_type=f"{kind}-classification",
                task_name=f"{kind.capitalize()} classification",
                dataset_type=hub_id or slug(dataset),
                dataset_name=dataset,
                dataset_config=metrics.get("options", {}).get("dataset_config"),
                dataset_split=metrics.get("tested_on", "test"),
                metric_type=metric,
                metric_name=title,
                metric_value=round(value, 6),
            )
            for metric, (title, value) in values.items()
        ],
    )


def _hub_id(metrics: dict[str, Any]) -> str | None:
    """The data set's id on the hub, though a local copy of it may have been read."""
    name = metrics["dataset"]
    known: Any = image_data.KNOWN if _kind(metrics) == "image" else sources.KNOWN
    if name in known:
        return str(known[name].hub_id)
    return str(name) if metrics["data_source"].startswith("hub:") else None


def _source(metrics: dict[str, Any]) -> str:
    source = metrics["data_source"]
    known = source in ("generated", "scikit-learn") or source.startswith("hub:")
    return source if known else "local files"


def _mistakes(matrix: Sequence[Sequence[int]], names: Sequence[str], kind: str) -> str:
    """A sentence on the most frequent mistake."""
    wrong = {
        (i, j): count
        for i, row in enumerate(matrix)
        for j, count in enumerate(row)
        if i != j and count
    }
    n = sum(map(sum, matrix))
    if not wrong:
        return f"All {n:,} test {kind}s were classified rightly."
    i, j = max(wrong, key=lambda pair: wrong[pair])
    return (
        f"Of {n:,} test {kind}s {sum(wrong.values()):,} were classified wrongly; most often,\n"
        f"{_code(names[i])} was taken for {_code(names[j])} ({wrong[i, j]:,} of "
        f"{sum(matrix[i]):,})."
    )


def _plain(text: str) -> str:
    """A text as Markdown that is no markup, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """A text between backticks, of which it may hold some itself, on one line."""
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    space = " " if len(fence) > 1 else ""
    return f"{fence}{space}{' '.join(text.split())}{space}{fence}"


def _command_without_folders(command: str) -> str:
    words = shlex.split(command)
    parts = []
    for part in words[words.index("python") :]:  # what comes before says where data lie
        name, equals, value = part.rpartition("=")
        parts.append(f"{name}{equals}{_without_folders(value)}")
    return shlex.join(parts)


def _without_folders(name: str) -> str:
    """The last part of a path that tells where somebody keeps their files; else the name."""
    path = PurePath(name)
    return path.name if path.is_absolute() or name.startswith("~") or ".." in path.parts else name
