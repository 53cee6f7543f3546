"""A look at the files of a model before anything is built from them.

A model folder may come from anybody. It is JSON and safetensors, and loading it runs none of its
code; what is left is what its files claim: sizes that no machine has, files that lie elsewhere,
code to be fetched from a hub. `check_folder` refuses these before a byte is allocated.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from nin_text.errors import UserError
from nin_text.options import CONFIG_FILE, MAX_LAYERS, WEIGHTS_FILE
from nin_text.packed_files import read_object

INDEX_FILE = "model.safetensors.index.json"
DOWNLOADED = ["*.json", "*.safetensors", "*.txt", "*.model"]  # the last two: vocabularies
MAX_CLASSES = 2**17
# A model may have as many parameters again that its file lacks, such as a new classifier, and some.
SPARE_FACTOR, SPARE_PARAMETERS = 2, 2**22


def local_folder(name: str) -> str:
    """The folder of a model; one that is named by its hub id is downloaded first.

    Downloaded are the files that are looked at and loaded here: none of its code, no pickle.

    Raises:
        Exception: of huggingface_hub, if there is no such model or no network.
    """
    if Path(name).is_dir():
        return name
    return snapshot_download(name, allow_patterns=DOWNLOADED, ignore_patterns="*/*")


def check_folder(folder: Path) -> None:
    """Refuse a model folder whose files cannot be what they claim.

    Raises:
        UserError: if its configuration asks for code, names files outside the folder, or describes
            a model that is larger than its weights; or if the weights are no safetensors.
    """
    config = read_object(folder / CONFIG_FILE)
    _check_claims(folder, config)
    tensors = parameters = 0
    for path in _weight_files(folder):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  # it is no dict
                    tensors += 1
                    parameters += math.prod(file.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is no safetensors file, or damaged ({error})") from error
    if not tensors:
        return  # whoever loads the model will say that there are no weights
    for name, value in config.items():
        if name.endswith(("layer", "layers")) and isinstance(value, int) and value > tensors:
            raise UserError(
                f"{folder / CONFIG_FILE} asks for {value:,} layers where there are {tensors:,} "
                f"tensors; the folder is damaged"
            )
    described = _parameters(folder)
    if described is not None and described > SPARE_FACTOR * parameters + SPARE_PARAMETERS:
        raise UserError(
            f"{folder / CONFIG_FILE} describes a model of {described:,} parameters where the files "
            f"hold {parameters:,}; the folder is damaged"
        )


def check_weights(model: PreTrainedModel, folder: str) -> None:
    """Refuse weights that are no numbers: every answer would be none.

    Raises:
        UserError: naming the tensor.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(
                f"the model in {folder} is damaged: {name} holds values that are no finite numbers"
            )


def _check_claims(folder: Path, config: dict[str, Any]) -> None:
    path = folder / CONFIG_FILE
    for name, value in _strings(config):
        if name.endswith("implementation") and set("/:@") & set(value):
            raise UserError(f"{path} asks for code from elsewhere ({name}: {value}); none is run")
    if "transformers_weights" in config:
        _check_inside(path, config["transformers_weights"])
    names, labels = config.get("id2label"), config.get("num_labels")
    labels = len(names) if isinstance(names, dict) else labels
    if isinstance(labels, int) and not 0 <= labels <= MAX_CLASSES:
        raise UserError(f"{path} has {labels:,} classes; there may be {MAX_CLASSES:,} at most")
    blocks = config.get("block_channels")
    if isinstance(blocks, list) and len(blocks) > MAX_LAYERS:  # takes minutes to be read
        raise UserError(f"{path} has {len(blocks):,} blocks; there may be {MAX_LAYERS:,} at most")


def _strings(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Every text in nested JSON objects, with the key that it stands under."""
    if isinstance(value, str):
        return [(name, value)]
    if isinstance(value, dict):
        pairs = [(key, item) for key, item in value.items() if key not in ("id2label", "label2id")]
        return [found for key, item in pairs for found in _strings(item, key or name)]
    if isinstance(value, list):
        return [found for item in value for found in _strings(item, name)]
    return []


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that will be loaded; none if there are none."""
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if not (folder / INDEX_FILE).is_file():
        return []
    names = read_object(folder / INDEX_FILE).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{folder / INDEX_FILE} is damaged: it has no weight_map")
    for name in names.values():
        _check_inside(folder / INDEX_FILE, name)
    return [folder / name for name in sorted(set(names.values()))]


def _check_inside(path: Path, name: Any) -> None:
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
        raise UserError(
            f"{path} names the file {name!r}; it may only name .safetensors files beside it"
        )


def _parameters(folder: Path) -> int | None:
    """How many the configuration describes, without room for any; None if it describes no model."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
        return sum(tensor.numel() for tensor in model.state_dict().values())
    except Exception:  # whoever loads the model will say what is wrong with it
        return None
