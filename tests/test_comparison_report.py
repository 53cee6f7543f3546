"""A comparison as Markdown, as a page and in the terminal."""

from __future__ import annotations

import base64
import copy
import html
import json
import math
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from nin_text.comparison_plots import LOOKS, NONE
from nin_text.comparison_report import print_table, to_html, to_markdown, to_plots

VOID = {"meta", "link", "img"}
HOSTILE = (
    "<script>alert('a')</script> | `b`\n# $x_1$ [c](d) \x1b[31m \N{GRINNING FACE} & " + "w" * 200
)


def system(name: str = "nin-text-base", kind: str = "nin", i: int = 0) -> dict[str, Any]:
    """A system with every field; `i` moves its figures."""
    accuracy, rate = 0.9 - 0.004 * (i % 7), 120.5 * 1.9**i
    speed = {
        key: {
            "documents_per_second": rate * share,
            "documents_per_second_range": [rate * share * 0.97, rate * share * 1.04],
            "tokens_per_second": rate * share * 231.4,
        }
        for key, share in (("1", 0.4), ("32", 0.9), ("best", 1.0))
    }
    return {
        "name": name,
        "kind": kind,
        "description": f"What {name} is. How it was tuned.",
        "settings": {"learning_rate": 1e-3, "epochs": 3 + i, "ngrams": [1, 2]},
        "cited": None,
        "test": {
            "n": 25_000,
            "accuracy": accuracy,
            "accuracy_interval_95": [accuracy - 0.0037, accuracy + 0.0035],
            "macro_f1": accuracy - 0.0011,
            "log_loss": 0.2512 + i / 100,
            "calibration_error": 0.0123 + i / 1000,
            "roc_auc": 0.97,
            "per_class": {},
            "confusion_matrix": [[1, 2], [3, 4]],
        },
        "validation": {"accuracy": accuracy + 0.0042},
        "versus_reference": {
            "difference": accuracy - 0.9,
            "interval_95": [accuracy - 0.9 - 0.003, accuracy - 0.9 + 0.003],
            "mcnemar_p": 0.2 / (1 + i),
            "only_this_right": 1_310 + i,
            "only_reference_right": 1_410 + i,
        },
        "parameters": 331_011 + 1_000_003 * i,
        "macs_per_token": 250_000.4 + i,
        "bytes_on_disk": 1_354_789 * (1 + i * i),
        "train_seconds": 660.25 + 100 * i,
        "train_threads": 2,
        "train_peak_memory_mb": 1_933.2 + i,
        "speed": {
            **speed,
            "latency_p50_ms": 4.125 + i,
            "latency_p99_ms": 9.875 + i,
            "latency_n": 1_000,
            "peak_memory_mb": 812.4 + i,
        },
        "by_length": [
            {"from": 0, "to": 63, "n": 900, "accuracy": accuracy - 0.02},
            {"from": 64, "to": 255, "n": 15_000, "accuracy": accuracy + 0.001 * i},
            {"from": 256, "to": 1_023, "n": 9_100, "accuracy": accuracy - 0.001 * i},
        ],
        "curve": [
            {"examples": n, "accuracy": accuracy - 0.3 / math.log2(n) * (1 + i / 9)}
            for n in (100, 1_000, 10_000, 25_000)
        ],
        "error": None,
    }


def reference(**changes: Any) -> dict[str, Any]:
    return {**system(), "versus_reference": None, **changes}


def cited_system() -> dict[str, Any]:
    nothing = dict.fromkeys(("test", "validation", "versus_reference", "train_seconds"))
    nothing |= dict.fromkeys(("train_threads", "train_peak_memory_mb"))
    return {
        **system("bert-base", "architecture", 2),
        **nothing,
        "cited": {"accuracy": 0.9378, "source": "Sun et al. 2019, table 3"},
        "by_length": [],
        "curve": [],
    }


def failed_system(name: str = "frozen encoder") -> dict[str, Any]:
    bare = dict.fromkeys(system())
    error = "Its weights are not on this machine."
    known = {"name": name, "kind": "frozen", "description": "An encoder.", "error": error}
    return bare | known | {"settings": {}, "by_length": [], "curve": []}


