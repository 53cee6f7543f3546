"""Exported models: equal to PyTorch, checked before they are written, used without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest
import torch
from conftest import ROOT, Finished, Script, in_new_interpreter
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from test_text import VARIANTS, VOCABULARY, make_model, pad, random_texts

from nin_text import NiNTextForSequenceClassification, export, train_tokenizer
from nin_text.configuration import NETWORKS, BaselineConfig
from nin_text.errors import UserError
from nin_text.inference import predict_text
from nin_text.networks import BaselineForSequenceClassification
from nin_text.options import ExportOptions, PredictOptions

MULTI = {"problem_type": "multi_label_classification"}
TEXTS = [
    "The plot is witty .",
    "The plot is not witty at all .",
    "",
    "\U0001f600 zzz",
    "Dull . " * 90,
]


def make_folder(path: Path, name: str = "nin-text-small", **overrides: Any) -> Path:
    """A model with random weights and a tokenizer, as a run folder has them."""
    tokenizer = train_tokenizer([" ".join("abcdefgh")] * 2, kind="word")
    model = make_model(name, vocab_size=len(tokenizer), **overrides)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def run(folder: Path, **options: Any) -> dict[str, Any]:
    return export.export_onnx(ExportOptions(model=str(folder), **options))


def properties(path: Path) -> dict[str, Any]:
    return {p.key: json.loads(p.value) for p in onnx.load(path).metadata_props}


# ---- the model on padded batches ---------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=6),
    st.sampled_from(sorted(VARIANTS)),
    st.sampled_from(["mean", "attention"]),
    st.sampled_from([0, 1, 3]),
    st.sampled_from([2, 5]),
    st.booleans(),
)
def test_the_padded_model_equals_the_packed_one(
    lengths: list[int], name: str, pooling: str, ngrams: int, classes: int, left: bool
) -> None:
    sizes = {"ngram_size": ngrams, "ngram_buckets": 64, "num_labels": classes}
    model = make_model(name, pooling=pooling, **sizes)
    batch = pad([ids % 9 for ids in random_texts(lengths)], left=left, extra=1)
    with torch.inference_mode():
        expected = model(**batch).logits
        probabilities, logits = export.PaddedClassifier(model)(**batch)
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(logits, expected, atol=1e-5 * scale, rtol=0)
    torch.testing.assert_close(probabilities, logits.softmax(dim=1))


def test_an_ngram_that_recurs_in_a_text_counts_once() -> None:
    branch = make_model("n-grams", ngram_size=1).ngrams
    ids, mask = torch.tensor([[7, 7, 8], [7, 8, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    recurring, once = export.ngram_evidence(branch, ids, mask)
    assert once.abs().max() > 0.1
    torch.testing.assert_close(recurring, once)


def test_tokens_are_moved_to_the_left_wherever_padding_is() -> None:
    ids, mask = torch.tensor([[9, 1, 9, 2], [9, 9, 9, 9]]), torch.tensor([[0, 1, 0, 1], [0] * 4])
    aligned, inside = export.align(ids, mask)
    assert aligned[inside].tolist() == [1, 2]
    assert inside.tolist() == [[True, True, False, False, False], [False] * 5]


# ---- ONNX --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nin-text-base", {"ngram_size": 0, "num_labels": 2}),
        ("nin-text-small", {"ngram_size": 1, "num_labels": 5, **MULTI}),
        ("nin-text-paper", {"ngram_size": 3, "num_labels": 2}),
        ("inception", {"ngram_size": 3, "num_labels": 5, "dilations": [2]}),
    ],
    ids=lambda value: value if isinstance(value, str) else f"n{value['ngram_size']}",
)
def test_every_preset_gives_the_same_in_onnx(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = make_model(name, ngram_buckets=256, **options)
    export.write_onnx(export.PaddedClassifier(model), tmp_path / "model.onnx", export.OUTPUTS)
    session = export.open_session(tmp_path / "model.onnx")
    lengths = [[1], [2], [700], [0, 3], [1, 1, 1], list(range(40))]
    ragged = (pad(random_texts(sizes, seed), extra=1) for seed, sizes in enumerate(lengths))
    batches = ((batch["input_ids"], batch["attention_mask"]) for batch in ragged)
    assert max(export.difference(model, session, batches).values()) <= 1e-5
    found = export.difference(model, session, export.probes(VOCABULARY, 0))
    assert max(found.values()) <= 1e-5
    probabilities, logits = export.run(session, *map(torch.from_numpy, np.ones((2, 1, 4), int)))
    assert probabilities.shape == logits.shape == (1, options["num_labels"])
    nothing = torch.zeros((2, 0), dtype=torch.int64)  # what a tokenizer makes of two empty texts
    assert (export.run(session, nothing, nothing)[1] == 0).all()
    # Another model is found out: the comparison is not of something with itself.
    other = make_model(name, ngram_buckets=256, **options)
    with torch.no_grad():
        other.classifier.bias += torch.arange(options["num_labels"])
    wrong = export.difference(other, session, export.probes(VOCABULARY, 0))
    assert min(wrong.values()) > 1e-3


def test_ngrams_that_were_saved_in_float8_lose_nothing_in_eight_bits(tmp_path: Path) -> None:
    """Most weights are far below the largest; even steps of a 127th of it would leave zeros."""
    model = make_model("n-grams", ngram_size=1, ngram_buckets=4096)
    with torch.no_grad():
        for parameter in model.parameters():  # n-grams alone are looked at
            parameter.zero_()
        model.ngrams.bias.zero_()
        model.ngrams.weight.normal_(std=0.01)
        model.ngrams.weight[0] = 4.0
        model.ngrams.weight.copy_(model.ngrams.weight.to(torch.float8_e4m3fn).float())
    files = tmp_path / "model.onnx", tmp_path / "model.int8.onnx"
    export.write_onnx(export.PaddedClassifier(model), files[0], export.OUTPUTS)
    export.quantize(*files)
    onnx.checker.check_model(files[1], full_check=True)
    ids = torch.arange(1, VOCABULARY)[:, None]
    sessions = map(export.open_session, files)
    exact, rounded = (export.run(session, ids, torch.ones_like(ids))[1] for session in sessions)
    assert 0 < np.median(np.abs(exact)) < 4 / 127
    np.testing.assert_allclose(rounded, exact, rtol=1e-5, atol=1e-7)


# ---- the folder --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """What the script made of the trained model, and what it said."""
    place = tmp_path_factory.mktemp("exported")
    command = [ROOT / "scripts" / "export_onnx.py", "--model", trained, "--output-dir", "out"]
    return place / "out", in_new_interpreter(command, place)


def test_a_run_becomes_a_folder_that_states_what_was_checked(
    exported: tuple[Path, Finished], trained: Path
) -> None:
    folder, finished = exported
    result = finished.result
    files = {"model.onnx", "model.int8.onnx", "tokenizer.json", "classifier.json"}
    assert {path.name for path in folder.iterdir()} == files
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    about = json.loads((folder / "classifier.json").read_text())
    assert about["labels"] == ["negative", "positive"]
    assert about["pad_token_id"] == 0
    assert about["max_length"] is None
    assert 0 < max(about["float32"]["probability"], about["float32"]["logit"]) <= 1e-5
    recorded = json.loads((trained / "metrics.json").read_text())["validation"]
    assert about["int8"]["checked"] == "accuracy"
    assert about["int8"]["texts"] == recorded["n"]
    # The n-grams of a finished run have seen these texts, those of the record had not.
    assert about["int8"]["accuracy_float32"] >= recorded["accuracy"] - 0.005
    assert about["int8"]["lost"] <= 0.003
    for name, figures in (("model.onnx", "float32"), ("model.int8.onnx", "int8")):
        stated = properties(folder / name)
        assert stated["parity"] == about[figures] == result[figures]
        assert stated["labels"] == about["labels"]
        assert result["bytes"][name] == (folder / name).stat().st_size
    assert result["bytes"]["model.int8.onnx"] < 0.5 * result["bytes"]["model.onnx"]


def test_a_run_saved_in_float16_is_exported_in_float32_and_into_the_run_by_default(
    tmp_path: Path,
) -> None:
    folder = make_folder(tmp_path / "run")
    NiNTextForSequenceClassification.from_pretrained(folder).half().save_pretrained(folder)
    before = {path.name for path in folder.iterdir()}
    result = run(folder, int8=False)
    assert result["output_dir"] == str(folder / "onnx")
    assert "int8" not in result
    assert {path.name for path in folder.iterdir()} == before | {"onnx"}
    names = {path.name for path in (folder / "onnx").iterdir()}
    assert names == {"model.onnx", "tokenizer.json", "classifier.json"}
    proto = onnx.load(folder / "onnx" / "model.onnx")
    kinds = {weights.data_type for weights in proto.graph.initializer}
    assert onnx.TensorProto.FLOAT16 not in kinds
    assert onnx.TensorProto.FLOAT in kinds


# ---- checks and refusals -----------------------------------------------------------------------


def test_nothing_is_written_when_onnx_differs_from_pytorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path / "run")
    before = set(tmp_path.rglob("*"))
    monkeypatch.setattr(export, "FLOAT32_BOUND", 0.0)
    with pytest.raises(UserError, match=r"differs from PyTorch .* nothing was written"):
        run(folder, int8=False)
    assert set(tmp_path.rglob("*")) == before
    with pytest.raises(UserError, match="differs from PyTorch"):
        export._checked_float32({"probability": float("nan"), "logit": 0.0})


def test_int8_that_misses_its_bound_is_not_written_and_an_older_one_is_removed(
    tmp_path: Path,
) -> None:
    """Random weights hardly tell one class from another: rounding them changes answers."""
    folder = make_folder(tmp_path / "run")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.int8.onnx").write_text("of another model")
    refusal = r"agrees with float32 in 9.*random tokens.* 0\.3 points are allowed.* not written"
    with pytest.raises(UserError, match=refusal):
        run(folder)
    assert not (folder / "onnx" / "model.int8.onnx").exists()
    about = json.loads((folder / "onnx" / "classifier.json").read_text())
    assert about["int8"]["checked"] == "agreement"
    assert about["int8"]["lost"] > about["int8"]["bound"] == 0.003
    assert properties(folder / "onnx" / "model.onnx")["parity"] == about["float32"]


def test_a_file_cut_short_by_a_full_disk_is_said_to_be_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime writes what there is room for and fails when it reads it again."""
    folder = make_folder(tmp_path / "run")

    def cut_short(source: Path, target: Path) -> None:
        source.write_bytes(source.read_bytes()[:-100])
        onnx.load(source)

    monkeypatch.setattr(export, "quantize", cut_short)
    with pytest.raises(DecodeError):
        run(folder)
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="No space left"):  # cli.run turns it into one sentence
        run(folder)
    assert not (folder / "onnx").exists()


