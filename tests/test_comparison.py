"""Comparisons: what a table says is what was measured, and nothing is measured twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, Script
from safetensors.numpy import load_file
from scipy.stats import binomtest
from test_systems import tiny_bert

from nin_text import UserError, load_text_dataset
from nin_text import comparison_timing as timing
from nin_text.comparison import compare_text, system_names, with_defaults
from nin_text.comparison_timing import Sample
from nin_text.evaluation import paired_difference
from nin_text.options import CompareOptions, TrainOptions
from nin_text.runs import train_text

# Of comparisons called from here; those of the script are new interpreters, as for a user.
pytestmark = pytest.mark.usefixtures("ready_children")


def compare(dataset: object, folder: Path, *models: str, **changes: object) -> dict:
    """A comparison without timing, called as the script calls it."""
    options = CompareOptions(
        **{"dataset": str(dataset), "models": list(models), "output_dir": folder, "rounds": 0}
        | {"threads": 1, "quiet": True}
        | changes
    )
    return compare_text(options)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Three classes with odd names, 300 rows."""
    verbs = {"cat, or: kitten": "purrs", "<b>dog</b>": "barks", 'fish "x"|y': "swims"}
    rng = np.random.default_rng(0)
    rows = [
        (f"it {verb if rng.random() > 0.2 else 'sleeps'} {rng.integers(10**6)}", label)
        for _ in range(100)
        for label, verb in verbs.items()
    ]
    path = tmp_path / "pets.csv"
    pd.DataFrame(rows, columns=["text", "label"]).to_csv(path, index=False)
    return path


def read(folder: Path) -> dict:
    return json.loads((folder / "comparison.json").read_text(encoding="utf-8"))


def test_the_table_on_a_strangers_csv_is_right(pets: Path, tmp_path: Path) -> None:
    """Every figure is computed again here from the answers that were left."""
    both = ("tfidf-svm", "nb-logreg")
    result = compare(
        pets, tmp_path / "out", *both, reference="nb-logreg", rounds=1, curve=[200, 30]
    )
    comparison = read(tmp_path / "out")
    data = load_text_dataset(str(pets))
    truth = np.array(data.splits["test"].labels)
    assert comparison["label_names"] == data.label_names
    assert comparison["test_examples"] == len(truth)
    right = {}
    for entry in comparison["systems"]:
        answers = load_file(tmp_path / "out" / "systems" / entry["name"] / "answers.safetensors")
        right[entry["name"]] = answers["test"].argmax(axis=1) == truth
        assert entry["test"]["accuracy"] == pytest.approx(right[entry["name"]].mean())
        assert result["systems"][entry["name"]]["test_accuracy"] == entry["test"]["accuracy"]
        assert sum(b["n"] for b in entry["by_length"]) == len(truth)
        assert entry["bytes_on_disk"] > 0
        assert entry["speed"]["1"]["documents_per_second"] > 0
        assert [point["examples"] for point in entry["curve"]] == [30, 200, 270]
        assert not any((tmp_path / "out" / "systems" / entry["name"]).glob("curve-*/"))
    svm, reference = comparison["systems"]
    assert reference["versus_reference"] is None
    only = int((right["tfidf-svm"] & ~right["nb-logreg"]).sum())
    other = int((~right["tfidf-svm"] & right["nb-logreg"]).sum())
    versus = svm["versus_reference"]
    assert (versus["only_this_right"], versus["only_reference_right"]) == (only, other)
    if only + other:
        assert versus["mcnemar_p"] == pytest.approx(binomtest(only, only + other).pvalue)
    assert 0.5 < svm["test"]["accuracy"] < 1  # a fifth of the texts says nothing
    page = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    assert "<b>dog</b>" not in page
    assert (tmp_path / "out" / "comparison.md").is_file()
    plots = sorted((tmp_path / "out" / "plots").iterdir())
    assert {"parameters.svg", "training.svg", "size.svg"} <= {path.name for path in plots}
    assert all(ElementTree.parse(path).getroot().tag.endswith("svg") for path in plots)