def comparison(systems: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "dataset": "imdb",
        "data_source": "data/imdb",
        "data_fingerprint": "0123abcd",
        "label_names": ["negative", "positive"],
        "train_examples": 22_500,
        "validation_examples": 2_500,
        "test_examples": 25_000,
        "notes": ["3 texts are in both splits."],
        "command": "python scripts/compare_text.py --dataset imdb",
        "environment": {
            "versions": {"python": "3.12.3", "torch": "2.9.0"},
            "platform": "Linux",
            "processor": "AMD EPYC",
            "cpu_count": 2,
            "threads": 2,
            "device": "cpu",
            "device_name": None,
        },
        "reference": "nin-text-base",
        "seed": 0,
        "precision": "bf16",
        "timing": {
            "rounds": 5,
            "threads": 2,
            "documents": 2_000,
            "mean_tokens": 231.44,
            "left_out": ["reading the texts", "loading the model"],
        },
        "systems": systems,
    }


def twelve() -> dict[str, Any]:
    kinds = ["network", "network", "linear", "linear", "fasttext", "fine-tuned", "fine-tuned"]
    kinds += ["nin", "network"]
    trained = [system(f"system {i} ({kind})", kind, i) for i, kind in enumerate(kinds, 1)]
    return comparison([reference(), *trained, cited_system(), failed_system()])


def bare() -> dict[str, Any]:
    """Everything None or empty that may be, and a system that failed."""
    known = ("name", "kind", "description", "settings", "by_length", "curve")
    nothing = {key: value if key in known else None for key, value in system().items()}
    nothing |= {"by_length": [], "curve": []}
    return {**comparison([nothing, failed_system()]), "timing": None, "notes": []}


def hostile() -> dict[str, Any]:
    def spoil(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: value[key] if key == "kind" else spoil(value[key]) for key in value}
        if isinstance(value, list):
            return [spoil(item) for item in value]
        return f"{value} {HOSTILE}" if isinstance(value, str) else value

    spoiled = spoil(twelve())
    spoiled["environment"]["versions"] = {HOSTILE: HOSTILE}
    spoiled["systems"][0]["settings"] = {HOSTILE: HOSTILE}
    return spoiled


EVERY = {
    "twelve": twelve(),
    "one": comparison([reference()]),
    "bare": bare(),
    "hostile": hostile(),
    "none": comparison([]),
}
every = pytest.mark.parametrize("case", EVERY.values(), ids=EVERY)
PAGES: dict[str, str] = {}


def drawn(case: dict[str, Any]) -> str:
    """The page with its plots."""
    return to_html(case, to_plots(case))


def name_of(case: dict[str, Any]) -> str:
    return next(name for name in EVERY if EVERY[name] is case)


def page_of(case: dict[str, Any]) -> str:
    """The page of one of EVERY, drawn once, which takes a second."""
    name = name_of(case)
    if name not in PAGES:
        PAGES[name] = drawn(case)
    return PAGES[name]


