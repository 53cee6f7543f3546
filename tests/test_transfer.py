"""What is taken over from outside: embeddings, and the answers of a teacher."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_bert
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
)

from nin_text import NiNTextConfig, NiNTextForSequenceClassification, load, models, stages, transfer
from nin_text.errors import UserError
from nin_text.evaluation import predict_logits, softmax
from nin_text.options import CompareOptions, TrainOptions
from nin_text.runs import train_text
from nin_text.systems import SavedRun
from nin_text.tokenization import encode, train_tokenizer
from nin_text.training import EncodedTexts

CPU = torch.device("cpu")
WORDS = "a film plot good bad dull witty was the and".split()
QUICK = {"model": "nin-text-small", "limit": 100, "epochs": 2, "quiet": True}


@pytest.fixture
def fresh() -> tuple[NiNTextForSequenceClassification, PreTrainedTokenizerFast]:
    tokenizer = train_tokenizer([" ".join(WORDS)] * 2, kind="word")
    assert len(tokenizer) == len(WORDS) + 3
    torch.manual_seed(0)
    config = NiNTextConfig.from_preset("nin-text-small", vocab_size=len(tokenizer), num_labels=2)
    return NiNTextForSequenceClassification(config), tokenizer


def embeddings(model: torch.nn.Module) -> torch.Tensor:
    return model.get_input_embeddings().weight.detach().clone()  # type: ignore[operator]


def distances(vectors: np.ndarray) -> np.ndarray:
    """(n, D) to (n, n), in units of the mean distance: the same after any shift and rotation."""
    between = np.linalg.norm(vectors[:, None] - vectors[None], axis=2)
    return between / between.mean()


def vectors_of(words: list[str], size: int = 5) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(len(words), size)).astype(np.float32)


def write_vectors(path: Path, words: list[str], vectors: np.ndarray, header: bool = False) -> str:
    lines = [f"{len(words)} {vectors.shape[1]}"] if header else []
    lines += [
        " ".join([word, *map(repr, row.tolist())]) for word, row in zip(words, vectors, strict=True)
    ]
    text = "\n".join(lines) + "\n"
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return str(path)


def borrow(fresh, source: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings before and after."""
    model, tokenizer = fresh
    before = embeddings(model)
    stages.borrow_embeddings(model, tokenizer, str(source), None, CPU)
    return before, embeddings(model)


# ---- embeddings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "header"), [("v.txt", False), ("v.vec", True), ("v.vec.gz", True)]
)
def test_words_of_a_file_lie_to_each_other_as_their_vectors_do(
    tmp_path: Path, fresh, name: str, header: bool
) -> None:
    """Fewer components than the embeddings have, so that nothing is lost; the rest stays random."""
    words = [". . .", *WORDS[:6], "unheard"] if header else [*WORDS[:6], "unheard", ". . ."]
    vectors = vectors_of(words)  # ". . ." as in GloVe's files
    before, after = borrow(fresh, write_vectors(tmp_path / name, words, vectors, header))
    ids = fresh[1].convert_tokens_to_ids(WORDS[:6])
    own = vectors[[words.index(word) for word in WORDS[:6]]]
    np.testing.assert_allclose(
        distances(after[ids, :5].numpy()), distances(own), rtol=1e-4, atol=1e-5
    )
    # With the random rest, tokens that have a vector are about as long as those that have none.
    expected = (5 / before.shape[1]) ** 0.5
    assert after[ids, :5].norm(dim=1).mean() == pytest.approx(expected, rel=1e-4)
    after[ids, :5] = before[ids, :5]
    assert after.equal(before)


@pytest.mark.parametrize("scale", [1.0, 1e30])
def test_of_long_vectors_the_components_that_vary_most_are_kept(
    tmp_path: Path, fresh, scale: float
) -> None:
    size = fresh[0].config.embedding_size
    rng = np.random.default_rng(1)
    wide = vectors_of(WORDS, 4) @ np.linalg.qr(rng.normal(size=(size + 40, 4)))[0].T + 3.0
    wide = (wide * scale).astype(np.float32)
    _, after = borrow(fresh, write_vectors(tmp_path / "v.txt", WORDS, wide))
    own = after[fresh[1].convert_tokens_to_ids(WORDS)]
    np.testing.assert_allclose(
        distances(own.numpy()), distances(wide.astype(np.float64)), rtol=1e-3, atol=1e-4
    )
    assert own.norm(dim=1).mean() == pytest.approx(1, rel=1e-4)


