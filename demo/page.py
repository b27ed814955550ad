"""The demo's page: one self-contained HTML file with tables, verdicts, curves, histograms and a gallery."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from demo import charts, results
from demo.classes import SETS
from demo.config import Budget
from demo.results import Value, Verdict
from demo.write import TEST_KINDS
from llm2clip.artifacts import atomic_path, read_json
from llm2clip.progress import duration

KIND_NAMES = {"short": "short", "long": "long", "unseen": "unseen words", "es": "Spanish", "zh": "Chinese"}
ARM_NAMES = {
    "A": "A · mini CLIP as pretrained",
    "B": "B · fine-tuned, own text, 32 tokens",
    "B-long": "B-long · own text, 128 tokens",
    "C-causal": "C · raw LLM, causal, centred",
    "C": "C · raw LLM, two-way, centred",
    "D": "D · LLM2CLIP (LoRA)",
    "D-full": "D-full · LLM2CLIP (all weights)",
}
STYLE = """
:root { --ink: #1c2333; --soft: #5d6880; --line: #dfe4ec; --paper: #fff; --card: #f6f8fb; --yes: #1f7a4d; --no: #b23a2e;
  --half: #96690a; --bar: #3d6fd1; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9f0; --soft: #9aa5ba; --line: #323a49; --paper: #13161c;
  --card: #1b2029; --yes: #6cc795; --no: #ec8a7c; --half: #dcb457; --bar: #7fa5ef; } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 82rem; padding: 2rem 1.2rem 4rem; }
h1 { font-size: 2rem; line-height: 1.15; margin: 0 0 .4rem; } h2 { margin: 2.8rem 0 .6rem; font-size: 1.3rem; }
p.lead { color: var(--soft); font-size: 1.08rem; max-width: 52rem; } .soft { color: var(--soft); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; margin: .6rem 0; font-size: .86rem; }
th, td { text-align: right; padding: .32rem .38rem; border-bottom: 1px solid var(--line); white-space: nowrap;
  font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; } td small { color: var(--soft); }
td.best { font-weight: 700; } tr.d td { background: var(--card); }
tr.edge td { color: var(--soft); font-style: italic; }
ul.verdicts { list-style: none; padding: 0; display: grid; gap: .6rem; }
ul.verdicts li { background: var(--card); border-left: 5px solid var(--half); padding: .6rem .9rem;
  border-radius: 4px; }
li.yes { border-color: var(--yes) !important; } li.no { border-color: var(--no) !important; }
li b { float: right; margin-left: 1rem; } li.yes b { color: var(--yes); } li.no b { color: var(--no); }
li.half b { color: var(--half); } li small { color: var(--soft); display: block; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--card); padding: .8rem; border-radius: 6px; } figcaption { font-size: .85rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 10px; }
.gallery { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(30rem, 1fr)); }
.shown { background: var(--card); border-radius: 6px; padding: .8rem; display: flex; gap: .9rem; font-size: .82rem; }
.shown img { width: 8rem; height: 8rem; image-rendering: pixelated; border-radius: 4px; }
.shown dl { margin: 0; } dt { color: var(--soft); margin-top: .3rem; } dd { margin: 0; line-height: 1.35; }
dd.right::before { content: "✓ "; color: var(--yes); font-weight: 700; }
dd.wrong::before { content: "✗ "; color: var(--no); font-weight: 700; }
@media (max-width: 40rem) { .gallery { grid-template-columns: 1fr; } .shown { flex-direction: column; } }
"""
READING = """<h2>How to read it</h2>
<p class=soft>Short captions in known words are B's home ground: the mini CLIP was pretrained on just such captions, so
its text encoder starts where D's fresh adaptor must first arrive, with few images to learn from. On long captions
B-long is the fair control. The grammar is closed, and a text encoder that reads 128 tokens can learn all of it from
the pairs; of real captions it could not. What no number of pairs gives B are words and languages that came with no
image: the LLM knows them from text alone, and stage 1, which reads only English captions in known words, brings that
knowledge out. A real LLM has a thousand times more of it. The sizes of the gaps are those of this miniature; what
carries over is where they come from.</p>"""


def write_page(
    path: Path,
    folders: Sequence[Path],
    found: Mapping[str, Mapping[str, Value]],
    facts: Mapping[str, Any],
    *,
    budget: Budget,
    seed: int,
) -> None:
    """Write the page.

    Args:
        folders: of the pipelines; images and curves are those of the first.
        found: from `results.collect`.
        facts: settings, machine and times.
        seed: of the first pipeline.
    """
    edges = {
        "by chance": results.chance(folders[0]),
        "ceiling: all understood": results.ceilings(budget.test, seed=seed),
    }
    body = [
        head(facts, budget),
        verdict_list(results.verdicts(found)),
        READING,
        "<h2>Image and text, R@1</h2>",
        f"<p class=soft>Percent of {budget.test} test images whose best caption of the kind is one of their own two, "
        "and of captions whose best image is theirs (image → text / text → image). "
        f"{spread_words(len(folders))} The ceiling is below 100 where a caption is true of several images.</p>",
        "<h3>All pairs</h3>",
        retrieval_table(found, "all", edges),
        "<h3>A tenth of the pairs</h3>",
        "<p class=soft>D's stage 1, too, reads the captions of this tenth alone.</p>",
        retrieval_table(found, "tenth", {}),
        "<h2>What the mini CLIP knew, and what is kept of it</h2>",
        "<p class=soft>Percent of scenes of one thing that are given the right class, zero-shot: names in sentences, "
        "none of them seen with these images. Its short captions in known words, in the table above, are the other "
        "thing it knew; all else there is gained.</p>",
        class_table(found),
        "<h2>Caption to caption (CRA), before and after stage 1</h2>",
        "<p class=soft>Percent of captions whose nearest other caption belongs to the same image. Stage 1 reads "
        "English captions of training images in known words; the last three columns are words and languages that "
        "it never read.</p>",
        cra_table(found),
        histograms(folders[0]),
        "<h2>Training curves</h2>",
        curve_charts(folders[0]),
        "<h2>What they retrieve</h2>",
        "<p class=soft>Test images drawn by the seed, and the caption that each model ranks first among all.</p>",
        gallery(read_json(folders[0] / "gallery.json")),
        "<h2>What was run</h2>",
        run_facts(facts, budget),
    ]
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>LLM2CLIP in miniature</title><style>{STYLE}</style>{''.join(body)}</html>"
    )
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def head(facts: Mapping[str, Any], budget: Budget) -> str:
    """Title, what this is, and a warning where the run was too short to mean anything."""
    quick = facts["settings"]["quick"]
    warning = "<p><strong>A --quick run: it shows that all parts work; its numbers mean nothing.</strong></p>"
    return (
        "<h1>LLM2CLIP in miniature</h1><p class=lead>A small language model has read text in three languages, "
        "translations and word lists among it, and never seen an image. A small CLIP has seen images with short "
        f"English captions. Then {budget.train:,} images with short and long English captions, in a restricted "
        "vocabulary, teach five arms. Does it help to put the language model in the place of CLIP's text encoder?</p>"
        + (warning if quick else "")
    )


def verdict_list(verdicts: Sequence[Verdict]) -> str:
    """The claims and what became of them."""
    items = []
    for verdict in verdicts:
        look = {"shows": "yes", "shows in part": "half"}.get(verdict.shown.partition(" (")[0], "no")
        items.append(
            f"<li class={look}><b>{html.escape(verdict.shown)}</b>{html.escape(verdict.claim)}"
            f"<small>{html.escape(verdict.detail)}</small></li>"
        )
    rule = "A claim shows if every gap it names is above twice its own spread; written from the numbers by a rule."
    return f"<h2>What shows here</h2><p class=soft>{rule}</p><ul class=verdicts>{''.join(items)}</ul>"


def spread_words(seeds: int) -> str:
    """What ± stands for."""
    if seeds > 1:
        return f"Mean ± standard deviation over {seeds} whole pipelines."
    return "One pipeline: ± is the standard error of a share among so many images; --seeds 3 gives a real spread."


def retrieval_table(
    found: Mapping[str, Mapping[str, Value]], share: str, edges: Mapping[str, Mapping[str, float]]
) -> str:
    """R@1 of each arm by kind of caption, both ways; the best of each column bold."""
    names = {arm: arm if arm == "A" else f"{arm}-{share}" for arm in results.ARMS}
    arms = {arm: found[name] for arm, name in names.items() if name in found}
    best = {column: max(values[column].mean for values in arms.values()) for column in results.COLUMNS}
    heads = "".join(f"<th colspan=2>{KIND_NAMES[kind]}</th>" for kind in TEST_KINDS)
    ways = "".join("<th>→ text</th><th>→ image</th>" for _ in TEST_KINDS)
    rows = []
    for arm, values in arms.items():
        cells = "".join(_cell(values[c], bold=values[c].mean == best[c]) for c in results.COLUMNS)
        rows.append(f"<tr{' class=d' if arm.startswith('D') else ''}><td>{ARM_NAMES[arm]}</td>{cells}</tr>")
    for name, limits in edges.items():
        cells = "".join(f"<td>{100 * limits.get(c, 1.0):.1f}</td>" for c in results.COLUMNS)
        rows.append(f"<tr class=edge><td>{name}</td>{cells}</tr>")
    return _table(f"<tr><th></th>{heads}</tr><tr><th></th>{ways}</tr>", rows)


def class_table(found: Mapping[str, Mapping[str, Value]]) -> str:
    """Zero-shot classification, arms by what is asked for, with all pairs and with a tenth."""
    rows = []
    for arm in results.ARMS:
        runs = [found.get(arm if arm == "A" else f"{arm}-{share}", {}) for share in ("all", "tenth")]
        cells = [
            _cell(run[name], bold=False) if name in run else "<td></td>" for run in runs for name in results.CLASSES
        ]
        if any(runs):
            rows.append(
                f"<tr{' class=d' if arm.startswith('D') else ''}><td>{ARM_NAMES[arm]}</td>{''.join(cells)}</tr>"
            )
    heads = "".join(f"<th colspan={len(SETS)}>{share}</th>" for share in ("all pairs", "a tenth of the pairs"))
    asked = "".join(f"<th>{name}</th>" for _ in range(2) for name in SETS)
    return _table(f"<tr><th></th>{heads}</tr><tr><th></th>{asked}</tr>", rows)


def cra_table(found: Mapping[str, Mapping[str, Value]]) -> str:
    """Caption retrieval of the teachers."""
    names = [*results.CRA_ENGLISH, *results.CRA_BEYOND]
    shown = [
        "short ↔ short",
        "long ↔ long",
        "short ↔ long",
        "short ↔ unseen words",
        "short ↔ Spanish",
        "short ↔ Chinese",
    ]
    rows = []
    for teacher, title in results.TEACHERS.items():
        if f"teacher-{teacher}" not in found:
            continue
        values = {**found[f"teacher-{teacher}"], **found[f"teacher-{teacher}-beyond"]}
        cells = "".join(_cell(values[name], bold=False) for name in names)
        rows.append(f"<tr{' class=d' if teacher in ('lora', 'full') else ''}><td>LLM {title}</td>{cells}</tr>")
    return _table("<tr><th></th>" + "".join(f"<th>{name}</th>" for name in shown) + "</tr>", rows)


def histograms(folder: Path) -> str:
    """Similarities of captions of one image and of different images, before and after stage 1."""
    figures = []
    for teacher in ("raw-two-way", "lora"):
        report = read_json(folder / "scores" / f"teacher-{teacher}" / "report.json")
        profile = report["similarity"][results.DATASET]
        chart = charts.histogram(profile["edges"], profile["positive"], profile["negative"])
        figures.append(f"<figure>{chart}<figcaption>LLM {results.TEACHERS[teacher]}</figcaption></figure>")
    key = "Cosines of English captions: green of one image, red of different ones, each to its own scale."
    return f"<p class=soft>{key}</p><div class=charts>{''.join(figures)}</div>"


def curve_charts(folder: Path) -> str:
    """Loss by step of every training."""
    return (
        "<div class=charts>"
        + "".join(
            f"<figure>{charts.curve(points)}<figcaption>{html.escape(name)}</figcaption></figure>"
            for name, points in results.curves(folder).items()
        )
        + "</div>"
    )


def gallery(entries: Sequence[Mapping[str, Any]]) -> str:
    """Images with what each arm retrieves for them."""
    blocks = []
    for entry in entries:
        lines = []
        for kind in TEST_KINDS:
            lines.append(f"<dt>{KIND_NAMES[kind]}</dt>")
            for arm, hit in entry["found"][kind].items():
                look = "right" if hit["right"] else "wrong"
                text = hit["text"] if len(hit["text"]) < 150 else hit["text"][:150] + " …"
                lines.append(f"<dd class={look}><strong>{arm}</strong> {html.escape(text)}</dd>")
        image = f'<img alt="{html.escape(entry["own"]["short"])}" src="data:image/png;base64,{entry["image"]}">'
        blocks.append(f"<div class=shown>{image}<dl>{''.join(lines)}</dl></div>")
    return f"<div class=gallery>{''.join(blocks)}</div>"


def run_facts(facts: Mapping[str, Any], budget: Budget) -> str:
    """Settings, machine, and how long each part took."""
    times: dict[str, float] = facts["times"][0]
    rows = [
        f"<tr><td>{html.escape(name)}</td><td>{seconds:.1f} s</td></tr>"
        for name, seconds in sorted(times.items(), key=lambda item: -item[1])
    ]
    settings = ", ".join(f"{name} {value}" for name, value in facts["settings"].items())
    amounts = ", ".join(f"{name} {value}" for name, value in facts["budget"].items())
    return (
        f"<p>{html.escape(facts['machine'])}. In all {duration(facts['wall_seconds'])}; {html.escape(settings)}.</p>"
        f"<p class=soft>Budget: {html.escape(amounts)}. Every arm but A sees the same number of images; A is what "
        "they start from. Wall-clock seconds of each part of the first pipeline, parts running side by side:</p>"
        f"<details><summary>Times</summary>{_table('<tr><th>part</th><th>took</th></tr>', rows)}</details>"
    )


def _cell(value: Value, *, bold: bool) -> str:
    look = " class=best" if bold else ""
    return f"<td{look}>{100 * value.mean:.1f} <small>±{100 * value.spread:.1f}</small></td>"


def _table(header: str, rows: Sequence[str]) -> str:
    return f"<div class=scroll><table><thead>{header}</thead><tbody>{''.join(rows)}</tbody></table></div>"
