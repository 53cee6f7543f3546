"""What users of transformers expect, with that library's own Trainer and pipelines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import CommitInfo, HfApi, ModelCard, RepoUrl
from huggingface_hub.errors import EntryNotFoundError
from test_text import STILL
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from nin_text import NiNTextConfig, NiNTextForSequenceClassification, NiNTextModel

TEXTS = ["The plot is dull .", "The cast was witty and the plot was not bland .", ""]


def test_auto_classes_load_a_run(trained: Path) -> None:
    assert isinstance(AutoConfig.from_pretrained(trained), NiNTextConfig)
    assert isinstance(AutoModel.from_pretrained(trained), NiNTextModel)
    model = AutoModelForSequenceClassification.from_pretrained(trained)
    assert isinstance(model, NiNTextForSequenceClassification)
    assert isinstance(AutoTokenizer.from_pretrained(trained), PreTrainedTokenizerFast)


def test_pipelines_take_batches_and_empty_texts(trained: Path) -> None:
    classify = pipeline("text-classification", model=str(trained), top_k=None)
    alone = [classify([text])[0] for text in TEXTS]
    together = classify(TEXTS, batch_size=3)
    for one, other in zip(alone, together, strict=True):
        scores = {answer["label"]: answer["score"] for answer in other}
        assert scores == pytest.approx({a["label"]: a["score"] for a in one}, abs=1e-5)
        assert sum(scores.values()) == pytest.approx(1)
    assert {answer["score"] for answer in together[2]} == {0.5}
    features = pipeline("feature-extraction", model=str(trained))(TEXTS[0])
    assert len(features[0]) == 5
    assert len(classify("witty " * 20_000)[0]) == 2


def train(folder: Path, run: Path, sizes: tuple[int, int], **config) -> dict[str, torch.Tensor]:
    """Weights after two passes over 16 texts; `sizes` are of a batch and of accumulation."""
    torch.manual_seed(0)
    fixed = {"vocab_size": 40, "num_labels": 3, **STILL, **config}
    model = NiNTextForSequenceClassification(
        NiNTextConfig.from_preset("nin-text-small", ngram_size=2, ngram_buckets=64, **fixed)
    )
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 12, (16,), generator=generator).tolist()
    rows = [torch.randint(2, 40, (n,), generator=generator).tolist() for n in lengths]
    data = Dataset.from_dict({"input_ids": rows, "label": [i % 3 for i in range(16)]})
    tokenizer = AutoTokenizer.from_pretrained(run)
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=sizes[0],
        gradient_accumulation_steps=sizes[1],
        learning_rate=1e-3,
        max_grad_norm=1e-2,  # shows a gradient of the wrong size at once
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        seed=3,
    )
    collator = DataCollatorWithPadding(tokenizer)
    Trainer(model, arguments, train_dataset=data, data_collator=collator).train()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    "config", [{}, {"class_weights": [1.0, 4.0, 0.5]}, {"label_smoothing": 0.1}], ids=str
)
@pytest.mark.parametrize("sizes", [(4, 2), (3, 3)], ids=str)
def test_accumulated_gradients_are_those_of_the_whole_batch(
    trained: Path, tmp_path: Path, config: dict, sizes: tuple[int, int]
) -> None:
    """Also if the last of the accumulated batches is smaller than the others."""
    whole = train(tmp_path / "whole", trained, (sizes[0] * sizes[1], 1), **config)
    parts = train(tmp_path / "parts", trained, sizes, **config)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, atol=1e-5, rtol=0, msg=name)


def test_a_saved_encoder_takes_new_labels_with_one_warning(
    trained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = NiNTextForSequenceClassification.from_pretrained(trained)
    caplog.clear()
    model = AutoModelForSequenceClassification.from_pretrained(trained, num_labels=5)
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "its encoder is kept" in warnings[0].getMessage()
    assert model.classifier.weight.shape[0] == model.config.num_labels == 5
    assert model.ngrams is None
    for name, tensor in before.nin.state_dict().items():
        assert torch.equal(model.nin.state_dict()[name], tensor), name
    output = model(**AutoTokenizer.from_pretrained(trained)(TEXTS[0], return_tensors="pt"))
    assert output.logits.shape == (1, 5)


def test_what_goes_to_the_hub_is_complete_and_names_no_folder(trained: Path) -> None:
    card = ModelCard.load(trained / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.library_name == "transformers"
    assert card.data.eval_results[0].metric_type == "accuracy"
    assert "import nin_text" in card.text
    needed = {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert needed <= {path.name for path in trained.iterdir()}
    assert not list(trained.glob("*.bin")) + list(trained.glob("*.pt"))
    assert str(trained.parent) not in (trained / "README.md").read_text(encoding="utf-8")


def test_push_to_hub_takes_the_card_along(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own is an empty form, which must not go up in place of it."""
    uploaded: dict[str, bytes] = {}

    def commit(self: HfApi, repo_id: str, operations: list, **_: object) -> CommitInfo:
        uploaded.update(
            (operation.path_in_repo, Path(operation.path_or_fileobj).read_bytes())
            for operation in operations
        )
        return CommitInfo("https://huggingface.co/me/model/commit/0", "", "", "0")

    def no_card(*_: object, **__: object) -> None:
        raise EntryNotFoundError("there is none yet")

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: RepoUrl("me/model"))
    monkeypatch.setattr(HfApi, "create_commit", commit)
    monkeypatch.setattr(ModelCard, "load", no_card)
    model = AutoModelForSequenceClassification.from_pretrained(trained)
    model.push_to_hub("me/model")
    assert uploaded["README.md"] == (trained / "README.md").read_bytes()
    assert {"config.json", "model.safetensors"} <= uploaded.keys()
    model.name_or_path = ""  # made here: the form is all there is
    model.push_to_hub("me/model")
    assert b"More Information Needed" in uploaded["README.md"]
    theirs = "# By hand\n\n## Citation\n\n[More Information Needed]\n"
    monkeypatch.setattr(ModelCard, "load", lambda *_, **__: ModelCard(theirs))
    AutoModelForSequenceClassification.from_pretrained(trained).push_to_hub("me/model")
    assert b"# By hand" in uploaded["README.md"]
