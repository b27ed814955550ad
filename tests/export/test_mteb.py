"""A bundle in mteb, by the lines of docs/scores.md: its public `evaluate` scores what `llm2clip evaluate` does."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from llm2clip import LLM2CLIP, EvaluateConfig
from llm2clip.bundle import save_bundle
from llm2clip.eval.run import evaluate
from tests.export import matrix
from tests.teacher.conftest import chat_llm  # noqa: F401  (a fixture)

DOCS = Path(__file__).parents[2] / "docs" / "scores.md"
KS = (1, 5, 10)


def tasks(rows: list[tuple[str, list[str]]]) -> list[Any]:
    """Image to text and text to image over (file, its captions), as tasks of mteb that need no download."""
    from datasets import Dataset, Image
    from mteb.abstasks import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    images = Dataset.from_dict({"id": [f"i{i}" for i in range(len(rows))], "image": [file for file, _ in rows]})
    images = images.cast_column("image", Image())
    owners = [(f"t{i}-{j}", text, f"i{i}") for i, (_, texts) in enumerate(rows) for j, text in enumerate(texts)]
    texts = Dataset.from_dict({"id": [each[0] for each in owners], "text": [each[1] for each in owners]})
    relevant: dict[str, dict[str, dict[str, int]]] = {"i2t": {}, "t2i": {}}
    for text, _, image in owners:
        relevant["i2t"].setdefault(image, {})[text] = 1
        relevant["t2i"][text] = {image: 1}

    def task(way: str) -> Any:
        queries, corpus = (images, texts) if way == "i2t" else (texts, images)
        split = {"queries": queries, "corpus": corpus, "relevant_docs": relevant[way], "top_ranked": None}

        class Local(AbsTaskRetrieval):
            metadata = TaskMetadata(
                name=f"Local{way.upper()}Retrieval",
                description="Images of one shape, and what is said of them.",
                reference=None,
                dataset={"path": "local/shapes", "revision": "1"},
                type="Any2AnyRetrieval",
                category=way,
                modalities=["text", "image"],
                eval_splits=["test"],
                eval_langs=["eng-Latn"],
                main_score="ndcg_at_10",
                date=("2026-01-01", "2026-01-02"),
                domains=["Web"],
                task_subtypes=["Image Text Retrieval"],
                license="apache-2.0",
                annotations_creators="derived",
                dialect=[],
                sample_creation="created",
                bibtex_citation="",
                prompt={"query": "Find what is said of the image."},
            )

            def load_data(self, *args: Any, **options: Any) -> None:
                self.dataset, self.data_loaded = {"default": {"test": split}}, True

        return Local()

    return [task("i2t"), task("t2i")]


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["LLM2CLIP-Llama-3-8B-Instruct-CC", "an embedder (BERT)"])
def test_scores_are_those_of_evaluate(
    teacher: str,
    tiny_llm: Path,
    chat_llm: Path,  # noqa: F811
    images_csv: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mteb = pytest.importorskip("mteb", reason="needs mteb, for Python 3.11 or newer: pip install 'llm2clip[mteb]'")
    made = matrix.make_teacher(teacher, tmp_path / "of-teacher", tiny_llm=tiny_llm, chat_llm=chat_llm)
    model = LLM2CLIP.from_pretrained(matrix.make_student("CLIP", made, tmp_path), made, device="cpu")
    (tmp_path / "bundle").mkdir()
    save_bundle(tmp_path / "bundle", model.student, model.transform, model.teacher)
    with images_csv.open(encoding="utf-8") as file:
        read = [(row["image"], [row["short_caption"], row["long_caption"]]) for row in csv.DictReader(file)]
    rows = [(str(images_csv.parent / name), texts) for name, texts in read]
    lines = "".join(json.dumps({"image": name, "caption": texts}) + "\n" for name, texts in rows)
    (tmp_path / "shapes.jsonl").write_text(lines, encoding="utf-8")
    data: Any = {"data": (str(tmp_path / "shapes.jsonl"),), "allow_outside": True, "baseline": "none", "device": "cpu"}
    ours = evaluate(EvaluateConfig(model=str(tmp_path / "bundle"), out=tmp_path / "report", **data))["metrics"]
    # the lines of the docs, on tasks that need no download
    section = DOCS.read_text(encoding="utf-8").split("## In mteb")[1]
    code = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)[0]
    assert "mteb.get_tasks(" in code and code.count("mteb.evaluate(") == 1
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mteb, "get_tasks", lambda names: tasks(rows))
    space: dict[str, Any] = {}
    exec(compile(code, "scores.md", "exec"), space)
    found = {}
    for result in space["results"].task_results:
        (scores,) = result.scores["test"]
        way = result.task_name.removeprefix("Local")[:3].lower()
        found |= {f"{way}_r@{k}": scores[f"hit_rate_at_{k}"] for k in KS}
    expected = {name: ours[f"shapes/raw/{name}"] for name in found}
    assert len(found) == 6 and len(set(expected.values())) > 3, "too much alike: nothing is shown"
    assert found == pytest.approx(expected, abs=1e-5)