def test_what_int8_loses() -> None:
    exact = np.array([[0.9, 0.1], [0.6, 0.4], [0.4, 0.6], [0.8, 0.2]])
    rounded = np.array([[0.8, 0.2], [0.4, 0.6], [0.6, 0.4], [0.8, 0.2]])
    labelled = export.compare_int8(exact, rounded, [0, 0, 0, 1])
    assert (labelled["accuracy_float32"], labelled["accuracy_int8"]) == (0.5, 0.5)
    assert labelled["lost"] == 0
    assert export.compare_int8(exact, rounded, None)["lost"] == 0.5
    each = export.compare_int8(np.array([[0.9, 0.8]]), np.array([[0.9, 0.4]]), None, True)
    assert each["agreement"] == 0.5


def test_a_model_is_not_overwritten_by_its_export(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match=r"run holds a model, which is kept"):
        run(folder, output_dir=folder, int8=False)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_multi_label_model_is_not_sent_for_a_data_set(tmp_path: Path) -> None:
    figures = {"checked": "agreement", "agreement": 0.9, "lost": 0.1, "texts": 9, "source": "x"}
    assert "--dataset" in str(export._complaint(figures, tmp_path, multi_label=False))
    several = str(export._complaint(figures, tmp_path, multi_label=True))
    assert "--dataset" not in several and "use model.onnx" in several


