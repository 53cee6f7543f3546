"""nin-text: classifiers made of a Network in Network, with exact evidence, for text and for images.

Importing the package is cheap: names load the modules behind them on first use. The model classes
register themselves with transformers as soon as both packages are imported, in either order, so
that `pipeline("text-classification", model=<run folder>)` finds them.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "PRESETS": "configuration",
    "IMAGE_PRESETS": "configuration",
    "NiNTextConfig": "configuration",
    "NiNImageConfig": "configuration",
    "NiNTextModel": "text",
    "NiNTextForSequenceClassification": "text",
    "NiNImageForImageClassification": "image",
    "MLPConv": "blocks",
    "global_average_pool": "blocks",
    "UserError": "errors",
    "TrainOptions": "options",
    "ImageTrainOptions": "image_options",
    "load_text_dataset": "data",
    "load_image_dataset": "image_data",
    "train_tokenizer": "tokenization",
    "classification_metrics": "evaluation",
    "load": "models",
    "model_folder": "options",
    "train_text": "runs",
    "train_image": "image_runs",
    "evaluate_text": "inference",
    "predict_text": "inference",
    "Predictor": "predictor",
    "export_onnx": "export",
    "NiNTextClassifier": "estimator",
    "NiNTextVectorizer": "vectorizer",
    "Explanation": "explain",
    "explain_html": "explain_page",
    "deletion_test": "faithfulness",
    "score_files": "bulk",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name == "explain":  # the module, as it is once anything has imported it
        return importlib.import_module(f"{__name__}.explain")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


class _RegisterAfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the module that registers our classes once transformers' own Auto module is loaded.

    Registering needs the Auto modules, whose import takes seconds: too long for `import nin_text`,
    and of no use before somebody wants them.
    """

    def __init__(self, target: str, then: str) -> None:
        self.target = target
        self.then = then

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != self.target:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            self.loader = spec.loader
            spec.loader = self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        importlib.import_module(self.then)


for _target, _then in (
    ("transformers.models.auto.configuration_auto", "nin_text.configuration"),
    ("transformers.models.auto.modeling_auto", "nin_text.text"),
    ("transformers.models.auto.modeling_auto", "nin_text.networks"),
    ("transformers.models.auto.modeling_auto", "nin_text.image"),
):
    if _target in sys.modules:
        importlib.import_module(_then)
    else:
        sys.meta_path.insert(0, _RegisterAfterImport(_target, _then))
