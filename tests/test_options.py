"""Options are defined once; the help tells the truth about them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from pathlib import Path

import pytest

from nin_text.cli import add_options, parse_options, spelled_out
from nin_text.configuration import NETWORKS, PRESETS, NiNTextConfig
from nin_text.demo_data import LABELS
from nin_text.errors import UserError
from nin_text.image_options import ImageBenchmarkOptions
from nin_text.options import (
    NETWORK_NAMES,
    PRESET_NAMES,
    BenchmarkOptions,
    CompareOptions,
    EvaluateOptions,
    PredictOptions,
    TrainOptions,
    check,
    saved_nin,
    with_recipe,
)
from nin_text.recipes import DATASET_RECIPES, DEFAULT_RECIPE, MODEL_RECIPES
from nin_text.run_folder import folder_of
from nin_text.sources import KNOWN


def parse(*arguments: str) -> TrainOptions:
    parser = argparse.ArgumentParser()
    add_options(parser, TrainOptions)
    return parse_options(TrainOptions, parser.parse_args(arguments))


def test_defaults_of_the_command_line_are_those_of_the_dataclass() -> None:
    assert parse() == TrainOptions()


def test_arguments_become_options_of_their_type() -> None:
    options = parse(
        *("--dataset", "imdb", "--epochs", "2", "--learning-rate", "3e-4"),
        *("--data-dir", "x/y", "--no-lowercase", "--resume"),
    )
    assert (options.dataset, options.epochs, options.learning_rate) == ("imdb", 2, 3e-4)
    assert options.data_dir == Path("x/y")
    assert not options.lowercase
    assert options.resume


def test_ngrams_of_many_reviews_are_smoothed_more_unless_told_otherwise() -> None:
    many, few = (with_recipe(parse("--dataset", "imdb"), n).ngram_smoothing for n in (22_500, 500))
    assert many == 5 and few == 0.5
    assert with_recipe(parse("--dataset", "ag_news"), 45_000).ngram_smoothing == 0.5
    told = with_recipe(parse("--dataset", "imdb", "--ngram-smoothing", "7"), 500)
    assert told.ngram_smoothing == 7


def test_the_recipe_fills_in_what_was_left_open_and_nothing_else() -> None:
    options = with_recipe(parse("--dataset", "imdb", "--batch-size", "7"), 25_000)
    assert options.batch_size == 7
    assert options.epochs == DATASET_RECIPES["imdb"]["epochs"]
    assert options.weight_decay == DEFAULT_RECIPE["weight_decay"]
    for spec in dataclasses.fields(options):
        if spec.name in DEFAULT_RECIPE:
            assert getattr(options, spec.name) is not None


@pytest.mark.parametrize("dataset", ["demo_topics", "imdb"])
def test_without_ngrams_there_is_nothing_to_pretrain_on(dataset: str) -> None:
    assert with_recipe(parse("--dataset", dataset), 1000).pretrain_epochs > 0
    assert with_recipe(parse("--dataset", dataset, "--ngrams", "0"), 1000).pretrain_epochs == 0


def test_the_name_of_a_preset_is_not_that_of_a_folder(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nin-text-base").symlink_to(trained)
    assert saved_nin("./nin-text-base")
    assert not saved_nin("nin-text-base")


def test_unlabelled_texts_are_read_for_presets_alone() -> None:
    assert parse().arguments()["unsupervised"]
    assert not parse("--no-unlabelled").arguments()["unsupervised"]
    for other in ("some/model", *NETWORK_NAMES):
        assert not parse("--model", other).arguments()["unsupervised"]


def test_small_data_sets_get_smaller_batches() -> None:
    sizes = [with_recipe(parse(), examples).batch_size for examples in (10, 1000, 100_000)]
    assert sizes == [4, 20, 64]
    assert with_recipe(parse("--batch-size", "64"), 10).batch_size == 64
    large = [with_recipe(parse("--model", "nin-text-large"), n).batch_size for n in (10, 100_000)]
    assert large == [4, 128]


def test_only_deep_networks_predict_hidden_tokens() -> None:
    """A preset's own recipe comes last, also where a data set has one."""
    for dataset in ("demo_reviews", "imdb"):
        deep = with_recipe(parse("--model", "nin-text-large", "--dataset", dataset), 100)
        assert (deep.mlm_probability, deep.pretrain_epochs) == (0.15, 9)
        assert with_recipe(parse("--dataset", dataset), 100).mlm_probability == 0
    alone = with_recipe(parse("--model", "nin-text-large", "--ngrams", "0"), 9)
    assert (alone.pretrain_epochs, alone.mlm_probability) == (0, 0)
    for arguments in (["--ngrams", "0"], ["--pretrain-epochs", "0"], ["--dataset", "sst2"]):
        with pytest.raises(UserError, match="--mlm-probability is for pretraining"):
            with_recipe(parse("--mlm-probability", "0.1", *arguments), 100)
        with pytest.raises(UserError, match="--compile is for pretraining"):
            with_recipe(parse("--compile", *arguments), 100)


