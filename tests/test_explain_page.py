"""A page shows any text harmlessly, its shades tell the evidence, and the sums are the logits."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import Script
from safetensors.numpy import load_file

import nin_text
from nin_text import explain_page, models
from nin_text.errors import UserError
from nin_text.explain import Explanation, contrast, explain
from nin_text.explain_page import Page, explain_html, mistakes_html, phrases, visible
from nin_text.inference import predict_text
from nin_text.options import PredictOptions

GOOD, BAD = "The plot is witty .", "The plot was witty at first but dull in the end ."
HOSTILE = [
    "<img src=x onerror=\"document.title='owned'\"> the plot was dull",
    "</script><script>document.title='owned'</script> <!-- <script> the plot was witty",
    "\"' onmouseover=document.title='owned' x=\" & &amp; dull",
    "\u202egnp.exe\u2066 a\u2028b\u2029c \x00\x1b[2J \ud800 \x85 dull",
]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), "")
needs_browser = pytest.mark.skipif(not BROWSER, reason="there is no chromium or google-chrome here")


@pytest.fixture(scope="module")
def classifier(trained: Path):
    return models.load(str(trained))


class Parsed(HTMLParser):
    """The parts of a page that the tests look at: what a browser makes of it, roughly."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: list[list[tuple[str, str, str]]] = []  # of each text: class, title, text
        self.texts: dict[str, list[str]] = {}
        self.inside: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append((tag, values))
        if tag in ("meta", "link", "rect", "img"):
            return
        self.inside.append(tag)
        if values.get("class") == "words":
            self.tokens.append([])
        if tag == "span" and "title" in values:
            self.tokens[-1].append((values.get("class") or "", values["title"] or "", ""))

    def handle_endtag(self, tag: str) -> None:
        while tag in self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not self.inside:
            return
        self.texts.setdefault(self.inside[-1], []).append(data)
        if self.inside[-1] == "span" and "p" in self.inside and self.tokens and self.tokens[-1]:
            style, title, text = self.tokens[-1][-1]
            if not text:
                self.tokens[-1][-1] = (style, title, data)

    @property
    def data(self) -> dict:
        return json.loads(self.texts["script"][0])


def number(figure: str) -> float:
    return float(figure.replace("\N{MINUS SIGN}", "-"))


def cells(page: str) -> list[list[str]]:
    """Text of the cells of each row of the tables."""
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    return [
        [html.unescape(re.sub(r"<[^>]*>", "", c)) for c in re.findall(r"<t[dh].*?</t[dh]>", row)]
        for row in rows
    ]


# ---- what is shown -----------------------------------------------------------------------------


def test_tokens_are_shaded_by_their_evidence_for_the_answer(classifier) -> None:
    explanation = explain(*classifier, BAD)
    scores = contrast(explanation, 0)
    assert int(explanation.logits.argmax()) == 0 and scores.max() > 1
    (tokens,) = Parsed(explain_html(*classifier, BAD)).tokens
    assert [text for _, _, text in tokens] == BAD.split()
    assert [number(title) for _, title, _ in tokens] == pytest.approx(list(scores), abs=0.0051)
    levels = [8 * abs(s) / np.abs(scores).max() for s in scores]
    for (style, _, _), score, level in zip(tokens, scores, levels, strict=True):
        expected = int(level + 0.5)
        assert style == (f"{'f' if score > 0 else 'a'}{expected}" if expected else "")
    assert tokens[int(scores.argmax())][0] == "f8"


def test_the_page_shows_that_the_evidence_sums_to_the_logits(classifier) -> None:
    explanation = explain(*classifier, BAD)
    page = explain_html(*classifier, BAD)
    _, negative, positive = cells(page)
    for k, (_, _, total, logit, difference) in enumerate((negative, positive)):
        assert number(logit) == pytest.approx(explanation.logits[k], abs=0.0051)
        assert number(total) == pytest.approx(explanation.evidence[:, k].sum(), abs=0.0051)
        assert float(difference) < 1e-4
    assert (negative[0], positive[0]) == ("negative", "positive")
    shown = np.array(Parsed(page).data["texts"][0]["evidence"]).sum(axis=1)
    assert shown == pytest.approx(explanation.logits - explanation.logits.mean(), abs=1e-3)


