"""From --dataset to splits: found in the places promised, carved alike every time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import datasets
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nin_text.data import Split, TextDataset, load_split, load_text_dataset, reduced
from nin_text.errors import UserError
from nin_text.sources import KNOWN
from nin_text.splits import stratified, subset


def frame(n: int, start: int = 0, labels: tuple = (0, 1)) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "text": [f"text number {i}" for i in range(start, start + n)],
            "label": [labels[i % len(labels)] for i in range(n)],
        }
    )


@pytest.fixture
def imdb(tmp_path: Path) -> Path:
    """A folder of known data sets that holds a part of one."""
    folder = tmp_path / "datasets" / "imdb"
    folder.mkdir(parents=True)
    frame(40).to_parquet(folder / "train.parquet")
    frame(10, 100).to_parquet(folder / "test.parquet")
    frame(7, 200, labels=(-1,)).to_parquet(folder / "unsupervised.parquet")
    return folder.parent


def sizes(dataset) -> dict[str, int]:
    return {split: len(part) for split, part in dataset.splits.items()}


def test_a_single_file_is_split_with_a_fixed_seed(tmp_path: Path) -> None:
    frame(100, labels=("no", "yes")).to_csv(tmp_path / "a.csv", index=False)
    dataset = load_text_dataset(str(tmp_path / "a.csv"))
    assert sizes(dataset) == {"train": 81, "validation": 9, "test": 10}
    assert dataset.label_names == ["no", "yes"]
    texts = [text for part in dataset.splits.values() for text in part.texts]
    assert len(set(texts)) == 100
    again = load_text_dataset(str(tmp_path / "a.csv"))
    assert again.splits == dataset.splits
    assert again.fingerprint() == dataset.fingerprint()
    assert any("carved from train" in note for note in dataset.notes)


def test_known_names_are_looked_for_in_the_folders_in_order(
    imdb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NIN_TEXT_DATA", str(tmp_path / "nowhere"))
    assert load_text_dataset("imdb", data_dir=imdb).source == str(imdb / "imdb")
    monkeypatch.setenv("NIN_TEXT_DATA", str(imdb))
    assert load_text_dataset("imdb").source == str(imdb / "imdb")
    monkeypatch.delenv("NIN_TEXT_DATA")
    imdb.rename(tmp_path / "data")
    assert load_text_dataset("imdb").source == "data/imdb"


def test_a_known_name_brings_class_names_and_owns_up_to_a_partial_copy(imdb: Path) -> None:
    dataset = load_text_dataset("imdb", data_dir=imdb)
    assert dataset.label_names == ["negative", "positive"]
    assert sizes(dataset) == {"train": 36, "validation": 4, "test": 10}
    assert "partial training set: 40 of the 25,000 rows of imdb" in dataset.notes


def test_unlabelled_texts_are_read_only_if_asked_for(imdb: Path) -> None:
    dataset = load_text_dataset("imdb", data_dir=imdb, unsupervised=True)
    assert dataset.splits["unsupervised"].labels == [-1] * 7
    plain = load_text_dataset("imdb", data_dir=imdb)
    assert "unsupervised" not in plain.splits
    # A run learns from whatever was read: all of it must be the same when the run is resumed.
    assert plain.fingerprint() != dataset.fingerprint()
    again = load_text_dataset("imdb", data_dir=imdb, unsupervised=True)
    assert again.fingerprint() == dataset.fingerprint()


@pytest.mark.parametrize("columns", [("title", "content"), ("content", "topic")])
def test_a_copy_of_a_known_set_is_read_as_the_hub_has_it_if_it_has_its_columns(
    tmp_path: Path, columns: tuple[str, str]
) -> None:
    folder = tmp_path / "dbpedia_14"
    folder.mkdir()
    for split, n in (("train", 40), ("test", 8)):
        table = {name: [f"{name} {i}" for i in range(n)] for name in columns}
        pd.DataFrame({**table, "label": ["a", "b"] * (n // 2)}).to_csv(
            folder / f"{split}.csv", index=False
        )
    dataset = load_text_dataset("dbpedia_14", data_dir=tmp_path)
    expected = "title 0 content 0" if "title" in columns else "content 0"
    assert dataset.splits["test"].texts[0] == expected


def test_a_train_subset_is_said_to_be_one(tmp_path: Path) -> None:
    folder = tmp_path / "ag_news"
    folder.mkdir()
    frame(40, labels=(0, 1, 2, 3)).to_parquet(folder / "train_subset.parquet")
    frame(8, 100, labels=(0, 1, 2, 3)).to_parquet(folder / "test.parquet")
    notes = load_text_dataset("ag_news", data_dir=tmp_path).notes
    assert "the training file train_subset.parquet is a subset" in notes


def test_a_given_validation_split_is_used(tmp_path: Path) -> None:
    for name, n in {"train": 20, "validation": 6, "test": 4}.items():
        frame(n).to_json(tmp_path / f"{name}.jsonl", orient="records", lines=True)
    dataset = load_text_dataset(str(tmp_path))
    assert sizes(dataset) == {"train": 20, "validation": 6, "test": 4}
    assert dataset.notes == []


def test_the_aclimdb_layout(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("neg", "pos", "unsup"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(10):
                (tmp_path / split / name / f"{i}_7.txt").write_text(f"{split} {name} {i}")
    dataset = load_text_dataset(str(tmp_path))
    assert dataset.label_names == ["neg", "pos"]
    assert sizes(dataset) == {"train": 18, "validation": 2, "test": 20}
    unlabelled = load_text_dataset(str(tmp_path), unsupervised=True).splits["unsupervised"]
    assert unlabelled.texts == [f"train unsup {i}" for i in range(10)]
    assert unlabelled.labels == [-1] * 10


def test_class_folders_without_splits(tmp_path: Path) -> None:
    for name in ("cats", "dogs", "eels"):
        (tmp_path / name).mkdir()
        for i in range(20):
            (tmp_path / name / f"{i}.txt").write_text(f"{name} {i}")
    dataset = load_text_dataset(str(tmp_path))
    assert dataset.label_names == ["cats", "dogs", "eels"]
    assert sizes(dataset) == {"train": 48, "validation": 6, "test": 6}
    assert Counter(dataset.splits["test"].labels) == {0: 2, 1: 2, 2: 2}


@pytest.mark.parametrize("single", [False, True])
def test_a_saved_datasets_directory_brings_its_class_names(tmp_path: Path, single: bool) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    train = datasets.Dataset.from_pandas(frame(40), features=features)
    test = datasets.Dataset.from_pandas(frame(10, 100), features=features)
    (train if single else datasets.DatasetDict({"train": train, "test": test})).save_to_disk(
        tmp_path / "saved"
    )
    dataset = load_text_dataset(str(tmp_path / "saved"))
    assert dataset.label_names == ["no", "yes"]
    assert len(dataset.splits["test"]) == (4 if single else 10)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ((1, 0), ["0", "1"]),
        (("10", "9"), ["9", "10"]),
        ((1.0, 2.0), ["1", "2"]),
        ((True, False), ["0", "1"]),
        (("b ", "a"), ["a", "b"]),
        (("2", "many"), ["2", "many"]),
    ],
)
def test_labels_become_names_in_a_natural_order(tmp_path: Path, labels, names) -> None:
    frame(40, labels=labels).to_parquet(tmp_path / "a.parquet")
    dataset = load_text_dataset(str(tmp_path / "a.parquet"))
    assert dataset.label_names == names
    first = dict(zip(dataset.splits["train"].texts, dataset.splits["train"].labels, strict=True))
    for i, text in enumerate(frame(40)["text"]):
        if text in first:
            wanted = str(labels[i % 2]).strip().removesuffix(".0")
            wanted = {"True": "1", "False": "0"}.get(wanted, wanted)
            assert names[first[text]] == wanted


def test_column_names_can_be_given(tmp_path: Path) -> None:
    frame(40).rename(columns={"text": "words", "label": "mark"}).to_csv(
        tmp_path / "a.csv", index=False
    )
    with pytest.raises(UserError, match="--text-column"):
        load_text_dataset(str(tmp_path / "a.csv"))
    dataset = load_text_dataset(str(tmp_path / "a.csv"), text_column="words", label_column="mark")
    assert dataset.label_names == ["0", "1"]
    with pytest.raises(UserError, match="cannot both be"):
        load_text_dataset(str(tmp_path / "a.csv"), text_column="words", label_column="words")


def test_empty_texts_are_refused_or_left_out(tmp_path: Path) -> None:
    table = frame(40)
    table.loc[[3, 4], "text"] = ["  ", None]
    table.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"2 of 40 texts .*row 4.*--drop-empty"):
        load_text_dataset(str(tmp_path / "a.parquet"))
    dataset = load_text_dataset(str(tmp_path / "a.parquet"), drop_empty=True)
    assert sum(sizes(dataset).values()) == 38
    assert any("2 empty rows" in note for note in dataset.notes)


def test_text_that_is_numbers_is_refused(tmp_path: Path) -> None:
    pd.DataFrame({"text": range(40), "label": [0, 1] * 20}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="holds int values, not text"):
        load_text_dataset(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ((1,), "all training examples have the same label"),
        ((0, float("nan")), "labels of the train split are missing or NaN"),
        ((0, None), "missing or NaN"),
        (([0], [1]), "single values"),
    ],
)
def test_labels_that_cannot_be_learned_are_refused(tmp_path: Path, labels, message) -> None:
    table = frame(40)
    table["label"] = [labels[i % len(labels)] for i in range(40)]
    table.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message):
        load_text_dataset(str(tmp_path / "a.parquet"))


def test_a_test_label_unseen_in_training_is_refused(tmp_path: Path) -> None:
    frame(40, labels=("a", "b")).to_csv(tmp_path / "train.csv", index=False)
    frame(10, labels=("a", "c")).to_csv(tmp_path / "test.csv", index=False)
    with pytest.raises(UserError, match=r"the test split has the label 'c' \(row 2\)"):
        load_text_dataset(str(tmp_path))


@pytest.mark.parametrize(
    ("train", "test"), [(("1", "2", "3"), ("0", "1")), ((0, 2), (0, 1)), (("a", "1"), ("a", "0"))]
)
def test_a_number_is_no_index_where_classes_have_numbers(tmp_path: Path, train, test) -> None:
    frame(60, labels=train).to_csv(tmp_path / "train.csv", index=False)
    frame(10, 100, labels=test).to_csv(tmp_path / "test.csv", index=False)
    with pytest.raises(UserError, match="not among the classes trained on"):
        load_text_dataset(str(tmp_path))


def test_the_class_names_are_those_of_the_label_column(tmp_path: Path) -> None:
    table = frame(40).assign(topic=[0, 1] * 20)
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["no", "yes"]),
            "topic": datasets.ClassLabel(names=["sport", "war"]),
        }
    )
    datasets.Dataset.from_pandas(table, features=features).save_to_disk(tmp_path / "saved")
    saved = str(tmp_path / "saved")
    assert load_text_dataset(saved).label_names == ["no", "yes"]
    assert load_text_dataset(saved, label_column="topic").label_names == ["sport", "war"]


def test_class_names_of_a_known_data_set_belong_to_its_own_label(imdb: Path) -> None:
    for name in ("train", "test"):
        path = imdb / "imdb" / f"{name}.parquet"
        pd.read_parquet(path).assign(other=lambda t: t["label"]).to_parquet(path)
    dataset = load_text_dataset("imdb", data_dir=imdb, label_column="other")
    assert dataset.label_names == ["0", "1"]


def test_classes_without_test_examples_are_noted(tmp_path: Path) -> None:
    frame(60, labels=("a", "b", "c")).to_csv(tmp_path / "train.csv", index=False)
    frame(10, 100, labels=("a", "b")).to_csv(tmp_path / "test.csv", index=False)
    notes = load_text_dataset(str(tmp_path)).notes
    assert "1 classes have no example in the test split: c" in notes


def test_a_label_of_thousands_of_digits_is_a_word(tmp_path: Path) -> None:
    frame(40, labels=("9" * 5000, "8" * 5000)).to_csv(tmp_path / "a.csv", index=False)
    assert len(load_text_dataset(str(tmp_path / "a.csv")).label_names) == 2


def test_names_that_are_no_paths_are_refused() -> None:
    with pytest.raises(UserError, match="--dataset is empty"):
        load_text_dataset("")
    with pytest.raises(UserError, match="there is no file or folder"):
        load_text_dataset("~nobody-of-this-name/x.csv")


def test_too_few_examples_are_refused(tmp_path: Path) -> None:
    frame(6).to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(UserError, match="6 examples are too few"):
        load_text_dataset(str(tmp_path / "a.csv"))


@pytest.mark.parametrize("name", ["imdbb", "nothing.csv", "./nothing", "a/b/c"])
def test_a_name_that_is_nothing_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="there is no"):
        load_text_dataset(name)


def test_limit_keeps_the_class_shares(tmp_path: Path) -> None:
    frame(400, labels=("a", "a", "a", "b")).to_csv(tmp_path / "a.csv", index=False)
    dataset = load_text_dataset(str(tmp_path / "a.csv"), limit=20)
    assert sizes(dataset) == {"train": 20, "validation": 20, "test": 20}
    assert Counter(dataset.splits["train"].labels) == {0: 15, 1: 5}
    assert load_text_dataset(str(tmp_path / "a.csv"), limit=20).splits == dataset.splits


def test_limit_takes_as_many_as_it_says_also_of_rare_classes(tmp_path: Path) -> None:
    tens = Split([f"t{i}" for i in range(100)], [i % 10 for i in range(100)])
    assert len(subset(tens, 99)) == 99
    rare = Split([f"t{i}" for i in range(100)], [1, 2, *[0] * 98])
    assert set(subset(rare, 52).labels) == {0, 1, 2}
    for name in ("train", "validation", "test"):
        frame(2, labels=("a", "b")).to_csv(tmp_path / f"{name}.csv", index=False)
    with pytest.raises(UserError, match="all training examples have the same label"):
        load_text_dataset(str(tmp_path), limit=1)
    part, *_ = load_split(str(tmp_path / "test.csv"), "test", ["a", "b"], limit=1)
    assert len(part) == 1


def test_one_split_in_the_terms_of_a_model(imdb: Path, tmp_path: Path) -> None:
    part, _, _ = load_split("imdb", "test", ["positive", "negative"], data_dir=imdb)
    assert part.labels == [1, 0] * 5  # the model counts the classes the other way round
    frame(10, labels=("positive", "negative")).to_csv(tmp_path / "new.csv", index=False)
    part, source, _ = load_split(str(tmp_path / "new.csv"), "test", ["negative", "positive"])
    assert (part.labels, source) == ([1, 0] * 5, str(tmp_path / "new.csv"))
    frame(10, labels=(0, 1)).to_csv(tmp_path / "new.csv", index=False)
    part, _, _ = load_split(str(tmp_path / "new.csv"), "test", ["negative", "positive"])
    assert part.labels == [0, 1] * 5
    frame(10, labels=("positive", "odd")).to_csv(tmp_path / "new.csv", index=False)
    with pytest.raises(UserError, match="'odd'"):
        load_split(str(tmp_path / "new.csv"), "test", ["negative", "positive"])


@settings(max_examples=80, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=12, max_size=80),
    share=st.floats(0.05, 0.5),
)
def test_a_stratified_part_is_a_fair_share_of_every_class(labels: list[int], share: float) -> None:
    size = max(1, int(share * len(labels)))
    taken, rest = stratified(labels, size)
    assert sorted([*taken, *rest]) == list(range(len(labels)))
    assert len(taken) <= size
    whole, part = Counter(labels), Counter(labels[i] for i in taken)
    for label, count in whole.items():
        assert part[label] < count  # training keeps at least one of each class
        assert abs(part[label] - count * size / len(labels)) <= 2.5


def test_of_several_folders_for_a_split_the_most_telling_is_read(tmp_path: Path) -> None:
    for split in ("train", "training", "validation", "dev", "test"):
        for label in ("bad", "good"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(5):
                (tmp_path / split / label / f"{i}.txt").write_text(f"{split} {label} {i}")
    splits = load_text_dataset(str(tmp_path)).splits
    for name, split in splits.items():
        assert all(text.startswith(f"{name} ") for text in split.texts), name


def glue() -> datasets.DatasetDict:
    """What `datasets.load_dataset` gives for a task of GLUE: test labels are withheld."""
    features = datasets.Features(
        {
            "sentence": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["no", "yes"]),
            "idx": datasets.Value("int32"),
        }
    )

    def part(name: str, n: int, label: int | None = None) -> datasets.Dataset:
        rows = {
            "sentence": [f"{name} {i}" for i in range(n)],
            "label": [i % 2 if label is None else label for i in range(n)],
            "idx": list(range(n)),
        }
        return datasets.Dataset.from_dict(rows, features=features)

    return datasets.DatasetDict(
        train=part("train", 60), validation=part("dev", 10), test=part("test", 20, -1)
    )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """A stand-in for the hub, which has one data set of two configurations; what it is asked."""
    asked: list[tuple[str, str | None]] = []

    def load_dataset(hub_id: str, configuration: str | None = None) -> datasets.DatasetDict:
        asked.append((hub_id, configuration))
        if configuration is None:
            raise ValueError("Config name is missing. Please pick one among: ['sst2', 'cola']")
        return glue()

    monkeypatch.setattr("nin_text.hub._hub_is_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_configuration_of_a_hub_data_set_is_named(hub: list[tuple[str, str | None]]) -> None:
    with pytest.raises(UserError, match=r"several .*sst2.*name one with --dataset-config"):
        load_text_dataset("owner/glue")
    dataset = load_text_dataset("owner/glue", dataset_config="sst2")
    assert hub == [("owner/glue", None), ("owner/glue", "sst2")]
    assert dataset.source == "hub:owner/glue, sst2"
    assert dataset.label_names == ["no", "yes"]
    part, _, _ = load_split("owner/glue", "test", ["yes", "no"], dataset_config="sst2")
    assert part.texts == dataset.splits["test"].texts
    assert part.labels == [1 - label for label in dataset.splits["test"].labels]


@pytest.mark.parametrize("name", ["demo_reviews", "imdb", "missing", ".", __file__])
def test_only_hub_data_sets_have_configurations(name: str) -> None:
    with pytest.raises(UserError, match="--dataset-config is for data sets on the hub"):
        load_text_dataset(name, dataset_config="sst2")
    with pytest.raises(UserError, match="--dataset-config is for data sets on the hub"):
        load_split(name, "test", ["no", "yes"], dataset_config="sst2")


def test_a_test_split_without_labels_alone_is_left_out_with_a_word(tmp_path: Path) -> None:
    frame(40).to_csv(tmp_path / "train.csv", index=False)
    frame(5).assign(label=-1.0).to_csv(tmp_path / "test.csv", index=False)
    dataset = load_text_dataset(str(tmp_path))
    assert len(dataset.splits["test"]) == 4
    assert "the test split has no labels (all are -1) and is left out" in dataset.notes


@pytest.mark.usefixtures("hub")
def test_where_test_labels_are_withheld_the_validation_split_is_tested_on() -> None:
    dataset = load_text_dataset("owner/glue", dataset_config="sst2")
    assert dataset.splits["test"].texts == [f"dev {i}" for i in range(10)]
    assert all(text.startswith("train ") for text in dataset.splits["validation"].texts)
    assert len(dataset.splits["train"]) + len(dataset.splits["validation"]) == 60
    assert any("withheld" in note for note in dataset.notes)
    assert dataset.tested_on == "validation"
    for split in ("test", "validation"):  # never one carved from what a model was trained on
        part, _, _ = load_split("owner/glue", split, ["no", "yes"], dataset_config="sst2")
        assert part.texts == dataset.splits["test"].texts


def test_a_class_called_minus_one_is_a_class(tmp_path: Path) -> None:
    for split, labels in (("train", [-1, 1] * 20), ("test", [-1] * 5)):
        rows = pd.DataFrame({"text": [f"{split} {i}" for i in range(len(labels))], "label": labels})
        rows.to_csv(tmp_path / f"{split}.csv", index=False)
    dataset = load_text_dataset(str(tmp_path))
    assert dataset.label_names == ["1", "-1"]
    assert dataset.splits["test"].labels == [1] * 5


def test_every_known_name_has_what_is_needed() -> None:
    assert {"imdb", "ag_news", "sst2", "trec", "yelp_polarity", "dbpedia_14"} <= set(KNOWN)
    assert {"20newsgroups", "rotten_tomatoes"} <= set(KNOWN)
    for name, known in KNOWN.items():
        assert known.hub_id.count("/") == 1, name
        assert known.train_rows > 0


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("imdb", {"train": 22_500, "validation": 2_500, "test": 25_000}),
        ("ag_news", {"train": 45_382, "validation": 5_000, "test": 7_600}),
        ("sst2", {"train": 67_349, "validation": 872, "test": 1_821}),
        ("trec", {"train": 4_906, "validation": 546, "test": 500}),
    ],
)
def test_the_real_data_sets(real_data: Path, name: str, expected: dict[str, int]) -> None:
    dataset = load_text_dataset(name)
    assert sizes(dataset) == expected
    assert dataset.label_names == list(KNOWN[name].labels)
    partial = any("partial" in note for note in dataset.notes)
    assert partial == (name == "ag_news")


def test_reduced_data_are_nested_and_have_every_class() -> None:
    data = load_text_dataset("demo_topics", limit=400)
    small, large = reduced(data, 40), reduced(data, 200)
    for part, size in ((small, 40), (large, 200)):
        assert len(part.splits["train"]) + len(part.splits["validation"]) == size
        assert set(part.splits["train"].labels) == set(range(len(data.label_names)))
        assert part.splits["test"] is data.splits["test"]
    assert set(small.splits["train"].texts) <= set(large.splits["train"].texts)
    assert len(data.splits["train"]) == 400  # the whole is as it was


# ---- few labels, and texts without any ---------------------------------------------------------


def test_what_is_labelled_is_part_of_the_data_and_the_rest_is_read_without_labels(
    imdb: Path,
) -> None:
    whole = load_text_dataset("imdb", data_dir=imdb)
    read = load_text_dataset("imdb", data_dir=imdb, labelled=20, unsupervised=True)
    alone = load_text_dataset("imdb", data_dir=imdb, labelled=20)
    assert sizes(read) == {"train": 18, "validation": 2, "test": 10, "unsupervised": 7 + 20}
    assert sizes(alone) == {"train": 18, "validation": 2, "test": 10}
    labelled = {
        text: label
        for split in ("train", "validation")
        for text, label in zip(whole.splits[split].texts, whole.splits[split].labels, strict=True)
    }
    for split in ("train", "validation"):
        part = read.splits[split]
        assert part == alone.splits[split]
        assert [labelled.pop(text) for text in part.texts] == part.labels
    unlabelled = read.splits["unsupervised"]
    assert set(unlabelled.labels) == {-1}
    assert set(unlabelled.texts[7:]) == set(labelled)
    assert "the labels of 20 of 40 examples are used" in read.notes[-1]
    assert read.splits["test"] == whole.splits["test"]


@pytest.mark.parametrize("labelled", [1, 19, 41])
def test_too_few_or_more_labels_than_there_are_is_said(imdb: Path, labelled: int) -> None:
    with pytest.raises(UserError, match="--labelled must be between 20 and the 40 labelled"):
        load_text_dataset("imdb", data_dir=imdb, labelled=labelled)


def test_unlabelled_files_are_read_but_for_what_is_judged_by(tmp_path: Path) -> None:
    frame(100).to_csv(tmp_path / "a.csv", index=False)
    whole = load_text_dataset(str(tmp_path / "a.csv"))
    judged = [whole.splits[split].texts[0] for split in ("validation", "test")]
    pool = tmp_path / "pool"
    pool.mkdir()
    (pool / "1.txt").write_text("\n".join(["one", "", *judged, "two"]))
    pd.DataFrame({"text": ["three", "", "four"]}).to_csv(pool / "2.csv", index=False)

    def read(**options: object) -> TextDataset:
        return load_text_dataset(str(tmp_path / "a.csv"), unlabelled_file=pool, **options)

    dataset = read(unsupervised=True)
    assert dataset.splits["unsupervised"].texts == ["one", "two", "three", "four"]
    assert sizes(read(unsupervised=True, limit=3))["unsupervised"] == 3
    assert sizes(read(unsupervised=True, labelled=50))["unsupervised"] == 4 + 40
    assert dataset.fingerprint() != whole.fingerprint()
    assert dataset.labelled().fingerprint() == whole.fingerprint()
    (pool / "2.csv").unlink()
    (pool / "1.txt").write_text("\n".join(judged))
    with pytest.raises(UserError, match="holds no text but empty ones and those"):
        read(unsupervised=True)
    (pool / "1.txt").unlink()
    with pytest.raises(UserError, match="holds no files that end in"):
        read(unsupervised=True)


def test_an_unlabelled_file_may_call_its_column_otherwise(tmp_path: Path) -> None:
    frame(100).rename(columns={"text": "body"}).to_csv(tmp_path / "a.csv", index=False)
    (tmp_path / "pool.csv").write_text("text\none\ntwo\n")
    options = {"text_column": "body", "unlabelled_file": tmp_path / "pool.csv"}
    dataset = load_text_dataset(str(tmp_path / "a.csv"), unsupervised=True, **options)
    assert dataset.splits["unsupervised"].texts == ["one", "two"]
    (tmp_path / "pool.csv").write_text("words\none\ntwo\n")
    with pytest.raises(UserError, match="--text-column"):
        load_text_dataset(str(tmp_path / "a.csv"), unsupervised=True, **options)


def test_a_large_validation_split_leaves_half_of_few_labels_to_learn_from(tmp_path: Path) -> None:
    frame(100, labels=tuple("abcde")).to_csv(tmp_path / "train.csv", index=False)
    frame(900, 100, labels=tuple("abcde")).to_csv(tmp_path / "validation.csv", index=False)
    dataset = load_text_dataset(str(tmp_path), labelled=20)
    assert sizes(dataset)["train"] == sizes(dataset)["validation"] == 10
    assert set(dataset.splits["train"].labels) == set(range(5))


def test_unlabelled_texts_of_a_folder_are_none_that_are_judged_by(tmp_path: Path) -> None:
    frame(40).to_csv(tmp_path / "train.csv", index=False)
    frame(10, 100).to_csv(tmp_path / "test.csv", index=False)
    both = pd.concat([frame(10, 100), frame(5, 300)])
    both[["text"]].to_csv(tmp_path / "unsupervised.csv", index=False)
    dataset = load_text_dataset(str(tmp_path), unsupervised=True)
    assert dataset.splits["unsupervised"].texts == frame(5, 300)["text"].tolist()
    assert any("10 unlabelled texts are left out" in note for note in dataset.notes)
