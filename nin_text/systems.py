"""Ways to classify texts, NiN among them, behind one interface: fit, load, probabilities.

Networks are here, linear models and fastText in `baselines.py`. `create` turns what a user names (a
preset, a baseline, a model on the hub, a saved run) into a `System`. Its `fit` tunes on the
validation split and leaves files in a folder; `load` reads them in another process; `probabilities`
answers. Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForSequenceClassification

from nin_text import models, transfer
from nin_text.baselines import FastText, Fit, LinearNGrams, choose, joined, weights_of
from nin_text.data import TextDataset
from nin_text.device import keep_freed_memory, pick_device, use_bf16
from nin_text.errors import UserError
from nin_text.evaluation import pad, predict_logits, softmax
from nin_text.hub import is_hub_id
from nin_text.options import (
    ARCHITECTURES,
    FASTTEXT,
    LINEAR_NAMES,
    NETWORK_NAMES,
    PACKAGED,
    PRESET_NAMES,
    CompareOptions,
    TrainOptions,
    model_folder,
    saved_nin,
    trained_max_length,
    with_recipe,
)
from nin_text.predictor import Predictor
from nin_text.report import METRICS_FILE, write_json
from nin_text.run_folder import ANSWERS_FILE, OPTIONS_FILE
from nin_text.runs import train_text
from nin_text.tokenization import cached_tokenizer, encode, load_tokenizer

BATCH_TOKENS = (4_096, 16_384, 65_536)  # what a network may put into one batch, padding included


class System(Protocol):
    """One way to classify texts.

    Attributes:
        kind: "nin", "network", "fine-tuned", "frozen", "linear", "fasttext" or "architecture".
        description: what it is and how it is tuned, for readers of a comparison.
    """

    kind: str
    description: str

    def fit(self, dataset: TextDataset, folder: Path) -> Fit:
        """Tune and train on the splits, and leave in the folder what `load` needs."""

    def load(self, folder: Path) -> None:
        """Make ready to answer, from what `fit` left."""

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """(n, K) class probabilities."""

    def cost(self, texts: Sequence[str]) -> dict[str, float]:
        """`parameters`, and `macs`: multiply-accumulate operations spent on these texts."""

    def files(self, folder: Path) -> list[Path]:
        """The files that make up the trained system, for its size on disk."""


def create(spec: str, options: CompareOptions) -> System:
    """The system that a user named.

    Raises:
        UserError: if there is no such system.
    """
    if spec in LINEAR_NAMES:
        return LinearNGrams(spec)
    if spec == FASTTEXT:
        return FastText(options.seed)
    if spec.startswith("frozen:") and _may_be_there(spec.removeprefix("frozen:")):
        return FrozenEncoder(spec.removeprefix("frozen:"), options)
    if spec.startswith("architecture:"):
        return Architecture(spec.removeprefix("architecture:"), options)
    if not spec:
        raise UserError("--models has an empty name")
    if spec in (*PRESET_NAMES, *NETWORK_NAMES, *PACKAGED):
        return TrainedNetwork(spec, options)
    if (Path(model_folder(spec)) / METRICS_FILE).is_file():
        return SavedRun(spec, options)
    if not _may_be_there(spec):
        names = ", ".join([*PRESET_NAMES, *NETWORK_NAMES, *LINEAR_NAMES, FASTTEXT, *PACKAGED])
        raise UserError(
            f"there is no system {spec!r}: it is not one of {names}, not a folder, not a hub id "
            f"(owner/name), not frozen:<id or folder>, and not architecture:<one of "
            f"{', '.join(ARCHITECTURES)}>"
        )
    return TrainedNetwork(spec, options)


def _may_be_there(model: str) -> bool:
    """Whether a name is that of a folder, of a model that comes with a package, or a hub id."""
    known = model in PACKAGED or Path(model_folder(model)).is_dir()
    return bool(model) and (known or is_hub_id(model))


# ---- networks ----------------------------------------------------------------------------------


class _Network:
    """Any sequence classifier of transformers, with its tokenizer; a NiN answers by `Predictor`.

    Attributes:
        batch_tokens: tokens of a batch, padding included; None if batches have no padding.
    """

    kind = "network"
    description = ""

    def __init__(self, options: CompareOptions) -> None:
        self.options = options
        self.batch_tokens: int | None = BATCH_TOKENS[1]
        self.max_length: int | None = None
        self.predictor: Predictor | None = None

    def load(self, folder: Path) -> None:
        if saved_nin(str(folder)):
            keep_freed_memory()
            precision = self.options.precision
            self.predictor = Predictor(folder, device=self.options.device, precision=precision)
            self.batch_tokens = None
            return
        self._load_model(folder)

    def _load_model(self, folder: Path) -> None:
        model, tokenizer = models.load(str(folder))
        self.max_length = trained_max_length(str(folder))
        self._use(model, tokenizer)

    def _use(self, model: Any, tokenizer: Any) -> None:
        keep_freed_memory()
        device = pick_device(self.options.device)
        self.model, self.tokenizer = model.to(device).eval(), tokenizer
        bf16 = use_bf16(self.options.precision, device)
        self.autocast = torch.bfloat16 if bf16 else None

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return encode(self.tokenizer, texts, self.max_length)

    def _outputs(self, model: Any, texts: Sequence[str]) -> np.ndarray:
        """What `predict_logits` makes of the texts with a model that has this one's tokenizer."""
        return predict_logits(
            model,
            self._encode(texts),
            pad_token_id=self.tokenizer.pad_token_id or 0,
            batch_tokens=self.batch_tokens or BATCH_TOKENS[1],
            autocast=self.autocast,
        )

    def _logits(self, texts: Sequence[str]) -> np.ndarray:
        return self._outputs(self.model, texts)

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        if self.predictor is not None:
            return self.predictor.predict_proba(texts)
        return softmax(self._logits(texts))

    def cost(self, texts: Sequence[str]) -> dict[str, float]:
        if self.predictor is not None:  # as it is defined: tables count as the products they save
            self._load_model(self.predictor.folder)
        return network_cost(self.model, self._encode(texts), self.tokenizer.pad_token_id or 0)

    def files(self, folder: Path) -> list[Path]:
        patterns = ("config.json", "model*.safetensors", "tokenizer*", "vocab*", "merges.txt")
        return [file for pattern in patterns for file in sorted(folder.glob(pattern))]