def test_phrases_are_runs_of_words_shaded_alike() -> None:
    words = ["not", "dull", ",", "wit", "ty", "dull"]
    gaps = ["", " ", " ", " ", "", " ", ""]
    evidence = np.array([[2.0, -2], [1, -1], [0.01, -0.01], [-0.5, 0.5], [-0.5, 0.5], [1, -1]])
    units = explain_page.Units(gaps, words, evidence)
    assert phrases(units, 0, 2.0) == [("not dull", 3.0, 1), ("witty", -1.0, 1), ("dull", 1.0, 1)]
    repeated = explain_page.Units(["", " ", " ", ""], ["Bad", "x", "bad"], evidence[[0, 2, 1]])
    assert phrases(repeated, 0, 2.0) == [("Bad", 3.0, 2)]


def test_tokens_of_one_character_and_of_none_keep_their_share_of_the_sum() -> None:
    evidence = np.array([[1.0, 0], [2, 0], [4, 0], [8, 0]])
    spans = [(0, 0), (0, 1), (0, 1), (1, 2)]  # as [CLS], two bytes of one character, one more
    page = Page(["a", "b"], "title")
    page.add(Explanation("éb", spans, evidence, evidence.sum(axis=0)))
    (tokens,) = Parsed(page.html()).tokens
    assert [(number(title), text) for _, title, text in tokens] == [
        *((0.5, "▫"), (3.0, "é"), (4.0, "b"))
    ]


def test_of_many_classes_the_most_probable_and_the_true_one_are_listed() -> None:
    evidence = np.linspace(0, 5, 40)[None]
    page = Page([f"class {i}" for i in range(40)], "title")
    page.add(Explanation("word", [(0, 4)], evidence, evidence[0]), truth=3)
    (text,) = Parsed(page.html()).data["texts"]
    assert text["classes"] == [f"class {i}" for i in (*range(39, 29, -1), 3)]
    assert "11 of 40 classes" in page.html()


# ---- any text ----------------------------------------------------------------------------------


@pytest.mark.parametrize("truths", [[0], [0, 1, 1], [0, 2], [-1, 0], [0.5, 1], [None, 1]])
def test_true_classes_are_one_for_each_text(classifier, truths: list) -> None:
    explain_html(*classifier, [GOOD, BAD], truths=[1, 0])
    with pytest.raises(ValueError, match=r"truths must be 2 indices of classes, 0 to 1"):
        explain_html(*classifier, [GOOD, BAD], truths=truths)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_text_becomes_text(classifier, text: str) -> None:
    page = explain_html(*classifier, [text], title=text, subtitle=text)
    parsed = Parsed(page)
    assert [tag for tag, _ in parsed.tags].count("script") == 2
    assert not [tag for tag, _ in parsed.tags if tag in ("img", "iframe", "a b")]
    assert not [name for _, values in parsed.tags for name in values if name.startswith("on")]
    assert not set("\0\x1b\x85\u2028\u2029\u202e\u2066\ud800") & set(page)
    assert page.count("</script") == 2
    assert len(parsed.data["texts"]) == 1


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_class_name_becomes_text(name: str) -> None:
    evidence = np.array([[1.0, 0.0]])
    page = Page([name, "b"], "title")
    page.add(Explanation("word", [(0, 4)], evidence, evidence[0]))
    parsed = Parsed(page.html())
    assert not [tag for tag, _ in parsed.tags if tag == "img"]
    assert page.html().count("</script") == 2
    assert parsed.data["texts"][0]["classes"][0] == visible(name)


def test_what_hides_or_reorders_is_written_as_its_code_point() -> None:
    assert visible("a\u202eb\x00\u200b\ud800") == "a⟨U+202E⟩b⟨U+0000⟩⟨U+200B⟩⟨U+D800⟩"
    assert visible("a\u3164b\u2800") == "a⟨U+3164⟩b⟨U+2800⟩"
    assert visible("a\tb\nc\r\u2028\u00a0d") == "a\tb\nc   d"
    for text in ("👩\u200d🚀", "مرحبا", "é漢字"):
        assert visible(text) == text


