"""Compare systems on one data set: quality, whether differences are real, cost and speed.

Every system is fitted in a process of its own, whose files, answers and costs are kept in the
output folder as soon as they are there; a comparison that was stopped goes on with what is missing.
Then one process for each system is started, and all are timed in turn, round by round.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from nin_text import comparison_timing as timing
from nin_text import processes, report
from nin_text.baselines import count_tokens
from nin_text.comparison_report import print_table, to_html, to_markdown, to_plots
from nin_text.comparison_timing import Sample
from nin_text.data import (
    TextDataset,
    fewest_labelled,
    labelled_examples,
    load_text_dataset,
    reduced,
)
from nin_text.device import pick_device, use_bf16
from nin_text.errors import UserError
from nin_text.evaluation import classification_metrics, paired_difference
from nin_text.options import (
    ARCHITECTURES,
    DEFAULT_SYSTEMS,
    FASTTEXT,
    PRESET_NAMES,
    QUICK_LIMIT,
    QUICK_ROUNDS,
    ROUNDS,
    CompareOptions,
    check,
)
from nin_text.run_folder import ANSWERS_FILE, dataset_slug
from nin_text.stacking import best_scales
from nin_text.systems import SavedRun, create

logger = logging.getLogger(__name__)

OPTIONS_FILE = "comparison_options.json"
SYSTEM_FILE = "system.json"  # written last: a system without it is fitted again
OWNER_FILE = "spec.json"  # whose folder it is
PLOTS = "plots"
LENGTH_BINS = 5
FLOOR = 1e-7  # of a probability, before its logarithm is taken
THREADS = {"linear": 1, "fasttext": 12}  # of training, where the system decides itself


def with_defaults(options: CompareOptions) -> CompareOptions:
    """A copy in which --quick has set what it stands for, and the default can be run here."""
    if options.quick:
        options = replace(options, limit=options.limit or QUICK_LIMIT)
    if options.rounds is None:
        options = replace(options, rounds=QUICK_ROUNDS if options.quick else ROUNDS)
    if options.models == DEFAULT_SYSTEMS and importlib.util.find_spec(FASTTEXT) is None:
        logger.warning(
            "fasttext is left out: it is not installed (pip install 'nin-text[compare]')"
        )
        options = replace(options, models=[name for name in options.models if name != FASTTEXT])
    reference = options.reference and _without_slash(options.reference)
    return replace(options, models=[*map(_without_slash, options.models)], reference=reference)


def _without_slash(spec: str) -> str:
    """A folder has one name."""
    return spec.rstrip("/") or spec


def compare_text(options: CompareOptions) -> dict[str, Any]:
    """Compare systems, and leave comparison.json, comparison.md and comparison.html.

    Args:
        options: see `CompareOptions`.

    Returns:
        A summary: the folder, and accuracy and speed of each system.

    Raises:
        UserError: whatever the user can mend, in one sentence; also, after everything else is
            done and written, if a system failed.
    """
    check(options)
    options = with_defaults(options)
    names = system_names(options.models)
    dataset = load_text_dataset(options.dataset, **options.arguments())
    _check_options(options, names, dataset)
    threads = options.threads or processes.available_cores()
    with processes.environment_of_threads(threads):  # which torch reads where it is imported
        return _compare(replace(options, threads=threads), names, dataset)


def _compare(
    options: CompareOptions, names: dict[str, str], dataset: TextDataset
) -> dict[str, Any]:
    folder = options.output_dir or Path("comparisons") / report.slug(
        f"{dataset_slug(options)}-seed{options.seed}"
    )
    _open_folder(folder, options, dataset)
    sample = Sample.of(dataset.splits["test"].texts)
    records: dict[str, dict[str, Any]] = {}
    try:
        for i, (name, spec) in enumerate(names.items(), start=1):
            logger.info("[%d of %d] %s", i, len(names), name)
            place = _place(folder / "systems", name, spec)
            records[name] = _fitted(place, spec, options, dataset, sample) | {"folder": place}
        if options.rounds:
            _time(records, options, sample)
    except KeyboardInterrupt:
        logger.error(
            "stopped; the same command, without --overwrite, goes on with what is missing in %s",
            folder,
        )
        raise
    comparison = _assemble(options, dataset, records, sample)
    report.write_json(folder / "comparison.json", comparison)
    plots = to_plots(comparison)
    for file, text in (("md", to_markdown(comparison)), ("html", to_html(comparison, plots))):
        report.write_text(folder / f"comparison.{file}", text)
    shutil.rmtree(folder / PLOTS, ignore_errors=True)
    (folder / PLOTS).mkdir()
    for plot in plots:
        report.write_text(folder / PLOTS / f"{plot.name}.svg", plot.svg.decode())
    if not options.quiet:
        print_table(comparison)
    logger.info("the comparison is in %s: open comparison.html", folder)
    failures = [failure for record in records.values() for failure in record["failures"]]
    if failures:
        raise UserError(
            f"not everything succeeded: {'; '.join(failures)}. The rest is in {folder}; the same "
            f"command, without --overwrite, tries what failed again"
        )
    return _summary(comparison, folder)


# ---- names and folders -------------------------------------------------------------------------


def system_names(specs: Sequence[str]) -> dict[str, str]:
    """A short, distinct name, fit for a folder, for each system.

    Raises:
        UserError: if a system is named twice.
    """
    names: dict[str, str] = {}
    for spec in specs:
        if spec in names.values():
            raise UserError(f"--models names {spec} twice")
        prefix, _, rest = spec.rpartition(":")
        short = report.slug("-".join(filter(None, (prefix, Path(rest).name)))) or "system"
        name, n = short, 2
        while name in names:
            name, n = f"{short}-{n}", n + 1
        names[name] = spec
    return names


def _check_options(options: CompareOptions, names: dict[str, str], dataset: TextDataset) -> None:
    tested = {n: spec for n, spec in names.items() if not spec.startswith("architecture:")}
    if options.reference is not None and options.reference not in (*tested, *tested.values()):
        raise UserError(
            f"--reference {options.reference} is not among the systems that are tested: "
            f"{', '.join(tested) or 'there is none'}"
        )
    for spec in names.values():
        create(spec, options)
    least, most = fewest_labelled(dataset), labelled_examples(dataset)
    for size in options.curve:
        if not least <= size <= most:
            raise UserError(
                f"--curve must name numbers between {least} and the {most:,} labelled examples "
                f"that there are, not {size}"
            )


def _open_folder(folder: Path, options: CompareOptions, dataset: TextDataset) -> None:
    """Make the output folder; refuse one that holds a comparison of something else."""
    decisive = {
        "dataset": options.dataset,
        "dataset_config": options.dataset_config,
        "data_fingerprint": dataset.fingerprint(),
        "limit": options.limit,
        "labelled": options.labelled,
        "unlabelled": options.unlabelled,
        "precision": options.precision,
        "device": str(pick_device(options.device)),
        "seed": options.seed,
    }
    path = folder / OPTIONS_FILE
    if not path.is_file():
        ours = ("systems", PLOTS, *(f"comparison.{kind}" for kind in ("json", "md", "html")))
        if any((folder / name).exists() for name in ours):
            raise UserError(f"{folder} holds something else; give another --output-dir")
    elif options.overwrite:
        shutil.rmtree(folder / "systems", ignore_errors=True)
    else:
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            differing = [name for name, value in decisive.items() if before.get(name) != value]
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path} is damaged; give --overwrite to start anew") from error
        if differing:
            what = differing[0]
            raise UserError(
                f"the comparison in {folder} has {what.replace('_', ' ')} {before.get(what)}, not "
                f"{decisive[what]}; give another --output-dir, or --overwrite to start anew"
            )
    (folder / "systems").mkdir(parents=True, exist_ok=True)
    report.write_json(path, decisive)


# ---- fitting -----------------------------------------------------------------------------------


def _place(systems: Path, name: str, spec: str) -> Path:
    """The folder of a system: the one that it has, by whatever name, or a free one.

    Names of systems that are called alike depend on which of them there are.
    """
    owners = {folder: _owner(folder) for folder in sorted(systems.iterdir())}
    for folder, owner in owners.items():
        if owner == spec:
            return folder
    folder, n = systems / name, 2
    while owners.get(folder) is not None:
        folder, n = systems / f"{name}-{n}", n + 1
    return folder


def _owner(folder: Path) -> str | None:
    """The system whose folder it is; None if that cannot be told."""
    try:
        return str(json.loads((folder / OWNER_FILE).read_text(encoding="utf-8"))["spec"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _fitted(
    folder: Path, spec: str, options: CompareOptions, dataset: TextDataset, sample: Sample
) -> dict[str, Any]:
    """The record of a system, fitted now unless it has been before.

    Its `failures` tell, a sentence each, what did not succeed.
    """
    path = folder / SYSTEM_FILE
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if _owner(folder) != spec or (known and _changed(known)):
        shutil.rmtree(folder, ignore_errors=True)  # of nobody, or of what is no more
        known = None
    if spec not in PRESET_NAMES:  # the others have no use for unlabelled texts
        dataset = dataset.labelled()
    if known is not None:
        logger.info("fitted before: %s", folder)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        report.write_json(folder / OWNER_FILE, {"spec": spec})
        try:
            known = processes.call(_fit, options, spec, folder, dataset, sample)
        except UserError as error:
            logger.error("%s failed: %s", spec, error)
            return {"spec": spec, "error": str(error), "failures": [f"{folder.name}: {error}"]}
        report.write_json(path, known)
    record = known | {"failures": []}
    if record["kind"] != "architecture" and "run_modified" not in record:
        for size in options.curve:
            try:
                _curve_point(folder, spec, size, options, dataset, sample)
            except UserError as error:
                logger.error("%s failed on %d examples: %s", spec, size, error)
                failure = f"{folder.name} on {size} labelled examples: {error}"
                record["failures"].append(failure)
    return record


def _changed(record: dict[str, Any]) -> bool:
    """Whether a saved run was trained again since it was scored."""
    return "run_modified" in record and record["run_modified"] != _modified(record["spec"])


def _modified(spec: str) -> float:
    try:
        return (Path(spec) / report.METRICS_FILE).stat().st_mtime
    except OSError:
        return 0.0


def _curve_point(
    folder: Path,
    spec: str,
    size: int,
    options: CompareOptions,
    dataset: TextDataset,
    sample: Sample,
) -> None:
    path, part = folder / f"curve-{size}.json", folder / f"curve-{size}"
    if path.is_file():
        return
    logger.info("%s on %s labelled examples", folder.name, f"{size:,}")
    part.mkdir(exist_ok=True)
    record = processes.call(_fit, options, spec, part, reduced(dataset, size), sample)
    truth = np.array(dataset.splits["test"].labels)
    answers = load_file(part / ANSWERS_FILE)["test"]
    accuracy = float((answers.argmax(axis=1) == truth).mean())
    point = {"examples": size, "accuracy": accuracy, "train_seconds": record["train_seconds"]}
    report.write_json(path, point)
    shutil.rmtree(part)


def _fit(
    options: CompareOptions, spec: str, folder: Path, dataset: TextDataset, sample: Sample
) -> dict[str, Any]:
    """Fit one system, leave its answers, and tell what it cost; runs in a process of its own."""
    system = create(spec, options)
    clock = time.perf_counter()
    fit = system.fit(dataset, folder)
    record: dict[str, Any] = {
        "spec": spec,
        "kind": system.kind,
        "description": system.description,
        "settings": fit.settings,
        "warning": fit.warning,
        "train_seconds": round(time.perf_counter() - clock, 2),
        "train_threads": THREADS.get(system.kind, torch.get_num_threads()),
        "train_peak_memory_mb": round(report.peak_memory_mb(), 1),
        **(fit.record or {}),
    }
    system.load(folder)
    record |= timing.measure_cost(system, sample)
    if system.kind == "architecture":
        record |= {"train_seconds": None, "train_threads": None, "train_peak_memory_mb": None}
    else:
        answers = {}
        for split, known in (("validation", fit.validation), ("test", fit.test)):
            if known is None:
                logger.info("answering %s texts", f"{len(dataset.splits[split]):,}")
                known = system.probabilities(dataset.splits[split].texts)
            answers[split] = np.ascontiguousarray(known, dtype=np.float32)
        save_file(answers, folder / ANSWERS_FILE)
    files = system.files(folder)
    record["bytes_on_disk"] = sum(file.stat().st_size for file in files) if files else None
    if isinstance(system, SavedRun):
        record["run_modified"] = _modified(spec)
    return record


# ---- timing ------------------------------------------------------------------------------------


def _time(records: dict[str, dict[str, Any]], options: CompareOptions, sample: Sample) -> None:
    """Add `speed` to the record of every system; all their processes are alive at once."""
    running: dict[str, processes.Child] = {}

    def ask(name: str, what: str | None = None) -> Any:
        """An answer of a process; one that fails is told about and has no more turns."""
        try:
            if what is not None:
                running[name].send(what)
            return running[name].receive()
        except UserError as error:
            logger.error("%s could not be timed: %s", name, error)
            records[name]["failures"].append(f"{name} could not be timed: {error}")
            running.pop(name).kill()

    try:
        for name, record in records.items():
            if "error" not in record:
                running[name] = processes.start(
                    _answer_rounds, options, record, record["folder"], sample
                )
                logger.info("warming up %s", name)
                ask(name)
        for turn in range(options.rounds):
            logger.info("timing, round %d of %d", turn + 1, options.rounds)
            order = list(running)
            first = turn % max(len(order), 1)
            for name in order[first:] + order[:first]:  # each is first once in a while
                ask(name, "round")
        for name in list(running):
            records[name]["speed"] = ask(name, "summary")
        for child in running.values():
            child.join()
    finally:
        for child in running.values():
            child.kill()


def _answer_rounds(
    connection: Connection,
    options: CompareOptions,
    record: dict[str, Any],
    folder: Path,
    sample: Sample,
) -> dict[str, Any]:
    """Load a system and time it whenever asked; runs in a process of its own."""
    system = create(record["spec"], options)
    system.load(folder)
    if "batch_tokens" in record:
        system.batch_tokens = record["batch_tokens"]  # type: ignore[attr-defined]
    timing.warm_up(system, sample)
    connection.send(("result", None))
    rounds = []
    while connection.recv() == "round":
        rounds.append(timing.time_round(system, sample))
        connection.send(("result", None))
    speed = timing.summarize(rounds, sample)
    return speed | {"peak_memory_mb": round(report.peak_memory_mb(), 1)}


# ---- the comparison ----------------------------------------------------------------------------


def _assemble(
    options: CompareOptions,
    dataset: TextDataset,
    records: dict[str, dict[str, Any]],
    sample: Sample,
) -> dict[str, Any]:
    """Everything that there is to say, as `comparison_report` expects it."""
    device = pick_device(options.device)
    lengths = count_tokens(dataset.splits["test"].texts)
    tested = {
        name: _judge(record["folder"], dataset, lengths)
        for name, record in records.items()
        if "error" not in record and record["kind"] != "architecture"
    }
    reference = _reference(options, records, tested)
    entries = []
    for name, record in records.items():
        entry = _entry(name, record, options)
        if name in tested:
            judged, correct = tested[name]
            entry |= judged
            entry["curve"] = _curve(record["folder"], options, dataset, judged)
            if reference != name:
                entry["versus_reference"] = paired_difference(correct, tested[reference][1])
        entries.append(entry)
    return {
        "dataset": options.dataset,
        "data_source": dataset.source,
        "data_fingerprint": dataset.fingerprint(),
        "label_names": dataset.label_names,
        **{f"{split}_examples": len(dataset.splits[split]) for split in ("train", "validation")},
        "test_examples": len(dataset.splits["test"]),
        "notes": [*dataset.notes, *_notes(dataset, records, options)],
        "command": report.command(),
        "environment": report.environment(device) | {"threads": options.threads},
        "reference": reference,
        "seed": options.seed,
        "precision": "bf16" if use_bf16(options.precision, device) else "fp32",
        "timing": {
            "rounds": options.rounds,
            "threads": options.threads,
            "documents": len(sample.texts),
            "mean_tokens": float(sample.tokens.mean()),
            "left_out": timing.LEFT_OUT,
        }
        if options.rounds
        else None,
        "systems": entries,
    }


def _reference(
    options: CompareOptions, records: dict[str, dict[str, Any]], tested: dict[str, Any]
) -> str:
    """Name of the system that others are tested against."""
    wanted = _wanted_reference(options, records)
    return wanted if wanted in tested else next(iter(tested), "")


def _wanted_reference(options: CompareOptions, records: dict[str, dict[str, Any]]) -> str | None:
    wanted = options.reference or "nin-text-base"
    return next((n for n, record in records.items() if wanted in (n, record["spec"])), None)


def _judge(
    folder: Path, dataset: TextDataset, lengths: np.ndarray
) -> tuple[dict[str, Any], np.ndarray]:
    """Quality of a system's answers, and (n,) where it was right; `lengths` of the test texts."""
    answers = load_file(folder / ANSWERS_FILE)
    logits = {name: np.log(np.maximum(p, FLOOR)) for name, p in answers.items()}
    validation, test = dataset.splits["validation"], dataset.splits["test"]
    # One temperature for each system (Guo et al. 2017), so that log loss and calibration error
    # compare what a system knows, not whether its makers have thought of scaling.
    (scale,) = best_scales([logits["validation"]], np.array(validation.labels))
    truth = np.array(test.labels)
    correct = answers["test"].argmax(axis=1) == truth
    right = answers["validation"].argmax(axis=1) == np.array(validation.labels)
    judged = {
        "test": classification_metrics(scale * logits["test"], test.labels, dataset.label_names),
        "validation": {"accuracy": float(right.mean())},
        "temperature": float(1 / scale),
        "by_length": _by_length(lengths, correct),
    }
    return judged, correct


