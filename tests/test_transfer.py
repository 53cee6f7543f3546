"""What is taken over from outside: embeddings, and the answers of a teacher."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from nin_text import NiNTextConfig, NiNTextForSequenceClassification, load, models, stages, transfer
from nin_text.errors import UserError
from nin_text.evaluation import predict_logits, softmax
from nin_text.options import TrainOptions
from nin_text.runs import train_text
from nin_text.tokenization import encode, train_tokenizer
from nin_text.training import EncodedTexts

CPU = torch.device("cpu")
WORDS = "a film plot good bad dull witty was the and".split()
QUICK = {"model": "nin-text-small", "limit": 200, "epochs": 2, "quiet": True}


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


# ---- embeddings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "header"), [("v.txt", False), ("v.vec", True), ("v.vec.gz", True)]
)
def test_words_of_a_file_lie_to_each_other_as_their_vectors_do(
    tmp_path: Path, fresh, name: str, header: bool
) -> None:
    """Fewer components than the embeddings have, so that nothing is lost; the rest stays random."""
    model, tokenizer = fresh
    before = embeddings(model)
    words = [*WORDS[:6], "unheard", ". . ."]  # the last as in GloVe's files
    vectors = vectors_of(words)
    transfer.init_embeddings(
        model, tokenizer, write_vectors(tmp_path / name, words, vectors, header), CPU
    )
    after = embeddings(model)
    ids = tokenizer.convert_tokens_to_ids(WORDS[:6])
    np.testing.assert_allclose(
        distances(after[ids, :5].numpy()), distances(vectors[:6]), rtol=1e-4, atol=1e-5
    )
    assert after[ids, :5].norm(dim=1).mean() == pytest.approx(1, abs=1e-4)
    after[ids, :5] = before[ids, :5]
    assert after.equal(before)


def test_of_long_vectors_the_components_that_vary_most_are_kept(tmp_path: Path, fresh) -> None:
    model, tokenizer = fresh
    size = model.config.embedding_size
    rng = np.random.default_rng(1)
    wide = vectors_of(WORDS, 4) @ np.linalg.qr(rng.normal(size=(size + 40, 4)))[0].T + 3.0
    path = write_vectors(tmp_path / "v.txt", WORDS, wide.astype(np.float32))
    transfer.init_embeddings(model, tokenizer, path, CPU)
    ids = tokenizer.convert_tokens_to_ids(WORDS)
    after = embeddings(model)[ids].numpy()
    np.testing.assert_allclose(distances(after), distances(wide), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("film 1 2 3\nplot 1 2\n", "line 2: not a word and 3 finite"),
        ("film 1 2 3\nplot 1 2 x\n", "line 2: not a word and 3"),
        ("film 1 2 3\nplot 1 2 nan\n", "line 2: not a word and 3"),
        ("film 1 2 3\n", r"vectors for 1 of the 10 tokens"),
        ("", r"vectors for 0 of the 10 tokens"),
        ("FILM 1 2\nPLOT 3 4\n", "same language and case"),
        ("\0\1\2 film\n", "binary file"),
    ],
)
def test_a_file_that_holds_no_vectors_is_refused(
    tmp_path: Path, fresh, text: str, message: str
) -> None:
    model, tokenizer = fresh
    (tmp_path / "v.txt").write_text(text)
    before = embeddings(model)
    with pytest.raises(UserError, match=message) as caught:
        transfer.init_embeddings(model, tokenizer, str(tmp_path / "v.txt"), CPU)
    assert "\n" not in str(caught.value)
    assert embeddings(model).equal(before)


def test_a_file_of_another_kind_is_refused(tmp_path: Path, fresh) -> None:
    model, tokenizer = fresh
    (tmp_path / "v.bin").write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match=r"no file of word vectors \(\.txt or \.vec"):
        transfer.init_embeddings(model, tokenizer, str(tmp_path / "v.bin"), CPU)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    train_tokenizer(["good bad film plots"] * 2, vocab_size=100).save_pretrained(folder)
    torch.manual_seed(3)
    BertModel(
        BertConfig(
            vocab_size=100,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=16,
        )
    ).save_pretrained(folder)
    return folder


def test_a_transformer_reads_each_token_alone(fresh, bert: Path) -> None:
    model, tokenizer = fresh
    transfer.init_embeddings(model, tokenizer, str(bert), CPU)
    encoder = BertModel.from_pretrained(bert).eval()
    its = PreTrainedTokenizerFast.from_pretrained(bert)
    with torch.no_grad():
        expected = torch.cat(
            [encoder(torch.tensor([its.encode(w)])).last_hidden_state.mean(dim=1) for w in WORDS]
        ).numpy()
    ids = tokenizer.convert_tokens_to_ids(WORDS)
    found = embeddings(model)[ids, :16].numpy()
    np.testing.assert_allclose(distances(found), distances(expected), rtol=1e-3, atol=1e-4)


def test_what_is_no_transformer_is_refused(tmp_path: Path, fresh) -> None:
    model, tokenizer = fresh
    for source in (str(tmp_path), "nobody/nothing"):
        with pytest.raises(UserError) as caught:
            transfer.init_embeddings(model, tokenizer, source, CPU)
        assert "\n" not in str(caught.value)


# ---- a teacher ---------------------------------------------------------------------------------


def ask(teacher: Path, texts: list[str], names: list[str]) -> np.ndarray:
    return transfer.teacher_answers(
        str(teacher), texts, names, device=CPU, bf16=False, batch_tokens=4096
    )


def test_a_teacher_answers_in_the_order_of_the_classes(trained: Path) -> None:
    texts = ["A dull plot.", "Witty and moving.", "so so"]
    model, tokenizer = load(str(trained))
    rows = encode(tokenizer, texts)
    expected = softmax(predict_logits(model, rows, pad_token_id=tokenizer.pad_token_id))
    names = models.label_names(model)
    np.testing.assert_allclose(ask(trained, texts, names), expected, atol=1e-6)
    np.testing.assert_allclose(ask(trained, texts, names[::-1]), expected[:, ::-1], atol=1e-6)


def test_a_teacher_of_other_classes_is_refused(trained: Path) -> None:
    with pytest.raises(UserError, match=r"tells negative, positive, not bad, good"):
        ask(trained, ["x"], ["bad", "good"])


def test_what_is_taught_lies_halfway_between_teacher_and_label() -> None:
    rows = [np.array([i], dtype=np.int32) for i in range(3)]
    train, unlabelled = EncodedTexts(rows[:2], [0, 1]), EncodedTexts(rows[2:], [-1])
    answers = np.array([[0.5, 0.5], [0.6, 0.4], [0.1, 0.9]], dtype=np.float32)
    texts = stages.taught(train, unlabelled, answers)
    np.testing.assert_allclose(texts.labels, [[0.75, 0.25], [0.3, 0.7], [0.1, 0.9]], atol=1e-6)
    assert [int(row[0]) for row in texts.rows] == [0, 1, 2]
    assert len(stages.taught(train, None, answers[:2])) == 2


# ---- runs --------------------------------------------------------------------------------------


def test_a_run_says_what_it_took_from_outside(tmp_path: Path, trained: Path, bert: Path) -> None:
    plain = train_text(TrainOptions(**QUICK, output_dir=tmp_path / "plain"))
    assert "outside" not in str(plain["notes"])
    note = "weights from outside: embeddings from bert, taught by teacher"
    shutil.copytree(bert, tmp_path / "bert")
    shutil.copytree(trained, tmp_path / "teacher")
    options = TrainOptions(
        **QUICK,
        output_dir=tmp_path / "run",
        init_embeddings=str(tmp_path / "bert"),
        teacher=str(tmp_path / "teacher"),
    )
    summary = train_text(options)
    assert summary["notes"] == [*plain["notes"], note]
    card = (tmp_path / "run" / "README.md").read_text()
    assert note in card and str(tmp_path) not in card
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["stage_seconds"]["teacher"] > 0
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert weights != (tmp_path / "plain" / "model.safetensors").read_bytes()
    options.output_dir = tmp_path / "again"
    train_text(options)
    assert weights == (tmp_path / "again" / "model.safetensors").read_bytes()


def test_a_resumed_run_does_not_ask_the_teacher_again(
    tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = TrainOptions(**QUICK, output_dir=tmp_path / "whole", teacher=str(trained))
    train_text(options)
    options.output_dir = tmp_path / "stopped"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, "taught", stop)
        with pytest.raises(KeyboardInterrupt):
            train_text(options)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(stages, "teacher_answers", refuse)
    options.resume = True
    train_text(options)
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "stopped")]
    assert weights[0] == weights[1]


def test_a_saved_encoder_keeps_its_embeddings(trained: Path, tmp_path: Path) -> None:
    options = {**QUICK, "model": str(trained), "output_dir": tmp_path / "run"}
    with pytest.raises(UserError, match=r"--init-embeddings is for NiN presets"):
        train_text(TrainOptions(**options, init_embeddings="v.txt"))