def test_a_page_loads_nothing_and_allows_its_own_script_alone(classifier) -> None:
    parsed = Parsed(explain_html(*classifier, GOOD))
    (policy,) = (v["content"] for t, v in parsed.tags if t == "meta" and "http-equiv" in v)
    assert policy is not None and policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy and "http" not in policy
    for tag, values in parsed.tags:
        assert tag not in ("link", "img", "iframe", "object", "base")
        assert "src" not in values and "style" not in values
        assert (values.get("href") or "#").startswith("#")


def test_a_page_is_bounded_and_says_what_it_leaves_out(
    classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = explain_html(*classifier, ["dull " * 20_000, "x" * 1_000_000, " " * 100_000, ""])
    assert len(page) < 500_000
    assert "The first 2,000 of 20,000 tokens are shown" in page
    assert [len(tokens) for tokens in Parsed(page).tokens] == [2000, 1, 1, 1]
    many = explain_html(*classifier, [GOOD] * 250)
    assert len(Parsed(many).tokens) == 200
    assert "the first 200 of 250 texts" in many
    monkeypatch.setattr(explain_page, "MAX_PAGE_TOKENS", 12)
    assert len(Parsed(explain_html(*classifier, [GOOD] * 9)).tokens) == 3


# ---- in a browser ------------------------------------------------------------------------------


def browse(tmp_path: Path, page: str, fragment: str = "") -> tuple[str, str]:
    """The document after its script has run, and what was written to the console."""
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    finished = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"),
            f"{path.as_uri()}{fragment}",
        ],
        capture_output=True,
        timeout=120,
        check=True,
    )
    log = finished.stderr.decode("utf-8", "replace")
    console = [line for line in log.splitlines() if "CONSOLE" in line]
    return finished.stdout.decode(), "\n".join(console)


@needs_browser
def test_the_console_is_seen_by_these_tests(tmp_path: Path) -> None:
    """The premise of the tests below."""
    _, console = browse(tmp_path, "<!DOCTYPE html><script>nonsense()</script>")
    assert "nonsense is not defined" in console


@needs_browser
def test_the_fragment_chooses_text_and_class(classifier, tmp_path: Path) -> None:
    page = explain_html(*classifier, [BAD, BAD])
    before = Parsed(page).tokens
    document, console = browse(tmp_path, page, "#text=2&class=positive&theme=dark")
    assert console == ""
    assert re.search(r"<html[^>]* class=\"script\"", document)
    assert 'data-theme="dark"' in document
    first, second = Parsed(document).tokens
    assert first == before[0]
    turned = {"f": "a", "a": "f"}
    for (style, title, text), (was, figure, same) in zip(second, before[1], strict=True):
        assert text == same
        assert style == (turned[was[0]] + was[1:] if was else "")
        assert number(title) == -number(figure)
    # What is said of the class has changed with it.
    shown = re.findall(r'<div data-class="(\d)">', document)
    assert shown == ["0", "1"]
    assert re.findall(r'<button[^>]*aria-pressed="(\w+)"', document) == [
        "true",
        "false",
        "false",
        "true",
    ]


@needs_browser
def test_the_script_shades_as_the_page_was_written(classifier, tmp_path: Path) -> None:
    page = explain_html(*classifier, [BAD, GOOD, "A film . " * 40 + BAD])
    for label, unchanged in (("negative", [0, 2]), ("positive", [1])):
        document, console = browse(tmp_path, page, f"#class={label}")
        assert console == ""
        for i in unchanged:
            assert Parsed(document).tokens[i] == Parsed(page).tokens[i]


@needs_browser
def test_no_hostile_text_runs(classifier, tmp_path: Path) -> None:
    page = explain_html(*classifier, HOSTILE, title="harmless")
    document, console = browse(tmp_path, page, "#text=1&class=<script>alert(1)</script>")
    assert console == ""
    assert "<title>harmless</title>" in document
    assert "<img" not in document
    assert 'class="script"' in document


@needs_browser
def test_the_policy_stops_a_script_that_is_not_the_pages_own(classifier, tmp_path: Path) -> None:
    """A second line of defence, seen to hold where the first is broken on purpose."""
    page = explain_html(*classifier, GOOD, title="harmless")
    attacks = "<script>document.title='owned'</script><img src=x onerror='document.title=1'>"
    document, console = browse(tmp_path, page.replace("<main>", f"<main>{attacks}"))
    assert "<title>harmless</title>" in document
    assert "Content Security Policy" in console


# ---- from the command line ---------------------------------------------------------------------