def _by_length(lengths: np.ndarray, correct: np.ndarray) -> list[dict[str, Any]]:
    """Accuracy in bins of about as many texts each, by tokens of the text."""
    starts = np.quantile(lengths, np.linspace(0, 1, LENGTH_BINS, endpoint=False)).astype(int)
    edges = np.unique([*starts, lengths.max() + 1])
    bins = []
    for low, high in itertools.pairwise(edges):
        inside = (lengths >= low) & (lengths < high)
        if inside.any():
            accuracy = float(correct[inside].mean())
            n = int(inside.sum())
            bins.append({"from": int(low), "to": int(high) - 1, "n": n, "accuracy": accuracy})
    return bins


def _entry(name: str, record: dict[str, Any], options: CompareOptions) -> dict[str, Any]:
    """A system's entry before anything is known of its quality."""
    keys = (
        "kind description settings cited test validation versus_reference parameters batch_tokens "
        "macs_per_token bytes_on_disk train_seconds train_threads train_peak_memory_mb speed error"
    ).split()
    entry = {key: record.get(key) for key in keys} | {"name": name, "by_length": [], "curve": []}
    if "error" in record:
        return entry | {"kind": "failed", "description": "", "settings": {}}
    if record["kind"] == "architecture" and options.limit is None and options.labelled is None:
        cited = ARCHITECTURES[record["spec"].partition(":")[2]]["cited"].get(options.dataset)
        if cited is not None:
            entry["cited"] = {"accuracy": cited[0], "source": cited[1]}
    return entry