class TrainedNetwork(_Network):
    """A preset, a network from scratch or a model from outside, trained by `train_text`."""

    def __init__(self, spec: str, options: CompareOptions) -> None:
        super().__init__(options)
        self.spec = spec
        if spec in PRESET_NAMES:
            self.kind = "nin"
            # What is kept does not depend on how many examples there are.
            recipe = with_recipe(TrainOptions(dataset=options.dataset, model=spec), examples=1)
            kept = "best pass by validation accuracy" if recipe.patience else "last pass"
            again = "both are" if recipe.refit else "the n-grams are"
            self.description = (
                f"Network in Network with n-gram evidence, trained with its recipe for this data "
                f"set. The {kept} is kept, network and n-grams are weighed on the validation "
                f"split, then {again} fitted again to training and validation split."
            )
        elif spec in NETWORK_NAMES:
            self.description = (
                "Trained from scratch by the same trainer as NiN with its own recipe; the best "
                "pass by validation accuracy is kept."
            )
        else:
            self.kind = "fine-tuned"
            self.description = (
                "Pretrained on text from outside and fine-tuned whole by the same trainer as NiN; "
                "the best pass by validation accuracy is kept."
            )

    def fit(self, dataset: TextDataset, folder: Path) -> Fit:
        options = TrainOptions(
            model=self.spec,
            dataset=self.options.dataset,
            dataset_config=self.options.dataset_config,
            unlabelled=self.options.unlabelled,
            precision=self.options.precision,
            device=self.options.device,
            seed=self.options.seed,
            output_dir=folder,
            resume=(folder / OPTIONS_FILE).is_file(),
        )
        train_text(options, dataset)
        return _run_fit(folder)