def test_a_saved_model_gets_the_recipe_of_its_preset_whatever_it_was_made_from(
    tmp_path: Path,
) -> None:
    """Also where nothing but the model was saved, or where it began with another saved one."""
    for name in PRESET_NAMES:
        NiNTextConfig.from_preset(name, hidden_dropout=0.1).save_pretrained(tmp_path / name)
        fresh, saved = (
            with_recipe(parse("--model", model), 100_000) for model in (name, str(tmp_path / name))
        )
        for setting in ("learning_rate", "batch_size", "batch_tokens", "epochs"):
            assert getattr(saved, setting) == getattr(fresh, setting)
    config = tmp_path / "nin-text-large" / "config.json"
    for blocks in (7, None, [[256]]):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"block_channels": blocks}))
        assert with_recipe(parse("--model", str(config.parent)), 100_000).batch_size == 64


def test_a_data_sets_own_batch_size_stays_on_few_examples() -> None:
    assert with_recipe(parse("--dataset", "sst2"), 10).batch_size == 128


def test_small_data_sets_get_fewer_pieces_of_words_but_as_many_words() -> None:
    def sizes(*arguments: str) -> list[int]:
        return [with_recipe(parse(*arguments), n).vocab_size for n in (10, 1000, 100_000)]

    assert sizes() == sizes("--tokenizer", "bpe") == [500, 1000, 30_000]
    assert sizes("--tokenizer", "word") == sizes("--model", "kim-cnn") == [30_000] * 3
    assert sizes("--vocab-size", "2000") == [2000] * 3


def test_a_model_from_outside_gets_the_recipe_of_fine_tuning() -> None:
    options = with_recipe(parse("--dataset", "imdb", "--model", "some/model"), 25_000)
    for name, value in MODEL_RECIPES["fine-tuning"].items():
        assert getattr(options, name) == value


@pytest.mark.parametrize("name", NETWORK_NAMES)
def test_a_network_gets_its_own_recipe_whatever_the_data_set(name: str) -> None:
    options = with_recipe(parse("--dataset", "imdb", "--model", name), 25_000)
    for option, value in (DEFAULT_RECIPE | MODEL_RECIPES[name]).items():
        assert getattr(options, option) == value
    assert not options.ngrams and not options.pretrain_epochs and not options.self_training_epochs


@pytest.mark.parametrize("name", ["bilstm", "fine-tuning", "nin-text-large", "default"])
def test_data_that_is_called_as_a_model_is_gets_the_default_recipe(name: str) -> None:
    named, other = (with_recipe(parse("--dataset", d), 25_000) for d in (name, "folder"))
    assert dataclasses.replace(named, dataset="folder") == other