def _curve(
    folder: Path, options: CompareOptions, dataset: TextDataset, judged: dict[str, Any]
) -> list[dict[str, Any]]:
    """Test accuracy against labelled examples, all of them included."""
    paths = [folder / f"curve-{size}.json" for size in sorted(set(options.curve))]
    points = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
    whole = {"examples": labelled_examples(dataset), "accuracy": judged["test"]["accuracy"]}
    return [*points, whole] if points else []


def _notes(
    dataset: TextDataset, records: dict[str, dict[str, Any]], options: CompareOptions
) -> list[str]:
    notes = [
        "every system was trained once: intervals tell how much the test split's size matters, "
        "not how much another seed would",
        "training seconds are all that it took to make the classifier from the texts in memory: "
        "tokenization, tuning (several candidates for linear models, fastText and frozen "
        "encoders) and the last fit; scoring the test split is left out",
        "log loss and calibration error are those after temperature scaling on the validation "
        "split, for every system",
        "tokens are words and punctuation marks, counted alike for every system",
        "linear models use one thread, and so does fastText when it answers; it trains with 12",
        "a batch of 32 texts may be cut in smaller ones by the batch size that was fastest",
    ]
    if "unsupervised" in dataset.splits and any(r.get("kind") == "nin" for r in records.values()):
        texts = len(dataset.splits["unsupervised"])
        notes.append(f"NiN presets also learn from {texts:,} unlabelled texts; the others cannot")
    wanted = _wanted_reference(options, records)
    if wanted is not None and "error" in records[wanted]:
        notes.append(f"{wanted} failed: the others are tested against the first that did not")
    finished = [name for name, record in records.items() if "run_modified" in record]
    if options.curve and finished:
        notes.append(f"no learning curve of {', '.join(finished)}: not trained here")
    if pick_device(options.device).type != "cpu":
        notes.append("memory is that of the host, not of the device")
    warnings = [record["warning"] for record in records.values() if record.get("warning")]
    return notes + warnings + [f for record in records.values() for f in record["failures"]]


def _summary(comparison: dict[str, Any], folder: Path) -> dict[str, Any]:
    systems = {
        entry["name"]: {
            "test_accuracy": entry["test"] and entry["test"]["accuracy"],
            "train_seconds": entry["train_seconds"],
            "documents_per_second": entry["speed"]
            and round(entry["speed"]["best"]["documents_per_second"], 1),
        }
        for entry in comparison["systems"]
    }
    return {
        "dataset": comparison["dataset"],
        "reference": comparison["reference"],
        "systems": systems,
        "output_dir": str(folder),
    }