class SavedRun(_Network):
    """A run folder that `train_text` left earlier, wherever it is."""

    def __init__(self, spec: str, options: CompareOptions) -> None:
        super().__init__(options)
        self.folder = Path(model_folder(spec))
        try:
            self.metrics = json.loads((self.folder / METRICS_FILE).read_text(encoding="utf-8"))
            named = TrainedNetwork(self.metrics["model"], options)
            if saved_nin(str(self.folder)):  # whatever it began with
                with_ngrams = " with n-gram evidence" if self.metrics["options"]["ngrams"] else ""
                named.kind = "nin"
                named.description = (
                    f"Network in Network{with_ngrams}; pass {self.metrics['best_epoch']} of "
                    f"{self.metrics['epochs_run']} was kept."
                )
            command, machine = self.metrics["command"], self.metrics["environment"]
            taken = transfer.of_run(self.metrics)
            self.description = " ".join(
                [
                    *(named.description, *(f"{note[0].upper()}{note[1:]}." for note in taken)),
                    f"Trained before, on {machine['device']} of {machine['processor']}: {command}",
                ]
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{spec} is not the folder of a finished run ({error})") from error
        self.kind = named.kind

    def fit(self, dataset: TextDataset, folder: Path) -> Fit:
        names = self.metrics["label_names"]
        if names != dataset.label_names:
            raise UserError(
                f"{self.folder} knows the classes {', '.join(names[:10])}, not those of "
                f"{dataset.name}: {', '.join(dataset.label_names[:10])}"
            )
        fit = _run_fit(self.folder)
        if self.metrics["labelled_fingerprint"] != dataset.labelled().fingerprint():
            fit.validation = fit.test = None  # of other texts
            fit.warning = (
                f"{self.folder} was trained on other data than the other systems: its training "
                f"texts may be among the test texts"
            )
        return fit

    def load(self, folder: Path) -> None:
        super().load(self.folder)

    def files(self, folder: Path) -> list[Path]:
        return super().files(self.folder)


def _run_fit(folder: Path) -> Fit:
    """What a finished run tells about itself."""
    metrics = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
    names = "max_length epochs learning_rate weight_decay batch_size".split()
    if metrics["model"] in (*PRESET_NAMES, *NETWORK_NAMES):
        names += ["tokenizer", "vocab_size"]
    if metrics["model"] in PRESET_NAMES:
        names += "ngrams pretrain_epochs mlm_probability self_training_epochs".split()
        names += ["dropout", "unlabelled"]
    settings = {name: metrics["options"].get(name) for name in names}
    settings |= {name: metrics[name] for name in ("epochs_run", "best_epoch")}
    record = {
        "train_seconds": metrics["fit_seconds"],
        "train_threads": metrics["environment"]["threads"],
        "train_peak_memory_mb": metrics["fit_peak_memory_mb"],
    }
    answers = load_file(folder / ANSWERS_FILE) if (folder / ANSWERS_FILE).is_file() else {}
    return Fit(settings, answers.get("validation"), answers.get("test"), record)


class Architecture(_Network):
    """A transformer whose weights are not to be had: random ones, for its speed and memory."""

    kind = "architecture"

    def __init__(self, name: str, options: CompareOptions) -> None:
        super().__init__(options)
        if name not in ARCHITECTURES:
            raise UserError(
                f"there is no architecture {name!r}; there are {', '.join(ARCHITECTURES)}"
            )
        self.name = name
        self.description = (
            "Random weights and a tokenizer trained on the training split, for speed and memory "
            "alone; an accuracy beside it is cited from the literature."
        )

    def fit(self, dataset: TextDataset, folder: Path) -> Fit:
        tokenizer = cached_tokenizer(
            dataset.splits["train"].texts, kind="wordpiece", vocab_size=30_000, lowercase=True
        )
        tokenizer.save_pretrained(folder)
        settings = {
            "model_type": ARCHITECTURES[self.name]["model_type"],
            "num_labels": len(dataset.label_names),
        }
        write_json(folder / "architecture.json", settings)
        return Fit(settings)

    def load(self, folder: Path) -> None:
        # The defaults of these configurations are the published base models.
        settings = json.loads((folder / "architecture.json").read_text(encoding="utf-8"))
        config = AutoConfig.for_model(**settings)
        self.max_length = int(config.max_position_embeddings)
        model = AutoModelForSequenceClassification.from_config(config)
        self._use(model, load_tokenizer(str(folder)))

    def files(self, folder: Path) -> list[Path]:
        return []


class FrozenEncoder(_Network):
    """A pretrained encoder that stays as it is, mean-pooled, with logistic regression on top."""

    kind = "frozen"
    candidates = (0.1, 1.0, 10.0, 100.0)  # of C
    description = (
        "A pretrained encoder left as it is: the mean of its last layer, scaled to unit length, "
        "and logistic regression whose C is chosen on the validation split; fitted again to "
        "training and validation split."
    )

    def __init__(self, name: str, options: CompareOptions) -> None:
        super().__init__(options)
        self.name = name

    def fit(self, dataset: TextDataset, folder: Path) -> Fit:
        self._load_encoder()
        x = {part: self._features(dataset.splits[part].texts) for part in ("train", "validation")}
        train, validation = dataset.splits["train"], dataset.splits["validation"]

        def train_head(x: np.ndarray, labels: list[int], c: float) -> tuple[np.ndarray, np.ndarray]:
            regression = LogisticRegression(C=c, max_iter=2000).fit(x, np.array(labels))
            return weights_of(regression, len(dataset.label_names))

        def answer(c: float) -> np.ndarray:
            weight, bias = train_head(x["train"], train.labels, c)
            return x["validation"] @ weight + bias

        c, logits, scores = choose(self.candidates, answer, validation.labels)
        both = np.concatenate([x["train"], x["validation"]])
        weight, bias = train_head(both, joined(dataset).labels, c)
        save_file({"weight": weight, "bias": bias}, folder / "head.safetensors")
        return Fit({"C": c, "validation_accuracy_by_C": scores}, softmax(logits))

    def _load_encoder(self) -> None:
        model, tokenizer, self.folder = models.load_encoder(self.name)
        self.max_length = min(512, getattr(model.config, "max_position_embeddings", 512))
        self._use(model, tokenizer)

    def load(self, folder: Path) -> None:
        self._load_encoder()
        self.head = load_file(folder / "head.safetensors")

    def _features(self, texts: Sequence[str]) -> np.ndarray:
        return self._outputs(_MeanPooled(self.model), texts)

    def _logits(self, texts: Sequence[str]) -> np.ndarray:
        return self._features(texts) @ self.head["weight"] + self.head["bias"]

    def files(self, folder: Path) -> list[Path]:
        encoder = super().files(Path(self.folder))
        return [folder / "head.safetensors", *encoder] if encoder else []


class _MeanPooled(nn.Module):
    """An encoder as `predict_logits` expects it: its "logits" are unit-length means."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]  # (B, T, C)
        mask = attention_mask[..., None].to(hidden.dtype)  # (B, T, 1)
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)  # (B, C)
        return _Output(nn.functional.normalize(mean.float(), dim=1))


@dataclass
class _Output:
    logits: torch.Tensor


def network_cost(
    model: nn.Module, rows: Sequence[np.ndarray], pad_token_id: int
) -> dict[str, float]:
    """Parameters, and the multiply-accumulates of each text alone (no padding).

    Counted by torch's FlopCounterMode, which sees matrix products and convolutions, but not into
    fused attention and fused transformer layers: these are computed step by step for it. Nor does
    it see into the fused LSTM of a GPU.
    """
    device = next(model.parameters()).device
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            torch.inference_mode(),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            for row in rows:
                input_ids, attention_mask = pad([row], pad_token_id)
                model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    tables = sum(buffer.numel() for name, buffer in model.named_buffers() if "ngrams" in name)
    return {
        "parameters": sum(p.numel() for p in model.parameters()) + tables,
        "macs": counter.get_total_flops() / 2,
    }
