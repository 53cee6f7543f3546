"""Model folders from strangers: loaded, or refused in one sentence; never obeyed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from nin_text import (
    NiNTextClassifier,
    NiNTextConfig,
    NiNTextForSequenceClassification,
    Predictor,
    models,
)
from nin_text.errors import UserError
from nin_text.inference import evaluate_text, predict_text
from nin_text.options import EvaluateOptions, PredictOptions, TrainOptions, trained_max_length
from nin_text.packed_files import FIELDS, read_packed
from nin_text.predictor import MODEL_FILES
from nin_text.report import peak_memory_mb

SOURCE = Path(__file__).parent / "fixtures" / "v0.1.0"
WEIGHTS = (SOURCE / "model.safetensors").read_bytes()
HEADER_SIZE = struct.unpack("<Q", WEIGHTS[:8])[0]
INDEX = "model.safetensors.index.json"

Edit = Callable[[Path], Any]


class Planted:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def planted(folder: Path) -> Path:
    return folder.parent / "planted"


def rewritten(name: str, change: Callable[[Any], Any]) -> Edit:
    """Change the JSON of a file in place, or replace it by what `change` returns."""

    def edit(folder: Path) -> None:
        value = json.loads((folder / name).read_text(encoding="utf-8"))
        changed = change(value)
        (folder / name).write_text(json.dumps(value if changed is None else changed))

    return edit


def config(**values: Any) -> Edit:
    return rewritten("config.json", lambda config: config.update(values))


def tokenizer_config(**values: Any) -> Edit:
    return rewritten("tokenizer_config.json", lambda config: config.update(values))


def content(name: str, data: bytes) -> Edit:
    return lambda folder: (folder / name).write_bytes(data)


def header(change: Callable[[dict[str, Any]], Any]) -> Edit:
    """Change the header of the weights and leave the tensors as they are."""

    def edit(folder: Path) -> None:
        value = json.loads(WEIGHTS[8 : 8 + HEADER_SIZE])
        change(value)
        data = json.dumps(value).encode()
        start = struct.pack("<Q", len(data)) + data
        (folder / "model.safetensors").write_bytes(start + WEIGHTS[8 + HEADER_SIZE :])

    return edit


def weights(change: Callable[[dict[str, np.ndarray]], Any]) -> Edit:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def index(name: Any) -> Edit:
    def edit(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"a": name}}))

    return edit


def pickled(name: str) -> Edit:
    return lambda folder: torch.save({"a": Planted(planted(folder))}, folder / name)


def code(folder: Path) -> None:
    names = {"AutoConfig": "evil.C", "AutoModelForSequenceClassification": "evil.M"}
    config(auto_map=names, model_type="evil")(folder)
    line = f"import os; os.mkdir({str(planted(folder))!r})\nclass C: pass\nclass M: pass\n"
    (folder / "evil.py").write_text(line)


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    pickled("pytorch_model.bin")(folder)


FIRST = "classifier.weight"
DEEP = b"[" * 100_000
BLOCKS = 100_000
# What is done to a good folder, and what the sentence must say.
HOSTILE: dict[str, tuple[Edit, str]] = {
    # sizes
    "negative width": (config(embedding_size=-5), "must be positive"),
    "negative channels": (config(block_channels=[[-8, 8, 8], [8, 8]]), "must be positive"),
    "no kernel": (config(kernel_sizes=[[0], [3]]), "must be positive"),
    "a billion tokens": (config(vocab_size=10**9), "describes a model of"),
    "a billion channels": (
        config(block_channels=[[10**9, 8], [10**9, 8]]),
        "describes a model of",
    ),
    "2 ** 70 channels": (config(block_channels=[[2**70, 8], [8, 8]]), "could be loaded"),
    "a billion buckets": (config(ngram_buckets=10**9), "describes a model of"),
    "n-grams without end": (config(ngram_size=10**9), "nor above 32"),
    "a farther reach than any text": (config(dilations=[10**9, 1]), "reaches farther"),
    "wide kernel": (config(kernel_sizes=[[10**9 + 1], [3]]), "reaches farther"),
    "blocks without end": (config(block_channels=[[8]] * BLOCKS), "100,000 blocks"),
    "layers without end": (config(num_hidden_layers=10**9), "1,000,000,000 layers"),
    "a billion classes": (config(id2label=None, num_labels=10**9), "1,000,000,000 classes"),
    "negative classes": (config(id2label=None, num_labels=-1), "-1 classes"),
    "other classes": (config(id2label={"0": "a"}), "could be loaded"),
    "other kernel": (config(kernel_sizes=[[5], [2, 3]]), "could be loaded"),
    # types
    "width in words": (config(embedding_size="192"), "expected int, got str"),
    "width in parts": (config(embedding_size=1.5), "expected int, got float"),
    "channels in words": (config(block_channels="abc"), "expected a list"),
    "no number": (config(hidden_dropout=float("nan")), "must be in [0, 1)"),
    "null": (config(vocab_size=None), "expected int, got NoneType"),
    "classes in a list": (config(id2label=[1, 2]), "could be loaded"),
    "classes of no number": (config(id2label={"a": "b", "c": "d", "e": "f"}), "could be loaded"),
    "classes of one name": (config(id2label={"0": "a", "1": "a", "2": "b"}), "a name of their own"),
    "a padding token that is none": (config(pad_token_id=10**9), "pad_token_id is"),
    "a negative padding token": (config(pad_token_id=-7), "pad_token_id is"),
    "a problem that is a number": (config(problem_type=5), "is a model for 5"),
    "an unknown type of numbers": (config(dtype="evil"), "could be loaded"),
    "an activation that is none": (config(hidden_act="evil"), "expected one of"),
    "a method overwritten": (config(to_dict=5), "could be loaded"),
    "unknown model": (config(model_type="evil"), "could be loaded"),
    "path as model": (config(model_type="../../evil"), "could be loaded"),
    # code and paths
    "code of its own": (code, "could be loaded"),
    "kernels from a hub": (config(_attn_implementation="someone/kernel"), "code from elsewhere"),
    "kernels, once more": (config(attn_implementation={"": "someone/k"}), "code from elsewhere"),
    "weights elsewhere": (config(transformers_weights="../outside.safetensors"), "names the file"),
    "weights elsewhere by index": (index("../outside.safetensors"), "names the file"),
    "weights anywhere": (index("/etc/passwd"), "names the file"),
    "a pickle by index": (index("pytorch_model.bin"), "names the file"),
    "a number by index": (index(5), "names the file 5"),
    "an index that is a list": (
        lambda folder: (index("a")(folder), (folder / INDEX).write_text("[]")),
        "no JSON object",
    ),
    "pickle alone": (only_pickle, "could be loaded"),
    "pickle by another name": (
        lambda folder: (folder / "model.safetensors").write_bytes(
            pickle.dumps(Planted(planted(folder)))
        ),
        "no safetensors file",
    ),
    "torch's archive by another name": (pickled("model.safetensors"), "no safetensors file"),
    # the files
    "configuration cut short": (content("config.json", b'{"a":'), "is damaged"),
    "configuration empty": (content("config.json", b""), "is damaged"),
    "configuration a list": (content("config.json", b"[]"), "no JSON object"),
    "configuration too deep": (content("config.json", DEEP), "is damaged"),
    "configuration in Latin-1": (content("config.json", b'{"a": "\xe9"}'), "is damaged"),
    "configuration too large": (content("config.json", b" " * 2**25), "too large"),
    "weights empty": (content("model.safetensors", b""), "header too small"),
    "weights cut short": (content("model.safetensors", WEIGHTS[:-1]), "incomplete metadata"),
    "weights and more": (content("model.safetensors", WEIGHTS + b"x"), "incomplete metadata"),
    "header cut short": (content("model.safetensors", WEIGHTS[:20]), "invalid header length"),
    "header of exabytes": (
        content("model.safetensors", struct.pack("<Q", 2**63) + WEIGHTS[8:]),
        "header too large",
    ),
    "larger than its bytes": (
        header(lambda names: names[FIRST].update(shape=[10**6, 10**6])),
        "no safetensors file",
    ),
    "beyond the file": (
        header(lambda names: names[FIRST].update(data_offsets=[0, 10**12])),
        "no safetensors file",
    ),
    "negative shape": (header(lambda names: names[FIRST].update(shape=[-1, -1])), "no safetensors"),
    "tensor missing": (weights(lambda tensors: tensors.pop(FIRST)), "holds no classifier"),
    "tensor of no numbers": (weights(lambda tensors: tensors[FIRST].fill(np.nan)), "no finite"),
    "tensor without bounds": (weights(lambda tensors: tensors[FIRST].fill(np.inf)), "no finite"),
    # the tokenizer
    "tokenizer missing": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
    "tokenizer empty": (content("tokenizer.json", b"{}"), "no tokenizer"),
    "tokenizer too deep": (content("tokenizer.json", DEEP), "no tokenizer"),
    "tokenizer settings a list": (content("tokenizer_config.json", b"[]"), "no tokenizer"),
    "no length": (tokenizer_config(model_max_length=0), "no tokenizer"),
    "length in words": (tokenizer_config(model_max_length="x"), "no tokenizer"),
    "padding in numbers": (tokenizer_config(pad_token=5), "no tokenizer"),
    "padding that the model lacks": (tokenizer_config(pad_token="<new>"), "not belong together"),
    "more tokens": (
        rewritten("tokenizer.json", lambda file: file["model"]["vocab"].update(zz=2**32 - 1)),
        "not belong together",
    ),
    "tokens added": (content("added_tokens.json", b'{"<evil>": 99999999}'), "belong together"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(SOURCE, tmp_path / "model")
    return tmp_path / "model"


def message(work: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        work()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    return str(caught.value)


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_model_is_refused_in_one_sentence(folder: Path, kind: str) -> None:
    edit, expected = HOSTILE[kind]
    edit(folder)
    before = peak_memory_mb()
    assert expected in message(lambda: models.load(str(folder)))
    assert peak_memory_mb() - before < 200
    assert not planted(folder).exists()


def test_what_looks_odd_and_does_no_harm_is_loaded_without_being_obeyed(folder: Path) -> None:
    expected = torch.tensor(json.loads((SOURCE / "expected.json").read_text())["logits"][0])
    config(auto_map={"AutoConfig": "evil.C"}, architectures=["os.system"], extra=5)(folder)
    tokenizer_config(auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})(folder)
    (folder / "evil.py").write_text(f"import os; os.mkdir({str(planted(folder))!r})\n")
    pickled("pytorch_model.bin")(folder)
    pickled("training_args.bin")(folder)
    model, tokenizer = models.load(str(folder))
    with torch.inference_mode():
        logits = model(**tokenizer(["The plot is witty ."], return_tensors="pt")).logits[0]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert not planted(folder).exists()


@pytest.mark.parametrize("length", ["Infinity", "-5", "1e999", "[]", "9" * 100, "null"])
def test_a_length_that_is_none_is_left_alone(folder: Path, length: str) -> None:
    (folder / "metrics.json").write_text(f'{{"options": {{"max_length": {length}}}}}')
    assert trained_max_length(str(folder)) is None
    assert len(list(predict_text(PredictOptions(model=str(folder), texts=["a b c"])))) == 1


# The ways into `models`, and those that load by themselves.
WAYS: dict[str, Callable[[str], Any]] = {
    "load_classifier": models.load_classifier,
    "predict": lambda name: list(predict_text(PredictOptions(model=name, texts=["a"]))),
    "Predictor": Predictor,
    "evaluate": lambda name: evaluate_text(EvaluateOptions(model=name, dataset="demo_reviews")),
    "scikit-learn": NiNTextClassifier.load,
    "training on": lambda name: models.build(
        TrainOptions(model=name, tokenizer=name, ngrams=0), ["a"], [0], ["a", "b"]
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["code of its own", "weights elsewhere by index", "pickle alone"])
def test_no_way_of_loading_obeys(folder: Path, way: str, kind: str) -> None:
    HOSTILE[kind][0](folder)
    message(lambda: WAYS[way](str(folder)))
    assert not planted(folder).exists()


@pytest.fixture
def on_the_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An id under which the hub has what the folder holds when it is asked."""

    def download(name: str, *, allow_patterns: list[str], ignore_patterns: str) -> str:
        assert name == "someone/model"
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.*")}
        kept = filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        for file in kept:
            (tmp_path / "cache").mkdir(exist_ok=True)
            shutil.copy(files[file], tmp_path / "cache" / file)
        return str(tmp_path / "cache")

    monkeypatch.setattr("nin_text.model_files.snapshot_download", download)
    return "someone/model"