def test_explain_html_writes_a_page_and_the_same_lines(
    script: Script, trained: Path, tmp_path: Path
) -> None:
    page = script("predict_text", "--model", trained, "--explain", "html", GOOD, BAD)
    text = script("predict_text", "--model", trained, "--explain", GOOD, BAD)
    assert page.status == text.status == 0, page.err + text.err
    assert page.lines == text.lines and "evidence" in page.lines[0]
    assert "\x1b[48" in text.err and "\x1b[48" not in page.err
    assert "explanation.html explains 2 texts" in page.err
    written = (tmp_path / "explanation.html").read_text(encoding="utf-8")
    assert [[t for _, _, t in tokens] for tokens in Parsed(written).tokens] == [
        *(GOOD.split(), BAD.split())
    ]


def test_a_stream_of_texts_is_explained_where_asked(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "page.html"
    options = PredictOptions(model=str(trained), explain="html", explain_file=path)
    answers = predict_text(options, [f"{GOOD}\n"] * 201)
    assert "evidence" in next(answers) and not path.exists()
    assert len(list(answers)) == 200
    assert "the first 200 of 201 texts" in path.read_text("utf-8")


def test_a_reader_that_stops_early_gets_the_page_so_far(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    options = PredictOptions(model=str(trained), explain="html", explain_file=path)
    answers = predict_text(options, [GOOD] * 9)
    next(answers)
    answers.close()
    assert len(Parsed(path.read_text("utf-8")).tokens) == 1


@pytest.mark.parametrize(
    ("explain", "file", "complaint"),
    [
        (None, "a.html", "--explain-file names the page of --explain html"),
        ("text", "a.html", "--explain-file names the page of --explain html"),
        ("html", ".", "must name a file"),
    ],
)
def test_what_cannot_be_written_is_refused_at_once(
    explain: str | None, file: str, complaint: str
) -> None:
    options = PredictOptions(model="none", texts=[GOOD], explain=explain, explain_file=Path(file))
    with pytest.raises(UserError, match=complaint):
        next(predict_text(options))


# ---- of a run ----------------------------------------------------------------------------------


def test_the_most_confident_mistakes_come_first(classifier) -> None:
    texts = [GOOD, BAD, "The plot is dull .", GOOD]
    probabilities = np.array([[0.1, 0.9], [0.7, 0.3], [0.8, 0.2], [0.0, 1.0]])
    page = mistakes_html(*classifier, texts, [0, 0, 1, 0], probabilities, most=2)
    shown = [" ".join(t for _, _, t in tokens) for tokens in Parsed(page).tokens]
    assert shown == [GOOD, GOOD]
    assert page.count("truth: <bdi>negative") == 2
    assert "Of 4 texts of the validation split, 3 got a wrong answer; 2 of these" in page


def test_a_run_leaves_the_page_of_its_mistakes(script: Script, tmp_path: Path) -> None:
    rows = [f"{GOOD if i % 2 else BAD} {'again ' * (i % 7)},{i % 2}" for i in range(200)]
    rows[::9] = [f"{row[:-1]}{1 - int(row[-1])}" for row in rows[::9]]  # wrong labels: mistakes
    (tmp_path / "a.csv").write_text("text,label\n" + "\n".join(rows))
    run = script(
        *("train_text", "--dataset", "a.csv", "--model", "nin-text-small", "--output-dir", "run"),
        *("--epochs", "2", "--pretrain-epochs", "0"),
    )
    assert run.status == 0, run.err
    folder = tmp_path / "run"
    answers = load_file(folder / "answers.safetensors")["validation"]
    metrics = json.loads((folder / "metrics.json").read_text())["validation"]
    wrong = round((1 - metrics["accuracy"]) * len(answers))
    assert wrong > 0
    page = (folder / "mistakes.html").read_text(encoding="utf-8")
    assert len(Parsed(page).tokens) == min(wrong, 20)
    assert f"Of {len(answers)} texts of the validation split, {wrong} got a wrong" in page
    assert "mistakes.html" in (folder / "README.md").read_text()
    assert "mistakes.html" in run.err


def test_names_at_the_top_of_the_package() -> None:
    assert nin_text.explain_html is explain_html
    assert nin_text.Explanation is Explanation
    assert nin_text.explain.explain is explain
