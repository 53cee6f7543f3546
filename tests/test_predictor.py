"""Predictor: the answers of the saved model, from raw texts, fast and from any thread."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_export import make_folder
from tokenizers import processors
from transformers import AutoTokenizer

from nin_text import Predictor, UserError, load
from nin_text.demo_data import generate
from nin_text.evaluation import predict_logits, softmax
from nin_text.predictor import LONG_TEXT
from nin_text.tokenization import encode
from nin_text.word_table import CHUNK_BYTES

REVIEWS = generate("demo_reviews")["test"][0][:200]
TEXTS = ["", " ", "A fine film.", "\U0001f600 zzz", "Dull, dull. " * 300, "\ud800", *REVIEWS[:50]]


def defined_logits(model: str, texts: list[str], max_length: int | None = None) -> np.ndarray:
    network, tokenizer = load(model)
    return predict_logits(network, encode(tokenizer, texts, max_length), pad_token_id=0)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    predictor = Predictor("imdb-sentiment", precision="fp32", device="cpu")
    predictor.threads = 2  # whatever the machine
    return predictor


@pytest.mark.parametrize("name", ["imdb-sentiment", "ag-news-topics"])
def test_it_answers_as_the_model_does(name: str) -> None:
    predictor = Predictor(name, precision="fp32", device="cpu")
    expected = defined_logits(name, TEXTS)
    np.testing.assert_allclose(predictor.logits(TEXTS), expected, atol=1e-5 * 10, rtol=0)
    probabilities = predictor.predict_proba(TEXTS)
    np.testing.assert_allclose(probabilities, softmax(expected), atol=1e-5)
    assert probabilities.dtype == np.float32
    names = predictor.label_names
    assert predictor.predict(TEXTS) == [names[i] for i in expected.argmax(axis=1)]


def test_bfloat16_changes_probabilities_by_less_than_a_hundredth(predictor: Predictor) -> None:
    fast = Predictor("imdb-sentiment", precision="bf16", device="cpu")
    assert fast.precision == "bf16"
    difference = fast.predict_proba(TEXTS) - predictor.predict_proba(TEXTS)
    assert 0 < np.abs(difference).max() < 0.01


def test_no_texts(predictor: Predictor) -> None:
    assert predictor.predict([]) == []
    assert predictor.predict_proba([]).shape == (0, 2)
    assert predictor.predict(iter(["Superb."])) == ["positive"]
    table = pd.DataFrame({"good": ["a"], "bad": ["b"]})
    for wrong in ({"a": "b"}, ["a", None], [None], [3, "a"], table):
        with pytest.raises(TypeError, match="texts must be"):
            predictor.predict(wrong)
    with pytest.raises(TypeError, match="one str"):
        predictor.predict("Superb.")


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(12)), st.integers(1, 12))
def test_a_text_is_answered_alike_in_any_company(
    predictor: Predictor, order: list[int], size: int
) -> None:
    texts = TEXTS[:12]
    alone = np.concatenate([predictor.logits([text]) for text in texts])
    together = predictor.logits([texts[i] for i in order[:size]])
    np.testing.assert_allclose(together, alone[order[:size]], atol=1e-5, rtol=0)


def test_eight_threads_get_the_answers_of_one(predictor: Predictor) -> None:
    texts = REVIEWS * 8  # enough for several jobs
    expected = predictor.logits(texts)
    assert len(list(predictor.jobs(texts))) > 1
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(predictor.logits, [texts, texts[::-1], texts[:3], [""]] * 4))
    for i in range(0, 16, 4):
        np.testing.assert_allclose(answers[i], expected, atol=1e-5)
        np.testing.assert_allclose(answers[i + 1], expected[::-1], atol=1e-5)
        np.testing.assert_allclose(answers[i + 2], expected[:3], atol=1e-5)


@pytest.mark.parametrize("name", ["imdb-sentiment", "ag-news-topics"])
def test_parts_of_a_long_text_are_worked_on_at_once(name: str) -> None:
    predictor = Predictor(name, precision="fp32", device="cpu")
    predictor.threads = 3
    text = " ".join(REVIEWS * 45) + " b\u00e9" * 3000
    assert len(text) > 2 * CHUNK_BYTES  # tokenized in parts, too
    (answer,) = predictor.logits([text])
    assert predictor._pool is not None
    (expected,) = defined_logits(name, [text])
    assert np.abs(answer - expected).max() <= 1e-4 * np.abs(expected).max()  # its softmax rounds
    np.testing.assert_allclose(predictor._answer([text], map)[0], answer, rtol=1e-6)
    together = predictor.logits([text, "Superb.", text])
    np.testing.assert_allclose(together[[0, 2]], np.stack([answer] * 2), rtol=1e-5)


@pytest.mark.timeout(60)
def test_jobs_of_jobs_do_not_wait_for_each_other(predictor: Predictor) -> None:
    text = " ".join(REVIEWS * 13)
    assert len(text) > LONG_TEXT
    expected = predictor.logits([text])
    for answer in predictor.map(lambda text: predictor.logits([text]), [text] * 4):
        np.testing.assert_allclose(answer, expected, rtol=1e-5)


FORK = """
import os
from nin_text import Predictor
predictor = Predictor("imdb-sentiment", device="cpu")
predictor.threads = 2
texts = ["A fine film. " * 2000] * 20
predictor.logits(texts)
child = os.fork()
if not child:
    predictor.logits(texts)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_process_has_threads_of_its_own() -> None:
    command = [sys.executable, "-c", FORK]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert out.stdout.split() == ["7"]