def test_a_second_run_fits_only_what_is_missing(pets: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare(pets, out, "tfidf-svm")
    first = out / "systems" / "tfidf-svm"
    before = {file: file.stat().st_mtime_ns for file in first.iterdir()}
    stale = out / "plots" / "of_an_earlier_comparison.svg"
    stale.touch()
    assert set(compare(pets, out, "tfidf-svm", "nb-logreg")["systems"]) == {
        *("tfidf-svm", "nb-logreg"),
    }
    assert not stale.exists()
    assert {file: file.stat().st_mtime_ns for file in first.iterdir()} == before
    with pytest.raises(UserError, match=r"seed 0, not 1; .* --overwrite"):
        compare(pets, out, "tfidf-svm", seed=1)
    compare(pets, out, "tfidf-svm", seed=1, overwrite=True)
    assert not (out / "systems" / "nb-logreg").exists()


def test_a_comparison_that_is_killed_goes_on(script: Script, pets: Path, tmp_path: Path) -> None:
    """Killed while the network trains: the linear model is kept, the network finished later."""
    arguments = [
        *("--dataset", str(pets), "--models", "tfidf-svm", "kim-cnn", "--rounds", "1"),
        *("--reference", "tfidf-svm", "--output-dir", "out", "--threads", "1"),
    ]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "compare_text.py"), *arguments],
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
    )
    checkpoints = tmp_path / "out" / "systems" / "kim-cnn" / "checkpoints"
    deadline = time.monotonic() + 200
    while not any(checkpoints.glob("*/*/complete.json")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    done = tmp_path / "out" / "systems" / "tfidf-svm" / "system.json"
    before = done.stat().st_mtime_ns
    time.sleep(1)  # the child notices that its parent is gone, or comes to its end
    systems = script("compare_text", *arguments).result["systems"]
    assert set(systems) == {"tfidf-svm", "kim-cnn"}
    assert all(entry["documents_per_second"] > 0 for entry in systems.values())
    assert read(tmp_path / "out")["reference"] == "tfidf-svm"
    assert done.stat().st_mtime_ns == before


def test_ctrl_c_ends_the_children_too(pets: Path, tmp_path: Path) -> None:
    command = [
        *(sys.executable, str(ROOT / "scripts" / "compare_text.py"), "--dataset", str(pets)),
        *("--models", "kim-cnn", "--rounds", "0", "--output-dir", "out"),
        *("--threads", "1"),
    ]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell lets its background jobs ignore Ctrl-C; the tests may run in one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    begun = tmp_path / "out" / "systems" / "kim-cnn" / "options.json"
    deadline = time.monotonic() + 200
    while not begun.is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert begun.is_file()
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err


def test_a_system_that_fails_is_a_row_and_the_others_are_there(pets: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    with pytest.raises(UserError, match=r"not everything succeeded: broken: .*config\.json"):
        compare(pets, tmp_path / "out", str(tmp_path / "broken"), "tfidf-svm")
    broken, svm = read(tmp_path / "out")["systems"]
    assert "config.json" in broken["error"]
    assert svm["test"]["accuracy"] > 0.5


def test_a_saved_run_is_compared_by_the_answers_it_left(trained: Path, tmp_path: Path) -> None:
    result = compare("demo_reviews", tmp_path / "out", str(trained), rounds=1)
    (run,) = read(tmp_path / "out")["systems"]
    metrics = json.loads((trained / "metrics.json").read_text())
    assert run["kind"] == "nin"
    assert run["test"]["accuracy"] == metrics["test"]["accuracy"]
    assert run["train_seconds"] == metrics["fit_seconds"] < metrics["total_seconds"]
    assert result["systems"][run["name"]]["documents_per_second"] > 0
    left = load_file(tmp_path / "out" / "systems" / run["name"] / "answers.safetensors")
    assert (left["test"] == load_file(trained / "answers.safetensors")["test"]).all()


def test_a_saved_run_of_other_classes_is_refused(trained: Path, pets: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="knows the classes negative, positive"):
        compare(pets, tmp_path / "out", str(trained))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"models": ["no-such"]}, "no system 'no-such'"),
        ({"models": ["frozen:no-such"]}, "no system 'frozen:no-such'"),
        ({"models": ["frozen:"]}, "no system 'frozen:'"),
        ({"models": ["tfidf-svm", "tfidf-svm"]}, "twice"),
        ({"reference": "bert"}, "--reference bert is not among"),
        ({"curve": [5]}, "--curve must name"),
        ({"curve": [10**6]}, "--curve must name"),
        ({"rounds": -1}, "--rounds must be"),
        ({"threads": 0}, "--threads must be"),
    ],
)
def test_mistakes_are_refused_before_anything_is_fitted(
    changes: dict, words: str, pets: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        compare(pets, tmp_path / "out", "tfidf-svm", **changes)
    assert not (tmp_path / "out" / "systems").exists()


@pytest.mark.parametrize("damage", ["{", "[]", "7"])
def test_damaged_options_are_said_to_be_that(damage: str, pets: Path, tmp_path: Path) -> None:
    compare(pets, tmp_path / "out", "tfidf-svm", limit=60)
    (tmp_path / "out" / "comparison_options.json").write_text(damage)
    with pytest.raises(UserError, match=r"is damaged; give --overwrite"):
        compare(pets, tmp_path / "out", "tfidf-svm", limit=60)


# ---- parts -------------------------------------------------------------------------------------


def test_names_are_short_distinct_and_safe() -> None:
    specs = ["a/b/minilm", "c/minilm", "frozen:c/minilm", "../..", "architecture:bert-base"]
    names = system_names(specs)
    assert list(names.values()) == specs
    assert list(names) == [
        *("minilm", "minilm-2", "frozen-minilm", "system", "architecture-bert-base"),
    ]


def test_quick_is_a_subset() -> None:
    assert with_defaults(CompareOptions(quick=True)).limit == 1000
    assert with_defaults(CompareOptions(quick=True, limit=7)).limit == 7
    assert with_defaults(CompareOptions()).limit is None
    rounds = [CompareOptions(), CompareOptions(quick=True), CompareOptions(quick=True, rounds=0)]
    assert [with_defaults(options).rounds for options in rounds] == [5, 2, 0]


def test_the_default_leaves_out_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "fasttext" not in with_defaults(CompareOptions()).models
    assert "fasttext" in with_defaults(CompareOptions(models=["fasttext"])).models


def test_paired_difference_counts_and_tests_like_a_coin() -> None:
    this = np.array([1, 1, 1, 1, 1, 1, 0, 1] * 5, dtype=bool)
    other = np.array([1, 1, 0, 0, 0, 0, 1, 1] * 5, dtype=bool)
    result = paired_difference(this, other)
    assert (result["only_this_right"], result["only_reference_right"]) == (20, 5)
    assert result["difference"] == pytest.approx(15 / 40)
    low, high = result["interval_95"]
    assert 0 < low < 15 / 40 < high < 1
    assert result["mcnemar_p"] == pytest.approx(binomtest(20, 25).pvalue)
    same = paired_difference(this, this)
    assert (same["difference"], same["mcnemar_p"]) == (0.0, 1.0)


class Slow:
    """A system that takes a known time for each text, and counts its calls."""

    kind = "linear"
    description = ""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def probabilities(self, texts: list[str]) -> np.ndarray:
        self.batches.append(len(texts))
        time.sleep(0.0005 * len(texts))
        return np.ones((len(texts), 2)) / 2

    def cost(self, texts: list[str]) -> dict[str, float]:
        return {"parameters": 3, "macs": 10.0 * len(texts)}


def test_speeds_are_texts_by_seconds() -> None:
    """Every text takes at least half a millisecond, so no rate may be above 2,000 a second."""
    sample = Sample.of(["one two three four"] * 300)
    system = Slow()
    cost = timing.measure_cost(system, sample)  # type: ignore[arg-type]
    assert cost == {"parameters": 3, "macs_per_token": 2.5}
    timing.warm_up(system, sample)  # type: ignore[arg-type]
    system.batches.clear()
    rounds = [timing.time_round(system, sample) for _ in range(3)]  # type: ignore[arg-type]
    assert set(system.batches) >= {1, 32, 300}
    summary = timing.summarize(rounds, sample)
    for batch in timing.BATCHES:
        speed = summary[batch]
        assert 0 < speed["documents_per_second"] <= 2000
        assert speed["tokens_per_second"] == pytest.approx(4 * speed["documents_per_second"])
        low, high = speed["documents_per_second_range"]
        assert low <= speed["documents_per_second"] <= high
    assert 0.5 <= summary["latency_p50_ms"] <= summary["latency_p99_ms"]
    assert summary["latency_n"] == 150


def test_the_fastest_batch_is_found_and_too_large_ones_are_passed_over() -> None:
    class Network(Slow):
        batch_tokens = 0

        def probabilities(self, texts: list[str]) -> np.ndarray:
            if self.batch_tokens == timing.BATCH_TOKENS[2]:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            time.sleep(0.02 if self.batch_tokens == timing.BATCH_TOKENS[1] else 0.08)
            return np.ones((len(texts), 2)) / 2

    cost = timing.measure_cost(Network(), Sample.of(["a b"] * 9))  # type: ignore[arg-type]
    assert cost["batch_tokens"] == timing.BATCH_TOKENS[1]


def test_every_system_gets_the_same_sample() -> None:
    texts = [f"text {i} " + "word " * (i % 50) for i in range(9000)]
    one, two = Sample.of(texts), Sample.of(texts)
    assert one.texts == two.texts
    assert one.tokens.sum() >= timing.BULK_TOKENS
    assert len(Sample.of(["short"] * 9000).texts) == timing.BULK_TEXTS[1]
    assert len(Sample.of(["short"] * 9).texts) == 9


def test_a_folder_is_not_taken_over_from_another_system_of_its_name(
    pets: Path, tmp_path: Path
) -> None:
    """frozen:a/bert and frozen:b/bert are both called frozen-bert when they are alone."""
    texts = load_text_dataset(str(pets)).splits["train"].texts
    specs = {
        place: f"frozen:{tiny_bert(tmp_path / place / 'bert', texts, classifier=False)}"
        for place in ("a", "b")
    }
    folders = tmp_path / "out" / "systems"
    for place in ("a", "b", "a"):
        compare(pets, tmp_path / "out", f"{specs[place]}/", reference=f"{specs[place]}/")
        fitted = {
            json.loads(path.read_text(encoding="utf-8"))["spec"]: path.stat().st_mtime_ns
            for path in folders.glob("*/system.json")
        }
        assert specs[place] in fitted
        if place == "a" and len(fitted) == 1:
            first = fitted[specs["a"]]
    assert fitted.keys() == set(specs.values())  # neither has been discarded
    assert fitted[specs["a"]] == first  # nor made again
    assert len(read(tmp_path / "out")["systems"]) == 1


def test_files_of_somebody_else_are_left_alone(pets: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "plots").mkdir(parents=True)
    (tmp_path / "out" / "plots" / "mine.svg").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        compare(pets, tmp_path / "out", "tfidf-svm")
    assert (tmp_path / "out" / "plots" / "mine.svg").read_text() == "mine"


def test_a_reference_that_fails_is_said_to_have_failed(pets: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    with pytest.raises(UserError, match="not everything succeeded"):
        compare(pets, tmp_path / "out", "tfidf-svm", f"frozen:{broken}", reference="frozen-broken")
    notes = " ".join(read(tmp_path / "out")["notes"])
    assert "frozen-broken failed: the others are tested against" in notes


def test_finished_runs_are_described_by_what_they_are(
    pets: Path, trained: Path, tmp_path: Path
) -> None:
    """Not by what they began with; and they have no learning curve."""
    again = tmp_path / "again"
    options = {"epochs": 2, "ngrams": 0, "patience": 1, "quiet": True}
    dataset = load_text_dataset("demo_reviews", limit=60)
    train_text(TrainOptions(limit=60, model=str(trained), output_dir=again, **options), dataset)
    result = compare("demo_reviews", tmp_path / "out", str(again), limit=60, curve=[30])
    assert list(result["systems"]) == ["again"]
    comparison = read(tmp_path / "out")
    (system,) = comparison["systems"]
    assert system["kind"] == "nin"
    assert system["description"].startswith("Network in Network; pass ")
    assert "no learning curve of again" in " ".join(comparison["notes"])


def test_a_system_that_cannot_be_timed_leaves_the_others_their_figures(
    pets: Path, tmp_path: Path
) -> None:
    compare(pets, tmp_path / "out", "tfidf-svm", "nb-logreg")
    (tmp_path / "out" / "systems" / "nb-logreg" / "weights.safetensors").unlink()
    with pytest.raises(UserError, match="nb-logreg could not be timed"):
        compare(pets, tmp_path / "out", "tfidf-svm", "nb-logreg", rounds=1)
    svm, nb = read(tmp_path / "out")["systems"]
    assert svm["speed"]["best"]["documents_per_second"] > 0
    assert nb["speed"] is None
    assert nb["test"]["accuracy"] > 0.5
