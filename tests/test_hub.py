"""Names of the hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from nin_text.hub import is_hub_id


@pytest.mark.parametrize("name", ["a/b", "stanfordnlp/imdb", "a.b/c_d-e"])
def test_an_owner_and_a_name_are_an_id(name: str) -> None:
    assert is_hub_id(name)


@pytest.mark.parametrize(
    "name", ["", "imdb", "photos/", "/photos", "./photos", "../b", "~/b", "~me/b", "a/b/c", "a/b/"]
)
def test_a_path_or_a_single_word_is_none(name: str) -> None:
    assert not is_hub_id(name)


def test_what_exists_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    assert is_hub_id("a/b")
    (tmp_path / "a" / "b").mkdir()
    assert not is_hub_id("a/b")