def test_recipes_name_options_data_sets_and_presets_that_exist() -> None:
    names = {spec.name for spec in dataclasses.fields(TrainOptions)}
    for recipe in (DEFAULT_RECIPE, *MODEL_RECIPES.values(), *DATASET_RECIPES.values()):
        assert set(recipe) <= names
    assert set(MODEL_RECIPES) <= {"fine-tuning", *NETWORK_NAMES, *PRESET_NAMES}
    assert set(DATASET_RECIPES) <= {*KNOWN, *LABELS}
    assert tuple(PRESETS) == PRESET_NAMES
    assert tuple(NETWORKS) == NETWORK_NAMES


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("kim-cnn", ["--dropout", "0.1"], "--dropout is for NiN presets (nin-text-paper, "),
        ("kim-cnn", ["--ngrams", "2"], "leave it out with --model kim-cnn"),
        ("some/model", ["--dropout", "0.1"], "nin-text-base, nin-text-large); leave it out with"),
        ("some/model", ["--mlm-probability", "0.1"], "nin-text-large); leave it out with"),
        ("some/model", ["--no-lowercase"], "cnn-fc); leave it out with --model some/model"),
    ],
)
def test_options_that_a_model_would_ignore_are_refused(
    model: str, arguments: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        with_recipe(parse("--model", model, *arguments), 1000)


def test_a_network_takes_the_options_of_the_tokenizer() -> None:
    arguments = ("--tokenizer", "bpe", "--vocab-size", "500", "--no-lowercase")
    options = with_recipe(parse("--model", "kim-cnn", *arguments), 1000)
    assert (options.tokenizer, options.vocab_size, options.lowercase) == ("bpe", 500, False)


def test_every_option_has_a_help_text_with_its_default() -> None:
    for cls in (TrainOptions, EvaluateOptions):
        parser = argparse.ArgumentParser()
        add_options(parser, cls)
        for action in parser._actions[1:]:
            assert action.help
            flag = isinstance(action.default, bool)
            assert flag or "default" in action.help or action.required, action.dest


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 0}, "--epochs must be at least 1, not 0"),
        ({"learning_rate": -1.0}, "--learning-rate must be between"),
        ({"learning_rate": float("nan")}, "--learning-rate"),
        ({"dropout": 1.0}, "--dropout must be between 0 and 0.99, not 1"),
        ({"limit": 0}, "--limit"),
        ({"seed": -1}, "--seed"),
        ({"ngrams": 0, "pretrain_epochs": 1}, "cannot go with --ngrams 0"),
    ],
)
def test_values_that_no_run_can_have_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(TrainOptions(**wrong))
    check(TrainOptions())


@pytest.mark.parametrize(
    ("arguments", "explain", "texts"),
    [
        ([], None, []),
        (["--explain"], "text", []),
        (["--explain", "The plot"], "text", ["The plot"]),
        (["--explain", "The plot", "html"], "text", ["The plot", "html"]),
        (["--explain", "html", "The plot"], "html", ["The plot"]),
        (["--explain", "text", "The plot"], "text", ["The plot"]),
        (["--explain=html", "The plot"], "html", ["The plot"]),
        (["--explain", "--limit", "2", "The plot"], "text", ["The plot"]),
        (["--explain", "--", "html"], "text", ["html"]),
        (["--", "--explain", "html"], None, ["--explain", "html"]),
    ],
)
def test_explain_takes_no_text_for_its_value(
    arguments: list[str], explain: str | None, texts: list[str]
) -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, PredictOptions)
    spelled = spelled_out(PredictOptions, ["--model", "run", *arguments])
    options = parse_options(PredictOptions, parser.parse_args(spelled))
    assert (options.explain, options.texts) == (explain, texts)


def test_configurations_have_folders_of_their_own() -> None:
    options = TrainOptions(dataset="nyu-mll/glue", dataset_config="sst2", model="nin-text-small")
    assert folder_of(options) == Path("runs/glue-sst2-nin-text-small-seed0")


@pytest.mark.parametrize("options", [BenchmarkOptions, ImageBenchmarkOptions])
def test_only_a_comparison_goes_without_rounds(options: type) -> None:
    check(CompareOptions(rounds=0))
    with pytest.raises(UserError, match="--rounds must be between 1 and 1000, not 0"):
        check(options(rounds=0))