def test_of_a_file_only_what_is_wanted_need_be_text(tmp_path: Path, fresh) -> None:
    """Real files hold words of broken bytes, blank lines, and words twice: the first counts."""
    lines = [b"\x80\x81 1 2", b"", b"film 1 2", b"plot\t3  5 \r", b"film 9 9", b"odd x y", b"a 0 1"]
    (tmp_path / "odd.txt").write_bytes(b"\n".join(lines))
    _, odd = borrow(fresh, tmp_path / "odd.txt")
    (tmp_path / "v.txt").write_bytes(b"film 1 2\nplot 3 5\na 0 1\n")
    _, plain = borrow(fresh, tmp_path / "v.txt")
    assert odd.equal(plain)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("film 1 2 3\nplot 1 2\n", "line 2: not a word and 3 finite"),
        ("film 1 2 3\nplot 1 2 x\n", "line 2: not a word and 3"),
        ("film 1 2 3\nplot 1 2 nan\n", "line 2: not a word and 3"),
        ("film 1 2 3\n", r"1 of the 10 tokens of the vocabulary have a vector"),
        ("FILM 1 2\nPLOT 3 4\n", "0 of the 10 tokens .* same language and case"),
        ("film,1,2\nplot,3,4\n", "0 numbers after the word; .* with spaces between"),
        ("film" + " 1" * 9000 + "\n", "9,000 numbers after the word"),
        ("film 1 2\nplot 1 2\n", "all tokens have the same vector"),
        ("", "is empty"),
        ("\0\1\2 film\n", "binary file"),
    ],
)
def test_a_file_that_holds_no_vectors_is_refused(
    tmp_path: Path, fresh, text: str, message: str
) -> None:
    (tmp_path / "v.txt").write_text(text)
    before = embeddings(fresh[0])
    with pytest.raises(UserError, match=message) as caught:
        borrow(fresh, tmp_path / "v.txt")
    assert "\n" not in str(caught.value)
    assert embeddings(fresh[0]).equal(before)