class Page(HTMLParser):
    """Checks that tags are balanced and keeps what the tests ask for."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def images(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == "img"]


def markdown_rows(document: str) -> list[list[str]]:
    """The cells of every table line, split at bars that are not escaped."""
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in document.splitlines()
        if line.startswith("|")
    ]


@every
def test_a_page_is_balanced_and_loads_nothing(case: dict[str, Any]) -> None:
    page = Page(page_of(case))
    known = "html head title style body h1 h2 h3 p ul li pre div table tr th td figure figcaption"
    assert {tag for tag, _ in page.tags} <= VOID | set(known.split())
    for _, attributes in page.tags:
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")
        assert not any(name.startswith("on") for name in attributes)
    style = page_of(case).split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style


@every
def test_plots_are_svg_and_say_their_numbers(case: dict[str, Any]) -> None:
    images = Page(page_of(case)).images()
    assert len(images) == {"bare": 0, "none": 0}.get(name_of(case), 6)
    for image in images:
        svg = base64.b64decode(str(image["src"]).removeprefix("data:image/svg+xml;base64,"))
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        assert b"<dc:date>" not in svg
        assert re.search(r"1 \S.*: \d\d\.\d\d % at ", str(image["alt"]))


@every
def test_the_same_comparison_gives_the_same_documents_and_is_left_alone(
    case: dict[str, Any],
) -> None:
    before = copy.deepcopy(case)
    assert page_of(case) == drawn(before)
    assert to_markdown(case) == to_markdown(before)
    assert case == before


@every
def test_both_documents_hold_the_same_tables_of_even_rows(case: dict[str, Any]) -> None:
    from_page = Page(page_of(case)).rows
    rows = [row for row in markdown_rows(to_markdown(case)) if set("".join(row)) - set("-:")]
    plain = [[html.unescape(re.sub(r"\\(.)", r"\1", cell)) for cell in row] for row in rows]
    assert plain == [[" ".join(cell.split()) for cell in row] for row in from_page]
    for row, above in zip(rows[1:], rows, strict=False):
        assert len(row) == len(above) or row[0] in ("no.", "what")


def test_tables_state_the_figures_of_the_comparison() -> None:
    text = to_markdown(comparison([reference(), system("a", i=3)]))
    rows = {(row[1], len(row)): row for row in markdown_rows(text)}
    assert rows["a", 11] == [
        *("2", "a", "88.80 (88.43 to 89.15)", "88.69", "0.2812", "0.0153"),
        *("-1.20 (-1.50 to -0.90)", "1,313", "1,413", "0.0500", "no real difference"),
    ]
    assert rows["nin-text-base", 11][6:] == [NONE] * 4 + ["reference"]
    assert rows["a", 8][2:] == ["3,331,020", "250,003", "13,547,890", "960.2", "2", "1,936"]
    assert rows["nin-text-base", 12][2:] == [
        *("48.2 (46.8 to 50.1)", "11,153", "108.5 (105.2 to 112.8)", "25,095"),
        *("120.5 (116.9 to 125.3)", "27,884", "4.12", "9.88", "1,000", "812"),
    ]
    for said in (
        "1 · nin-text-base (nin): What nin-text-base is. How it was tuned. Settings: "
        r"learning\_rate = 0.001, epochs = 3, ngrams = \[1, 2\]. Validation accuracy: 90.42 %.",
        "5 rounds (their range in brackets), 2 threads, 2,000 documents of 231.4 tokens",
        "- reading the texts\n- loading the model",
        "```\npython scripts/compare_text.py --dataset imdb\n```",
        "python 3.12.3, torch 2.9.0",
        "| train examples | 22,500 |",
        "| data fingerprint | 0123abcd |",
        "| 2 classes | negative, positive |",
        "- 3 texts are in both splits.",
        "No correction for multiple comparisons",
    ):
        assert said in text


@pytest.mark.parametrize(
    ("difference", "p", "word"),
    [
        (0.01, 0.0499, "better"),
        (-0.01, 0.0499, "worse"),
        (0.01, 0.05, "no real difference"),
        (-0.01, 0.9, "no real difference"),
        (0.0, 0.01, "no real difference"),
        (0.01, None, NONE),
        (0.01, math.nan, NONE),
    ],
)
def test_verdicts_at_the_boundary(difference: float, p: float | None, word: str) -> None:
    other = system("other")
    other["versus_reference"] |= {"difference": difference, "mcnemar_p": p}
    rows = markdown_rows(to_markdown(comparison([reference(), other])))
    assert next(row[-1] for row in rows if row[1] == "other") == word


def test_tiny_p_values_are_not_written_as_zero() -> None:
    other = system("other")
    other["versus_reference"]["mcnemar_p"] = 1e-30
    assert "| &lt; 0.0001 |" in to_markdown(comparison([reference(), other]))


def headline(case: dict[str, Any]) -> list[str]:
    return to_markdown(case).split("## In short\n\n")[1].split("\n\n")[0].splitlines()


def test_the_headline_follows_from_the_numbers() -> None:
    systems = [reference(), system("near", i=0), system("far", i=6), failed_system("lost")]
    systems[1]["test"] |= {"accuracy": 0.9 - 0.0037}
    systems[1]["speed"]["best"] |= {
        "documents_per_second": 500.0,
        "documents_per_second_range": [490.0, 510.0],
    }
    systems[2]["versus_reference"]["mcnemar_p"] = 0.01
    assert headline(comparison(systems)) == [
        "- Most accurate of 3 systems tested: nin-text-base, right on 90.00 % of 25,000 test "
        "examples (95 % interval 89.63 to 90.35).",
        "- Fastest of the 2 within that interval: near, 500.0 (490.0 to 510.0) documents/s, "
        "89.63 % accuracy.",
        "- Fastest of all 3: far, 5,669.0 (5,499.0 to 5,895.8) documents/s, 87.60 % accuracy.",
        "- No real difference against nin-text-base: near.",
        "- Worse against nin-text-base: far.",
        "- Could not be trained: lost.",
    ]
    systems[1]["test"]["accuracy"] = 0.9
    systems[0]["speed"]["best"]["documents_per_second_range"] = [100.0, 495.0]
    lines = headline(comparison(systems))
    assert "tested: nin-text-base, near, right on 90.00" in lines[0]
    assert lines[1].endswith("; the range of nin-text-base overlaps.")


def test_the_headline_of_one_system_or_none_claims_no_rank() -> None:
    assert headline(EVERY["one"]) == [
        "- Tested: nin-text-base, right on 90.00 % of 25,000 test examples "
        "(95 % interval 89.63 to 90.35)."
    ]
    assert headline(bare()) == [
        "- No system was tested.",
        "- Could not be trained: frozen encoder.",
    ]


def test_cited_accuracies_are_marked_and_in_no_ranking() -> None:
    text = to_markdown(comparison([cited_system(), reference(), system("a", i=1)]))
    rows = [row for row in markdown_rows(text) if row[1] == "bert-base"]
    assert [row[0] for row in rows] == ["3"] * 4
    assert set(rows[0][2:]) == {NONE}
    assert rows[1][2:] == ["93.78", "Sun et al. 2019, table 3"]
    assert text.count("93.78") == 1
    assert "bert-base" not in "".join(headline(comparison([cited_system(), reference()])))
    speed, *_ = Page(drawn(twelve())).images()
    assert "cited from the literature, not measured" in str(speed["alt"])


def test_missing_values_are_dashes(capsys: pytest.CaptureFixture[str]) -> None:
    case = bare()
    case["systems"][0]["train_seconds"] = math.nan
    case["systems"][0]["parameters"] = math.inf
    print_table(case)
    for text in (to_markdown(case), Page(drawn(case)).text, capsys.readouterr().err):
        assert not re.search(r"\b(None|nan|inf)\b", text)
        assert NONE in text
    assert "Its weights are not on this machine." in to_markdown(case)


def test_a_learning_curve_needs_two_points_and_lengths_need_bins() -> None:
    lone = reference(curve=[{"examples": 100, "accuracy": 0.5}], by_length=[])
    assert len(Page(drawn(comparison([lone]))).images()) == 4
    assert len(Page(drawn(comparison([lone, system("a")]))).images()) == 6


def test_hostile_text_is_only_text() -> None:
    text, page = to_markdown(hostile()), drawn(hostile())
    assert "<script" not in text.split("## Command")[0] and "<script" not in page
    assert "\x1b" not in text and "\x1b" not in page
    assert "alert('a')" in Page(page).text
    fenced = text.split("## Command\n\n")[1].split("\n\n## Notes")[0]
    assert fenced.startswith("```\n") and fenced.endswith("\n```")


def test_a_fence_is_longer_than_any_in_the_command() -> None:
    case = comparison([reference()]) | {"command": "a\n````\n# b"}
    assert "\n`````\na\n````\n# b\n`````\n" in to_markdown(case)


def test_markdown_parses_into_one_heading_a_section() -> None:
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    tokens = parser.parse(to_markdown(hostile()))
    kinds = [token.type for token in tokens]
    assert kinds.count("heading_open") == 1 + 8
    assert kinds.count("table_open") == 6
    assert "html_block" not in kinds
    inline = [child.type for token in tokens for child in token.children or []]
    assert set(inline) == {"text", "text_special"} or set(inline) == {"text"}


@every
def test_the_terminal_table_goes_to_stderr(
    case: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    print_table(case)
    out, err = capsys.readouterr()
    assert not out
    assert "system" in err and "verdict" in err
    assert "\x1b" not in err
    assert max(map(len, err.splitlines())) <= 160
    if case is EVERY["twelve"]:
        for said in ("90.00 (89.63 to 90.35)", "reference", "120.5", "1.4 MB", "660.2"):
            assert said in err


def test_markup_in_a_name_is_not_read_as_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(comparison([reference(), system("[red]a[/blue]")]))
    assert "[red]a[/blue]" in capsys.readouterr().err


def test_a_comparison_read_back_from_json_gives_the_same_page() -> None:
    case = twelve()
    assert drawn(json.loads(json.dumps(case))) == drawn(case)


def test_every_kind_looks_different_and_an_unknown_one_is_drawn() -> None:
    assert len({marker for _, marker in LOOKS.values()}) == len(LOOKS) == 7
    assert len(Page(drawn(comparison([reference(kind="new")]))).images()) == 6
