"""The pages of a report, by hand: what stands in them, in which order, and the verdict in words."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from llm2clip.eval.report import curves, environment, render
from llm2clip.eval.verdict import judge

REPORT: dict[str, Any] = {
    "config": {"model": "a|b <c>", "teacher": None, "precision": "auto"},
    "model": {"encoder": "llm2clip", "dim": 24},
    "metrics": {
        **{
            f"d/{kind}/{way}_r@{k}": v
            for kind, way, k, v in (
                ("short", "i2t", 1, 0.11),
                ("short", "i2t", 5, 0.12),
                ("short", "i2t", 10, 0.13),
                ("short", "t2i", 1, 0.21),
                ("short", "t2i", 5, 0.22),
                ("short", "t2i", 10, 0.23),
            )
        },
        "d/cra": 0.31,
        "d/cra_second": 0.32,
        "d/short/cra": 0.33,
    },
    "chance": {
        "d/short/i2t_r@1": 0.04,
        "d/short/t2i_r@1": 0.05,
        "d/short/i2t_r@5": 0.0625,
        "d/cra": 0.35,
    },
    "intervals": {"d/short/i2t_r@1": [0.09, 0.13], "d/short/i2t_r@5": [0.1, 0.14], "d/cra": [0.2, 0.4]},
    "baseline": {
        "model": "org/clip",
        "metrics": {"d/short/i2t_r@1": 0.05, "d/cra": 0.3},
        "intervals": {"d/short/i2t_r@1": [0.01, 0.08], "d/cra": [0.2, 0.4]},
        "captions_cut": 3,
    },
    "datasets": {
        "d": {
            "fingerprint": "0123abcd",
            "images": 1234,
            "captions": {"short": 5678},
            "bad": {"num_bad": 3, "counts": {"missing file": 2, "empty caption": 1}},
            "captions_cut": 7,
        }
    },
    "similarity": {
        "d": {
            "alignment": 0.4,
            "uniformity": -1.5,
            "positive_mean": 0.8,
            "negative_mean": None,
            "positive": [0, 0, 2, 6],
            "negative": [4, 1, 0, 0],
            "edges": [-1, -0.5, 0, 0.5, 1],
        }
    },
}


def test_the_markdown_page_by_hand() -> None:
    page = render("report.md", REPORT, galleries={}, curves=[])
    for line in (
        "# Scores of a|b <c>",
        "| model | a\\|b <c> |",
        "| dim | 24 |",
        "Retrieval, % (1,234 images; captions: 5,678 short):",
        "| captions | direction | of | R@1 | R@5 | R@10 |",
        "| --- | --- | --- | ---: | ---: | ---: |",
        "| short | image → text | model | 11.0 | 12.0 | 13.0 |",
        "|  |  | 95 % interval | 9.0 to 13.0 | 10.0 to 14.0 |  |",
        "|  |  | by chance | 4.000 | 6.250 |  |",
        "|  |  | baseline | 5.0 |  |  |",
        "| short | text → image | model | 21.0 | 22.0 | 23.0 |",
        "| a caption finds another of its image, among all | 31.0 | 20.0 to 40.0 | 35.000 | 30.0 |",
        "| an image's first caption finds its second, among all second ones | 32.0 |  |  |  |",
        "| the same among short captions alone | 33.0 |  |  |  |",
        "| alignment (squared distance of captions of one image) | 0.400 |",
        "| uniformity (lower: more spread out) | -1.500 |",
        "| mean cosine, captions of one image | 0.800 |",
        "| captions longer than the model reads, cut | 7 |",
        "Left out: 3 bad samples:",
        "| missing file | 2 |",
        "| fingerprint | 0123abcd |",
        "| baseline | org/clip |",
    ):
        assert line in page.splitlines(), line
    assert "different images" not in page, "there is no pair of them"
    assert page.index("- 1 of 2") < page.index("Retrieval, %") < page.index("0123abcd")


GALLERY = {
    "drawn": [
        {
            "kind": "short",
            "text": "a <dog>",
            "rank": 2,
            "pool": 1234,
            "best": [{"image": "data:one", "right": False}, {"image": "data:two", "right": True}],
        }
    ],
    "misses": [{"kind": "long", "text": "a cat", "rank": 1001, "pool": 1234, "own": "data:own", "wrong": "data:wrong"}],
    "confused": [{"kind": "long", "text": "a cow", "own": "data:o", "wrong": "data:w"}],
}


def test_the_html_page_by_hand() -> None:
    page = render("report.html", REPORT, galleries={"d": GALLERY}, curves=[("loss", [(1, 2.0), (3, 1.5), (5, 1.0)])])
    assert page.startswith("<!doctype html>")
    assert "<title>Scores of a|b &lt;c&gt;</title>" in page and ">a|b &lt;c&gt;</td>" in page
    assert '<td>model</td><td class="number">11.0</td><td class="number">12.0</td>' in page
    assert "a &lt;dog&gt;" in page and "<dog>" not in page
    assert "its image is number 2 of 1,234" in page and "✓ right, number 1,001 of 1,234" in page
    assert re.findall(r'<li class="right"><img src="data:(\w+)"', page) == ["two", "own", "o"]
    assert re.findall(r'<li><img src="data:(\w+)"', page) == ["one", "wrong", "w"]
    assert 'points="0.0,0.0 320.0,90.0 640.0,180.0 "' in page  # the loss falls from the top left to the bottom right
    parts = ("<h1>", 'class="verdict"', ">Scores<", "find</h2>", ">The worst", ">Taken for", "trained</h2>", "Made of")
    places = [page.index(part) for part in parts]
    assert places == sorted(places)
    for tag in ("table", "figure", "ol", "div", "ul", "li", "tr", "td"):
        assert len(re.findall(rf"<{tag}[ >]", page)) == page.count(f"</{tag}>"), tag


def test_bars_of_the_histogram_by_hand() -> None:
    draw: Any = environment().get_template("charts.html").module
    figure = draw.histogram(REPORT["similarity"]["d"], width=400, height=208)
    found = re.findall(r'class="(\w+)" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', figure)
    bars = [(name, *map(float, numbers)) for name, *numbers in found]
    # 100 px a bin with a gap of 1; 100 px from the middle at 104 to the highest bar of either side
    assert bars == [
        ("positive", 200.5, pytest.approx(104 - 33.3, abs=0.1), 99.0, 33.3),
        ("positive", 300.5, 4.0, 99.0, 100.0),
        ("negative", 0.5, 104.0, 99.0, 100.0),
        ("negative", 100.5, 104.0, 99.0, 25.0),
    ]
    assert "positive: 0.50 to 1.00, 75.00 %" in figure
    empty = {"positive": [0, 0], "negative": [0, 1], "edges": [-1, 0, 1]}
    assert draw.histogram(empty).count("<rect") == 1


def test_a_verdict_by_hand() -> None:
    assert judge(REPORT) == [
        "1 of 2 scores are above chance, the others may be luck",
        "against the baseline org/clip (which reads 3 captions only in part): clearly better in 1 of 2 scores of the "
        "first place, clearly worse in 0, no clear difference in 1",
        "images that find a caption of their own first, short: 11.0 % (95 % interval 9.0 to 13.0), by chance 4.0 %, "
        "the baseline 5.0 %: clearly better",
        "captions whose nearest other one is of the same image: 31.0 % (95 % interval 20.0 to 40.0), by chance 35.0 %, "
        "the baseline 30.0 %; not above chance",
    ]
    report = copy.deepcopy(REPORT)
    report["intervals"]["d/cra"], report["baseline"] = [0.36, 0.4], {"why": "the tower has no text half"}
    report["datasets"]["d"]["notes"] = ["captions are Spanish"]
    further = copy.deepcopy(REPORT)
    further["chance"]["d/short/i2t_r@1"] = 0.1
    assert judge(further)[:2] == [
        "0 of 2 scores are above chance, the others may be luck",
        "of those that look further (recall at 5 and more) 1 of 1 are",
    ]
    further["chance"]["d/short/i2t_r@5"] = 0.1
    assert judge(further)[0].startswith("no score is above chance")
    further = copy.deepcopy(REPORT)
    further["baseline"]["intervals"]["d/short/i2t_r@5"] = [0.02, 0.06]
    assert judge(further)[2] == (
        "looking further than the first place (recall at 5 and more): clearly better in 1 of 1 scores, clearly worse "
        "in 0"
    )
    found = judge(report)
    assert found[:2] == ["the model finds what it seeks: every score is above chance", "captions are Spanish"]
    assert found[2].endswith("by chance 4.0 %") and found[-1] == "no baseline: the tower has no text half"
    report["intervals"] = {name: [0.0, 0.02] for name in report["intervals"]}
    assert judge(report)[0] == (
        "no score is above chance: nothing shows that the model has learned to find anything here"
    )
    worse = copy.deepcopy(REPORT)
    worse["baseline"]["intervals"]["d/short/i2t_r@1"] = [0.5, 0.6]
    assert judge(worse)[2].endswith("the baseline 5.0 %: clearly worse")
    pool_of_one = copy.deepcopy(REPORT)
    pool_of_one["chance"] = dict.fromkeys(REPORT["chance"], 1.0)  # where chance finds everything, nothing is shown
    assert judge(pool_of_one) == []
    two = copy.deepcopy(REPORT)
    two["datasets"]["e"] = two["datasets"]["d"]
    assert all(line.startswith("d: ") for line in judge(two))


def test_curves_of_a_training(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"step": step, "loss": 1 / step, "accuracy": None} for step in range(1, 1001)]
    lines += [{"step": 500, "val/r@1": 0.25, "val/short/i2t_r@1": 0.5}, {"step": 1000, "val/r@1": 0.5}]
    (tmp_path / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (first, loss), (second, score) = curves(tmp_path / "log.jsonl")
    assert first == "loss" and len(loss) == 300 and [step for step, _ in loss[:3]] == [1, 4, 8]
    assert loss[0] == (1, 1.0) and loss[-1] == (1000, 0.001)
    assert second.startswith("R@1") and score == [(500, 0.25), (1000, 0.5)]
    assert curves(tmp_path / "none.jsonl") == []


def test_bars_by_the_length_of_captions() -> None:
    report = copy.deepcopy(REPORT)
    assert "by the length" not in render("report.html", report, galleries={}, curves=[])
    bars = [("up to 20", 1200, 0.25), ("over 300", 7, 0.75)]
    report["datasets"]["d"]["by_length"] = [{"tokens": t, "captions": n, "t2i_r@1": v} for t, n, v in bars]
    page = render("report.html", report, galleries={}, curves=[])
    figure = page.partition('aria-label="Text to image R@1 by the length')[2].partition("</figure>")[0]
    assert re.findall(r'text-anchor="end">(.+?)<', figure) == ["up to 20 (1,200)", "over 300 (7)"]
    width = 400 - 130 - 50
    assert re.findall(r'width="([\d.]+)" height="13"', figure) == [f"{v * width:.1f}" for v in (0.25, 0.75)]
    assert figure.count("tokens of CLIP (how many), %.") == 1