@pytest.mark.parametrize(
    "kind",
    [
        *("a billion channels", "layers without end", "weights elsewhere", "pickle alone"),
        *("code of its own", "weights cut short", "tokenizer empty", "configuration too deep"),
    ],
)
def test_a_model_on_the_hub_is_looked_at_as_a_folder_is(
    folder: Path, on_the_hub: str, kind: str
) -> None:
    edit, expected = HOSTILE[kind]
    edit(folder)
    before = peak_memory_mb()
    assert expected in message(lambda: models.load(on_the_hub))
    assert peak_memory_mb() - before < 200
    assert not planted(folder).exists()


def test_neither_code_nor_pickles_are_downloaded(
    folder: Path, on_the_hub: str, tmp_path: Path
) -> None:
    pickled("pytorch_model.bin")(folder)
    (folder / "evil.py").write_text("")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    model, _ = models.load(on_the_hub)
    assert len(models.label_names(model)) == 3
    assert Predictor(on_the_hub).predict(["The plot is witty ."]) != []
    saved = {path.name for path in SOURCE.iterdir()}
    assert {path.name for path in (tmp_path / "cache").iterdir()} == saved


# Of one block: a network whose convolution the Predictor folds into tables.
ONE_BLOCK: dict[str, tuple[Edit, str]] = {
    "a farther reach than any text": (config(dilations=[10**9]), "reaches farther"),
    "wide kernel": (config(kernel_sizes=[[10**9 + 1]]), "reaches farther"),
    "other kernel": (config(kernel_sizes=[[5]]), "could be loaded"),
    **{
        kind: HOSTILE[kind]
        for kind in (
            *("n-grams without end", "a billion tokens", "a billion buckets", "other classes"),
            *("a billion classes", "negative width", "no number", "null", "classes in a list"),
            *("classes of one name", "a problem that is a number", "configuration too deep"),
            *("kernels from a hub", "weights elsewhere", "pickle by another name"),
            *("tensor missing", "tensor of no numbers", "tokenizer settings a list", "no length"),
            *("more tokens", "length in words"),
        )
    },
}