def test_int8_is_checked_on_the_texts_that_the_user_names(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "more.csv"
    pd.DataFrame({"text": TEXTS[:2] * 5, "label": ["positive", "negative"] * 5}).to_csv(path)
    result = run(trained, output_dir=tmp_path / "out", dataset=str(path))
    assert result["int8"]["texts"] == 10
    assert result["int8"]["source"] == f"validation texts: {path}"
    assert result["int8"]["accuracy_int8"] == 1
    (tmp_path / "other.csv").write_text("text,label\n" + "a,b\nc,d\n" * 9)
    with pytest.raises(UserError, match="'b'"):
        run(trained, output_dir=tmp_path / "out", dataset=str(tmp_path / "other.csv"))


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    network = BaselineConfig(**NETWORKS["kim-cnn"], vocab_size=20, num_labels=2)
    BaselineForSequenceClassification(network).save_pretrained(tmp_path / "cnn")
    train_tokenizer(["a b c"] * 2, kind="word").save_pretrained(tmp_path / "cnn")
    with pytest.raises(UserError, match=r"NiN text models alone, optimum"):
        run(tmp_path / "cnn")
    with pytest.raises(UserError, match=r"no model folder: it holds no config\.json"):
        run(tmp_path)
    folder = make_folder(tmp_path / "run", **MULTI)
    with pytest.raises(UserError, match=r"multi-label model .* leave out --dataset"):
        run(folder, dataset="demo_reviews")
    make_model("nin-text-small").nin.save_pretrained(tmp_path / "encoder")
    with pytest.raises(UserError, match="holds no classifier"):
        run(tmp_path / "encoder")


def test_a_missing_package_is_named_with_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"onnxscript is not installed.*nin-text\[onnx\]"):
        run(tmp_path)