def test_the_default_dtype_of_torch_does_not_matter() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        predictor = Predictor("imdb-sentiment", precision="fp32", device="cpu")
        alone, together = predictor.logits(["Superb."]), predictor.logits(["Superb.", "Dull."])
    finally:
        torch.set_default_dtype(torch.float32)
    assert alone.dtype == together.dtype == np.float32
    np.testing.assert_allclose(together[:1], alone, atol=1e-5)


def test_its_threads_leave_those_of_torch_alone() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        predictor = Predictor("imdb-sentiment", device="cpu")
        predictor.predict(REVIEWS * 8)
        assert predictor._pool is not None
        assert set(predictor._pool.map(lambda _: torch.get_num_threads(), range(20))) == {1}
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as other:
            assert other.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)


def test_jobs_are_all_texts_in_order(predictor: Predictor) -> None:
    for texts in ([], [""], [""] * 1000, REVIEWS * 20, ["x" * 10**6, "y", "z" * 10**6, ""]):
        jobs = list(predictor.jobs(texts))
        assert [text for job in jobs for text in job] == list(texts)
        assert all(jobs)
    jobs = list(predictor.jobs(["x" * 10**6, "y", "z" * 10**6]))
    assert len(jobs) >= 2


def test_every_thread_gets_as_many_jobs_of_about_the_same_size(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictor, "threads", 3)
    for texts, expected in ((2_000, 3), (8_000, 6), (400, 3), (50, 1)):
        sizes = [len(job) for job in predictor.jobs(["x" * 150] * texts)]
        assert len(sizes) == expected
        assert max(sizes) - min(sizes) <= 1


# ---- other models and tokenizers -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["nin-text-paper", "nin-text-base", "dilated"])
def test_models_of_every_shape(tmp_path: Path, name: str) -> None:
    folder = make_folder(tmp_path / "model", name, ngram_size=2, ngram_buckets=512)
    texts = ["a b c", "", "h " * 300, "b a", "zzz a"]
    expected = defined_logits(str(folder), texts)
    actual = Predictor(folder, precision="fp32", device="cpu").logits(texts)
    np.testing.assert_allclose(actual, expected, atol=1e-5 * max(1, np.abs(expected).max()))


def test_a_tokenizer_from_elsewhere_with_special_tokens(tmp_path: Path) -> None:
    """Its own rules hold: special tokens around each text, and a limit on its length."""
    folder = make_folder(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[MASK] $A [PAD]", special_tokens=[("[MASK]", 2), ("[PAD]", 0)]
    )
    tokenizer.model_max_length = 6
    tokenizer.save_pretrained(folder)
    texts = ["a b c", "", "h b " * 30, "\ud800 a"]
    predictor = Predictor(folder, precision="fp32", device="cpu")
    assert predictor.tokenizer.words is None
    ids, lengths = predictor.tokenizer.encode(texts)
    expected = encode(AutoTokenizer.from_pretrained(folder), texts)
    assert lengths.tolist() == [len(row) for row in expected] == [5, 2, 6, 4]
    assert ids.tolist() == np.concatenate(expected).tolist()
    np.testing.assert_allclose(
        predictor.logits(texts), defined_logits(str(folder), texts), atol=1e-5
    )


def test_texts_are_cut_as_in_training_unless_told_otherwise(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    text = ["a b c d e f"]
    whole, cut = (defined_logits(str(folder), text, length) for length in (None, 3))
    metrics: dict[str, Any] = {"options": {"max_length": 3}}
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    for length, expected in ((None, cut), (3, cut), (0, whole), (100, whole)):
        predictor = Predictor(folder, precision="fp32", device="cpu", max_length=length)
        np.testing.assert_allclose(predictor.logits(text), expected, atol=1e-5)


def test_what_is_no_model_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no model 'nowhere'"):
        Predictor("nowhere")
    with pytest.raises(UserError, match=r"no readable config\.json"):
        Predictor(tmp_path)
    folder = make_folder(tmp_path / "model")
    for change, message in (
        ({"model_type": "bert"}, "of type bert"),
        ({"problem_type": "multi_label_classification"}, "multi label classification"),
    ):
        other = shutil.copytree(folder, tmp_path / message.replace(" ", "-"))
        config = json.loads((other / "config.json").read_text(encoding="utf-8"))
        (other / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
        with pytest.raises(UserError, match=message):
            Predictor(other)
    for damaged in ("model.safetensors", "tokenizer.json"):
        other = shutil.copytree(folder, tmp_path / damaged)
        (other / damaged).write_bytes(b"{")
        with pytest.raises(UserError, match="could be loaded"):
            Predictor(other)


def test_fields_that_a_configuration_leaves_out_have_their_defaults(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "inception", kernel_sizes=[[3]], dilations=[1])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["pool"], config["ngram_size"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    texts = ["a b c", "d"]
    actual = Predictor(folder, precision="fp32", device="cpu").logits(texts)
    np.testing.assert_allclose(actual, defined_logits(str(folder), texts), atol=1e-5)


def test_no_heavy_library_is_imported(tmp_path: Path) -> None:
    """The first answer of a process is not to wait for what it does not need."""
    folder = make_folder(tmp_path / "model", "nin-text-small", ngram_size=2, ngram_buckets=512)
    program = (
        "import sys; from nin_text import Predictor; "
        "print(*Predictor('imdb-sentiment').predict(['Superb.'])); "
        f"Predictor({str(folder)!r}).predict(['a b']); "
        "heavy = {'transformers', 'sklearn', 'scipy', 'pandas', 'matplotlib', 'datasets'}; "
        "sys.exit(str(heavy & sys.modules.keys()) if heavy & sys.modules.keys() else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "positive\n"