@pytest.fixture
def one_block(folder: Path) -> Path:
    """A folder that a `Predictor` reads without transformers."""
    tokens = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    sizes = {"vocab_size": tokens, "num_labels": 3, "ngram_size": 2, "ngram_buckets": 64}
    blocks = {"embedding_size": 8, "block_channels": [[8, 8]], "kernel_sizes": [[3]]}
    NiNTextForSequenceClassification(NiNTextConfig(**sizes, **blocks)).save_pretrained(folder)
    assert read_packed(folder) is not None
    return folder


@pytest.mark.parametrize("kind", ONE_BLOCK)
def test_a_predictor_refuses_what_is_refused_elsewhere(one_block: Path, kind: str) -> None:
    edit, expected = ONE_BLOCK[kind]
    edit(one_block)
    before = peak_memory_mb()
    assert read_packed(one_block) is None
    assert expected in message(lambda: Predictor(one_block))
    assert peak_memory_mb() - before < 200
    assert not planted(one_block).exists()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("012ab"), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_what_is_read_without_transformers_is_a_whole_model(one_block: Path, data: Any) -> None:
    """Any value in any place: it is left to `models.load`, or all answers are still numbers."""
    saved = {name: (one_block / name).read_bytes() for name in MODEL_FILES}
    name = data.draw(st.sampled_from(["config.json", "tokenizer_config.json"]))
    values = json.loads(saved[name])
    key = data.draw(st.sampled_from([*values, "auto_map", "problem_type"]))
    values[key] = data.draw(VALUES)
    try:
        (one_block / name).write_text(json.dumps(values))
        if read_packed(one_block) is not None:
            assert np.isfinite(Predictor(one_block).logits(["a great plot", ""])).all()
    finally:
        for name, content in saved.items():
            (one_block / name).write_bytes(content)


@pytest.mark.parametrize("field", sorted({*FIELDS, "auto_map"}))
def test_a_field_more_or_less_is_left_to_transformers(one_block: Path, field: str) -> None:
    values = json.loads((one_block / "config.json").read_text())
    values.pop(field) if field in values else values.update({field: {}})
    (one_block / "config.json").write_text(json.dumps(values))
    assert read_packed(one_block) is None


def test_nobody_is_asked_whether_code_may_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers asks on a terminal, and somebody might say yes."""
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
    code(folder)
    tokenizer_config(auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})(folder)
    for way in WAYS.values():
        message(lambda way=way: way(str(folder)))
    assert not asked
    assert not planted(folder).exists()
