"""What `speed.py` measures besides a Predictor: models of random weights, and other systems.

Speed does not depend on what the weights are, so presets and the transformer have random ones where
there are none at hand. Each system is a function from texts to answers.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.svm import LinearSVC
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
)

from nin_text import export, models
from nin_text.baselines import TOKEN, FastText
from nin_text.configuration import NiNTextConfig
from nin_text.data import TextDataset
from nin_text.errors import UserError
from nin_text.evaluation import batches_by_length, pad, predict_logits
from nin_text.inference import PaddedPredictor
from nin_text.options import (
    PACKAGED,
    PRESET_NAMES,
    PredictOptions,
    TrainOptions,
    model_folder,
    with_recipe,
)
from nin_text.predictor import Predictor
from nin_text.recipes import DEFAULT_RECIPE
from nin_text.text import NiNTextForSequenceClassification
from nin_text.tokenization import cached_tokenizer, encode

Answer = Callable[[Sequence[str]], Any]

MINILM = "all-MiniLM-L6-v2"
MINILM_TOKENS = 256  # its texts are cut to
MINILM_BATCH = 8192  # tokens
TOKENIZER_TEXTS = 10_000  # that its tokenizer is trained on, if it is not installed
BUCKETS = 2**20  # rows of the n-gram table of a model of any size, if its classes are few
SVM_C = 0.3


def recipe_of(name: str, dataset: TextDataset) -> TrainOptions:
    """How `train_text.py` would train a model on a data set.

    Args:
        name: preset, ready-made model or run folder.
    """
    options = TrainOptions(dataset=dataset.name, model=name)
    return with_recipe(options, len(dataset.splits["train"]))


@torch.no_grad()
def random_model(name: str, dataset: TextDataset, folder: Path) -> Path:
    """The folder of a saved model, or of a preset as it is before training, with random n-grams.

    Args:
        name: preset, ready-made model or run folder.
        dataset: its training texts make the tokenizer, and the sizes, of a preset.
        folder: is filled if `name` is a preset.
    """
    if name not in PRESET_NAMES:
        return Path(model_folder(name))
    train = dataset.splits["train"]
    model: Any
    model, tokenizer = models.build(
        recipe_of(name, dataset), train.texts, train.labels, dataset.label_names
    )
    model.ngrams.weight.normal_(std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def random_weights(
    name: str, classes: int, vocab_size: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights of a preset of any size."""
    names = [str(i) for i in range(classes)]
    config = NiNTextConfig.from_preset(
        name,
        vocab_size=vocab_size,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        ngram_size=DEFAULT_RECIPE["ngrams"],
        ngram_buckets=max(
            models.MIN_BUCKETS,
            min(BUCKETS, models.MAX_BUCKETS_TIMES_CLASSES >> classes.bit_length()),
        ),
    )
    model = NiNTextForSequenceClassification(config).eval()
    assert model.ngrams is not None
    model.ngrams.weight.normal_(std=0.1)
    return model.config.to_dict(), model.state_dict()


def padded(folder: Path, predictor: Predictor) -> Answer:
    """The model as transformers runs it: its own tokenizer call, and padded batches."""
    device, precision = str(predictor.device), predictor.precision
    options = PredictOptions(model=str(folder), device=device, precision=precision)
    return PaddedPredictor(options).predict_proba


def training_step(
    predictor: Predictor, dataset: TextDataset, recipe: TrainOptions
) -> tuple[Callable[[], None], int, int]:
    """One step of training on a batch as the recipe makes it: forward, backward and AdamW.

    Returns:
        The step, and how many texts and tokens are in its batch.
    """
    model: Any = models.load_classifier(str(predictor.folder))
    model.to(predictor.device).train()
    ids, lengths = predictor.tokenizer.encode(dataset.splits["train"].texts[: recipe.batch_size])
    count = int(np.searchsorted(lengths.cumsum(), recipe.batch_tokens)) or 1
    rows = np.split(ids, lengths.cumsum())[:count]
    input_ids, mask = (tensor.to(predictor.device) for tensor in pad(rows, 0))
    labels = torch.arange(count, device=predictor.device) % model.config.num_labels
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    bf16 = predictor.precision == "bf16"

    def step() -> None:
        with torch.autocast(predictor.device.type, torch.bfloat16, bf16):
            loss = model(input_ids=input_ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if predictor.device.type == "cuda":
            torch.cuda.synchronize()

    return step, count, int(lengths[:count].sum())


# ---- other systems -------------------------------------------------------------------------------


def fasttext(dataset: TextDataset, scratch: Path) -> tuple[Answer | None, float]:
    """The fastText library with one setting, and the seconds of fitting it; one thread answers."""
    try:
        system = FastText(seed=0)
    except UserError:
        return None, 0.0
    system.candidates = ((0.5, 5),)
    folder = scratch / "fasttext"
    folder.mkdir()
    started = time.perf_counter()
    system.fit(dataset, folder)
    seconds = (time.perf_counter() - started) / 2  # it is fitted with and without validation split
    system.load(folder)
    return system.probabilities, seconds


def svm(dataset: TextDataset, scratch: Path) -> tuple[Answer | None, float]:
    """TF-IDF of 1- and 2-grams and a linear SVM, and the seconds of fitting it; one thread."""
    train = dataset.splits["train"]
    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, token_pattern=TOKEN.pattern, dtype=np.float32
    )
    started = time.perf_counter()
    classifier = LinearSVC(C=SVM_C, random_state=0).fit(
        vectorizer.fit_transform(train.texts), train.labels
    )
    seconds = time.perf_counter() - started
    return lambda texts: classifier.decision_function(vectorizer.transform(texts)), seconds


class _Logits(nn.Module):
    """A classifier of transformers as a function of two tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


class MiniLM:
    """MiniLM-L6 on texts cut to 256 tokens, in batches of texts of similar length."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer

    def rows(self, texts: Sequence[str]) -> list[np.ndarray]:
        return encode(self.tokenizer, texts, MINILM_TOKENS)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        return predict_logits(
            self.model, self.rows(texts), pad_token_id=0, batch_tokens=MINILM_BATCH
        )


def minilm(dataset: TextDataset) -> tuple[MiniLM, str]:
    """The transformer, and what its weights are, in words."""
    classes = len(dataset.label_names)
    if importlib.util.find_spec(PACKAGED[MINILM][0]) is not None:
        folder = models.packaged(MINILM)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=classes)
        return MiniLM(model, models.load_tokenizer(folder)), f"MiniLM-L6: the body of {MINILM}."
    tokenizer = cached_tokenizer(dataset.splits["train"].texts[:TOKENIZER_TEXTS])
    config = AutoConfig.for_model(
        "bert",
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        num_labels=classes,
    )
    model = AutoModelForSequenceClassification.from_config(config)
    note = (
        f"MiniLM-L6: its architecture with random weights ({MINILM} is not installed), on a "
        f"tokenizer trained on the training texts."
    )
    return MiniLM(model, tokenizer), note


def minilm_int8(transformer: MiniLM, scratch: Path) -> Answer | None:
    """The same in ONNX with int8 matrices; None without onnxruntime."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    float32, int8 = scratch / "minilm.onnx", scratch / "minilm.int8.onnx"
    export.write_onnx(_Logits(transformer.model), float32, ("logits",))
    export.quantize(float32, int8)
    session = export.open_session(int8)

    def answer(texts: Sequence[str]) -> None:
        rows = transformer.rows(texts)
        for batch in batches_by_length([len(row) for row in rows], MINILM_BATCH):
            export.run(session, *pad([rows[i] for i in batch], 0))

    return answer