def test_what_is_no_source_of_embeddings_is_refused(tmp_path: Path, fresh) -> None:
    (tmp_path / "v.bin").write_bytes(b"\x80\x04")
    (tmp_path / "v.vec.gz").write_bytes(gzip.compress(b"film 1 2\n" * 1000)[:-20])
    (tmp_path / "empty").mkdir()
    for source, message in (
        (tmp_path / "v.bin", r"not one of \.txt, \.vec"),
        (tmp_path / "v.vec.gz", "could not be read as VEC"),
        (tmp_path / "none.txt", "there is no file"),
        (tmp_path / "empty", "no embeddings could be had .* a file of word vectors"),
        ("nobody/nothing", "no embeddings could be had"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            borrow(fresh, source)
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer that knows some of our words whole, some in pieces, and others not at all."""
    folder = tmp_path_factory.mktemp("parent") / "bert"
    words = ["good bad film plots was the and"] * 2
    train_tokenizer(words, vocab_size=100).save_pretrained(folder)
    torch.manual_seed(3)
    BertModel(tiny_bert(100)).save_pretrained(folder)
    return folder


def test_a_transformer_reads_each_token_alone(fresh, bert: Path) -> None:
    """What it does not know either keeps its random vector."""
    encoder = BertModel.from_pretrained(bert).eval()
    its = PreTrainedTokenizerFast.from_pretrained(bert)
    known = [word for word in WORDS if its.unk_token_id not in its.encode(word)]
    assert 5 <= len(known) < len(WORDS)
    before, after = borrow(fresh, bert)
    with torch.no_grad():
        expected = torch.cat(
            [encoder(torch.tensor([its.encode(w)])).last_hidden_state.mean(dim=1) for w in known]
        ).numpy()
    ids = fresh[1].convert_tokens_to_ids(known)
    np.testing.assert_allclose(
        distances(after[ids, :16].numpy()), distances(expected), rtol=1e-3, atol=1e-4
    )
    after[ids] = before[ids]
    assert after.equal(before)


# ---- a teacher ---------------------------------------------------------------------------------


def ask(teacher: Path, texts: list[str], names: list[str]) -> np.ndarray:
    return ask_all([transfer.Teacher(str(teacher), names)], texts)


def ask_all(teachers: list[transfer.Teacher], texts: list[str]) -> np.ndarray:
    return transfer.mean_probabilities(teachers, texts, device=CPU, bf16=False, batch_tokens=4096)


def test_a_teacher_answers_in_the_order_of_the_classes(trained: Path) -> None:
    """And by their names in any case, as many models on the hub have them."""
    texts = ["A dull plot.", "Witty and moving.", "so so", "dull " * 2000]
    model, tokenizer = load(str(trained))
    rows = encode(tokenizer, texts)
    expected = softmax(predict_logits(model, rows, pad_token_id=tokenizer.pad_token_id or 0))
    names = models.label_names(model)
    for order, columns in (
        (names, [0, 1]),
        (names[::-1], [1, 0]),
        (["POSITIVE", "Negative"], [1, 0]),
    ):
        np.testing.assert_allclose(ask(trained, texts, order), expected[:, columns], atol=1e-6)


def test_a_teacher_of_other_classes_is_refused(trained: Path) -> None:
    for names in (["bad", "good"], ["negative", "positive", "neutral"]):
        with pytest.raises(UserError, match=r"tells the classes negative, positive, not"):
            ask(trained, ["x"], names)


def test_a_transformer_reads_no_more_than_it_has_places_for(bert: Path, tmp_path: Path) -> None:
    config = BertConfig.from_pretrained(bert, id2label={0: "bad", 1: "good"})
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(bert).save_pretrained(tmp_path)
    answers = ask(tmp_path, ["good film " * 50], ["bad", "good"])
    np.testing.assert_allclose(answers.sum(axis=1), 1, atol=1e-6)


def count(function: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    """The same function; its arguments are left in a list."""

    def counting(*args: Any) -> Any:
        calls.append(args)
        return function(*args)

    return counting


def test_several_teachers_answer_in_the_mean(
    trained: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether they read alike or not."""
    names, texts = ["negative", "positive"], ["A dull plot.", "Witty and moving.", "good " * 60]
    config = BertConfig.from_pretrained(bert, id2label=dict(enumerate(names)))
    other = BertForSequenceClassification(config)
    torch.nn.init.normal_(other.classifier.weight)
    other.save_pretrained(tmp_path / "bert")
    PreTrainedTokenizerFast.from_pretrained(bert).save_pretrained(tmp_path / "bert")
    shutil.copytree(trained, tmp_path / "again")
    model, _ = load(str(trained))
    assert isinstance(model, NiNTextForSequenceClassification)
    model.rescale(-1, 2)
    model.save_pretrained(tmp_path / "again")
    folders = [trained, tmp_path / "again", tmp_path / "bert"]
    teachers = [transfer.Teacher(str(folder), names) for folder in folders]
    assert teachers[0].reads_as(teachers[1]) and not teachers[1].reads_as(teachers[2])
    alone = np.stack([ask(folder, texts, names) for folder in folders])  # (3, n, K)
    assert np.abs(np.diff(alone, axis=0)).max(axis=(1, 2)).min() > 1e-3
    np.testing.assert_allclose(ask_all(teachers, texts), alone.mean(axis=0), atol=1e-6)
    for teacher in teachers:
        teacher.max_length = 5  # which leaves its mark in a tokenizer
    read = []
    monkeypatch.setattr(transfer.Teacher, "read", count(transfer.Teacher.read, read))
    ask_all(teachers, texts)
    assert len(read) == 2  # once for the first two
    for teacher in teachers:
        teacher.max_length = None
    for order in ([2, 0, 1], [1, 1]):
        some = ask_all([teachers[i] for i in order], texts)
        np.testing.assert_allclose(some, alone[order].mean(axis=0), atol=1e-6)


def test_what_is_taught_lies_halfway_between_teacher_and_label() -> None:
    rows = [np.array([i], dtype=np.int32) for i in range(3)]
    train, unlabelled = EncodedTexts(rows[:2], [0, 1]), EncodedTexts(rows[2:], [-1])
    answers = np.array([[0.5, 0.5], [0.6, 0.4], [0.1, 0.9]], dtype=np.float32)
    texts = stages.distillation_targets(train, unlabelled, answers)
    np.testing.assert_allclose(texts.labels, [[0.75, 0.25], [0.3, 0.7], [0.1, 0.9]], atol=1e-6)
    assert [int(row[0]) for row in texts.rows] == [0, 1, 2]
    assert len(stages.distillation_targets(train, None, answers[:2])) == 2


# ---- runs --------------------------------------------------------------------------------------


def test_a_run_says_what_it_took_over(tmp_path: Path, trained: Path, bert: Path) -> None:
    """By the names of folders without their places; so does a run that goes on from it."""
    plain = train_text(TrainOptions(**QUICK, output_dir=tmp_path / "plain"))
    assert transfer.NOTE not in str(plain["notes"])
    note = "taken over: embeddings of bert, answers of teacher and other"
    shutil.copytree(trained, tmp_path / "teacher")
    shutil.copytree(trained, tmp_path / "other")
    options = TrainOptions(
        **QUICK,
        output_dir=tmp_path / "run",
        init_embeddings=str(bert),
        teacher=[str(tmp_path / "teacher"), str(tmp_path / "other")],
    )
    summary = train_text(options)
    assert summary["notes"] == [*plain["notes"], note]
    card = (tmp_path / "run" / "README.md").read_text()
    assert note in card and str(tmp_path) not in card
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["stage_seconds"]["teacher"] > 0
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert weights != (tmp_path / "plain" / "model.safetensors").read_bytes()
    further = TrainOptions(
        **{**QUICK, "model": str(tmp_path / "run")}, output_dir=tmp_path / "further"
    )
    assert train_text(further)["notes"][-1] == (
        "taken over: run has embeddings of bert, answers of teacher and other"
    )
    system = SavedRun(str(tmp_path / "run"), CompareOptions())
    assert "Taken over: embeddings of bert, answers of teacher and other." in system.description


def stop(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_resumed_run_needs_neither_source_again(
    tmp_path: Path, trained: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And ends with the same weights, though what a source lacks is drawn when it is loaded."""
    masked_lm = BertForMaskedLM(tiny_bert(100))  # it has no pooler
    weights, notes = [], []
    for name, stage in (("whole", None), ("early", "fit_ngrams"), ("late", "distillation_targets")):
        teacher, embeddings = tmp_path / "teacher", tmp_path / "bert"
        shutil.copytree(trained, teacher)
        metrics = json.loads((teacher / "metrics.json").read_text())
        metrics["notes"] = [transfer.NOTE + "embeddings of something"]
        (teacher / "metrics.json").write_text(json.dumps(metrics))
        shutil.copytree(bert, embeddings)
        masked_lm.save_pretrained(embeddings)
        options = TrainOptions(
            **QUICK,
            output_dir=tmp_path / name,
            init_embeddings=str(embeddings),
            teacher=[str(teacher)],
        )
        if stage is not None:
            with monkeypatch.context() as patch:
                patch.setattr(stages, stage, stop)
                with pytest.raises(KeyboardInterrupt):
                    train_text(options)
            shutil.rmtree(teacher)
            shutil.rmtree(embeddings)
            options.resume = True
        notes.append(train_text(options)["notes"])
        shutil.rmtree(teacher, ignore_errors=True)
        shutil.rmtree(embeddings, ignore_errors=True)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] == weights[2]
    assert notes[0] == notes[1] == notes[2]
    assert "teacher has embeddings of something" in str(notes)


def test_a_mistake_leaves_an_unfinished_run_as_it_is(
    tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**QUICK, "output_dir": tmp_path / "run"}
    with monkeypatch.context() as patch:
        patch.setattr(stages, "fuse", stop)
        with pytest.raises(KeyboardInterrupt):
            train_text(TrainOptions(**options))

    def files() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}

    before = files()
    assert any("checkpoints" in path.parts for path in before)
    for option, value in (
        ("teacher", [str(trained), "nobody/nothing"]),
        ("teacher", [""]),
        ("init_embeddings", "none.vec"),
        ("tokenizer", "nobody/nothing"),
    ):
        with pytest.raises(UserError):
            train_text(TrainOptions(**options, **{option: value}))
        assert files() == before


def test_a_run_does_not_write_over_its_own_teacher(tmp_path: Path, trained: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    with pytest.raises(UserError, match=r"--teacher is the folder that this run writes"):
        train_text(
            TrainOptions(
                **QUICK,
                output_dir=tmp_path / "run",
                teacher=[str(tmp_path / "run" / ".")],
                overwrite=True,
            )
        )


def test_damaged_answers_are_a_sentence(
    tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = TrainOptions(**QUICK, output_dir=tmp_path / "run", teacher=[str(trained)])
    with monkeypatch.context() as patch:
        patch.setattr(stages, "distillation_targets", stop)
        with pytest.raises(KeyboardInterrupt):
            train_text(options)
    file = tmp_path / "run" / "checkpoints" / "teacher.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    options.resume = True
    with pytest.raises(UserError, match=r"teacher\.safetensors is damaged .* without --resume"):
        train_text(options)


def test_a_saved_encoder_keeps_its_embeddings(trained: Path, tmp_path: Path) -> None:
    options = {**QUICK, "model": str(trained), "output_dir": tmp_path / "run"}
    with pytest.raises(UserError, match=r"--init-embeddings is for NiN presets"):
        train_text(TrainOptions(**options, init_embeddings="v.txt"))


def test_a_run_takes_over_nothing_from_where_it_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a run folder, whose metrics.json is another run's."""
    (tmp_path / "metrics.json").write_text(json.dumps({"notes": [transfer.NOTE + "embeddings"]}))
    monkeypatch.chdir(tmp_path)
    assert transfer.notes(TrainOptions()) == []