def test_help_answers_at_once_with_examples(script: Script) -> None:
    help_text = script("export_onnx", "--help").out
    examples = help_text.partition("examples:\n")[2]
    assert examples.count("scripts/export_onnx.py") >= 3
    assert "--int8, --no-int8" in help_text
    assert "--device" not in help_text
    probe = (
        f"import sys, runpy; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_path({str(ROOT / 'scripts' / 'export_onnx.py')!r}, run_name='__main__')\n"
        f"except SystemExit: print(sorted({{'torch', 'transformers', 'numpy'}} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "[]"


# ---- without torch -----------------------------------------------------------------------------

# Runs a program in which these packages cannot be imported.
WITHOUT = """
import runpy, sys
for name in ("torch", "transformers", "nin_text", "scipy", "sklearn", "onnx"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def classify(folder: Path, *arguments: str, stdin: str = "") -> Finished:
    """Run a copy of classify_onnx.py beside the folder, isolated from this package and torch."""
    program = shutil.copy(ROOT / "scripts" / "classify_onnx.py", folder.parent)
    return in_new_interpreter(
        ["-I", "-c", WITHOUT, program, folder, *arguments], folder.parent, stdin
    )


def test_answers_without_torch_are_those_of_predict_text(
    exported: tuple[Path, Finished], trained: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(exported[0], tmp_path / "out")
    expected = list(predict_text(PredictOptions(model=str(trained), texts=TEXTS)))
    finished = classify(folder, *TEXTS)
    assert finished.status == 0, finished.err
    assert len(finished.lines) == len(TEXTS)
    for line, other in zip(finished.lines, expected, strict=True):
        assert set(line) == {"text", "label", "probability"}
        assert (line["text"], line["label"]) == (other["text"], other["label"])
        assert line["probability"] == pytest.approx(other["probability"], abs=2e-5)
    from_lines = classify(folder, stdin="".join(f"{text}\n" for text in TEXTS))
    assert from_lines.lines == finished.lines
    rounded = classify(folder, "--int8", *TEXTS).lines
    for line, other in zip(rounded, expected, strict=True):
        assert line["label"] == other["label"]
        assert line["probability"] == pytest.approx(other["probability"], abs=0.05)
    assert rounded != finished.lines


def test_a_multi_label_model_gives_every_label_of_a_text(tmp_path: Path) -> None:
    names = {"id2label": {0: "x", 1: "y", 2: "z"}, "label2id": {"x": 0, "y": 1, "z": 2}}
    folder = make_folder(tmp_path / "run", ngram_size=2, ngram_buckets=64, **names, **MULTI)
    run(folder, int8=False)
    model = NiNTextForSequenceClassification.from_pretrained(folder).eval()
    about = json.loads((folder / "onnx" / "classifier.json").read_text())
    assert about["multi_label"]
    vocabulary = train_tokenizer([" ".join("abcdefgh")] * 2, kind="word")
    several, texts = set(), ("a b c", "d e f g", "h", "a a a")
    for text, line in zip(texts, classify(folder / "onnx", *texts).lines, strict=True):
        expected = model(**vocabulary(text, return_tensors="pt")).logits.sigmoid()[0].tolist()
        assert line["labels"] == [n for n, p in zip("xyz", expected, strict=True) if p >= 0.5]
        assert line["label"] == "xyz"[int(np.argmax(expected))]
        assert line["probability"] == pytest.approx(max(expected), abs=1e-5)
        several.add(len(line["labels"]))
    assert several != {1}


def test_texts_are_cut_as_in_training(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "run")
    (folder / "metrics.json").write_text(json.dumps({"options": {"max_length": 2}}))
    run(folder, int8=False)
    whole, cut, other = classify(folder / "onnx", "a b", "a b c d e f g", "a c").lines
    assert whole["probability"] == cut["probability"] != other["probability"]


def test_a_reader_that_has_seen_enough_ends_it_without_complaint(
    exported: tuple[Path, Finished],
) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "classify_onnx.py"), str(exported[0])]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write("a\n" * 50)
        process.stdin.flush()
        assert process.stdout.readline().startswith("{")
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == ""
        assert process.wait() == 0


def test_a_wrong_folder_is_refused_in_one_sentence(
    exported: tuple[Path, Finished], tmp_path: Path
) -> None:
    folder = shutil.copytree(exported[0], tmp_path / "out")
    (folder / "model.onnx").write_bytes(b"damaged")
    (folder / "model.int8.onnx").unlink()
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "empty is no folder of export_onnx.py" in classify(empty, "a").complaint
    assert "holds no model.int8.onnx; leave out --int8" in classify(folder, "--int8", "a").complaint
    assert "out is no folder of export_onnx.py" in classify(folder, "a").complaint
