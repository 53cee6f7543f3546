"""The spaCy component: what it writes to `doc.cats`, and that a pipeline brings its model along."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import spacy
from spacy.training import Example
from transformers import pipeline

import nin_text.spacy_component  # noqa: F401  registers it, also where nin-text is not installed
from nin_text.errors import UserError

TEXTS = ["The plot is dull .", "The cast was witty and the plot was not bland .", "x"]


@pytest.fixture(scope="module")
def nlp(trained: Path) -> spacy.Language:
    nlp = spacy.blank("en")
    nlp.add_pipe("nin_textcat", config={"model": str(trained)})
    return nlp


def test_cats_are_the_scores_of_the_pipeline_of_transformers(trained: Path, nlp) -> None:
    classify = pipeline("text-classification", model=str(trained), top_k=None)
    for doc, scores in zip(nlp.pipe(TEXTS), classify(TEXTS), strict=True):
        assert doc.cats == pytest.approx({s["label"]: s["score"] for s in scores}, abs=1e-5)


def test_batches_and_single_documents_get_the_same_cats(nlp) -> None:
    for size in (1, 2, 64):
        for text, doc in zip(TEXTS, nlp.pipe(TEXTS, batch_size=size), strict=True):
            assert doc.cats == pytest.approx(nlp(text).cats, abs=1e-5)


def test_a_document_without_text_has_equally_likely_classes(nlp) -> None:
    assert nlp("").cats == {"negative": 0.5, "positive": 0.5}
    cats = [doc.cats for doc in nlp.pipe(["", TEXTS[0], ""])]
    assert cats[0] == cats[2] != cats[1]


def test_a_saved_pipeline_gives_the_same_cats_in_a_fresh_process(nlp, tmp_path: Path) -> None:
    nlp.to_disk(tmp_path / "saved")
    code = (
        "import json, sys, spacy, nin_text.spacy_component\n"
        "nlp = spacy.load(sys.argv[1])\n"
        "print(json.dumps(nlp(sys.argv[2]).cats))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "saved"), TEXTS[1]],
        capture_output=True,
        text=True,
        check=True,
    )
    cats = json.loads(finished.stdout.splitlines()[-1])
    assert cats == pytest.approx(nlp(TEXTS[1]).cats, abs=1e-6)
    names = {path.suffix for path in (tmp_path / "saved" / "nin_textcat").iterdir()}
    assert names <= {".json", ".safetensors"}


def test_what_else_is_in_a_folder_is_left_alone(nlp, tmp_path: Path) -> None:
    (tmp_path / "mine" / "thesis").mkdir(parents=True)
    (tmp_path / "mine" / "thesis" / "a.txt").write_text("years of work")
    component = nlp.get_pipe("nin_textcat")
    for _ in range(2):  # also over what was saved
        component.to_disk(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis" / "a.txt").read_text() == "years of work"
    other = spacy.blank("en").add_pipe("nin_textcat")
    assert other.from_disk(tmp_path / "mine").labels == component.labels


def test_a_pipeline_goes_through_bytes(nlp) -> None:
    other = spacy.blank("en")
    other.add_pipe("nin_textcat")
    other.from_bytes(nlp.to_bytes())
    assert other(TEXTS[0]).cats == pytest.approx(nlp(TEXTS[0]).cats, abs=1e-6)


def test_it_is_scored_as_other_text_categorizers_are(nlp) -> None:
    gold = {"cats": {"negative": 1.0, "positive": 0.0}}
    examples = [Example.from_dict(nlp.make_doc(TEXTS[0]), gold)]
    assert nlp.evaluate(examples)["cats_micro_f"] == 1.0


@pytest.mark.parametrize(
    ("model", "message"), [("", "has no model"), ("nowhere/at/all", "no model could be loaded")]
)
def test_a_missing_model_is_one_sentence(model: str, message: str) -> None:
    nlp = spacy.blank("en")
    nlp.add_pipe("nin_textcat", config={"model": model})
    with pytest.raises(UserError, match=message):
        nlp("a text")


def test_a_length_below_zero_is_refused(trained: Path) -> None:
    with pytest.raises(UserError, match="must not be -3"):
        spacy.blank("en").add_pipe("nin_textcat", config={"model": str(trained), "max_length": -3})


def test_what_fails_goes_to_the_error_handler(nlp, monkeypatch: pytest.MonkeyPatch) -> None:
    component, seen = nlp.get_pipe("nin_textcat"), []

    def fail(docs):
        raise RuntimeError("on purpose")

    monkeypatch.setattr(component, "predict", fail)
    nlp.set_error_handler(lambda name, proc, docs, error: seen.append((name, len(docs))))
    try:
        assert list(nlp.pipe(TEXTS, batch_size=2)) == []
    finally:
        nlp.set_error_handler(spacy.util.raise_error)
    assert seen == [("nin_textcat", 2), ("nin_textcat", 1)]
