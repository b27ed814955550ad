"""evaluate: open the encoder that the settings name, score it on each dataset, write the report."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm2clip.artifacts import is_complete, open_output, read_json, say_complete, write_json, write_manifest
from llm2clip.cuts import say_cut
from llm2clip.data.bad import BadSamples
from llm2clip.data.config import SourceConfig
from llm2clip.data.sample import Sample
from llm2clip.data.source import Source, open_source
from llm2clip.errors import SourceError, UsageError, setting
from llm2clip.eval import evaluators
from llm2clip.eval.cache import Features, arithmetic_of, model_digest
from llm2clip.eval.config import EvaluateConfig
from llm2clip.eval.datasets import named_datasets
from llm2clip.eval.download import download
from llm2clip.eval.encode import Remembering
from llm2clip.eval.foreign import StoredVectors
from llm2clip.eval.gallery import QUERIES, gallery
from llm2clip.eval.models import check_same_model, open_baseline, open_beside, open_encoder
from llm2clip.eval.named import Named, NoneBad, card_of, told
from llm2clip.eval.ranking import differences_of, intervals
from llm2clip.eval.report import write_pages
from llm2clip.eval.verdict import judge
from llm2clip.hub import pick_device
from llm2clip.journal import LOG
from llm2clip.metrics import similarity_profile
from llm2clip.parts import find_part, part_names
from llm2clip.protocols import Encoder, Score, TextEncoder
from llm2clip.scores import Captions, interval

logger = logging.getLogger("llm2clip")
REPORT = "report.json"


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score a model and write `report.json`, `.md` and `.html`; returns what `report.json` holds.

    Raises:
        UsageError: for a model or source that cannot be.
        TooManyBadSamples: if too many images cannot be read.

    Example:
        >>> settings = EvaluateConfig(model="student", teacher="teacher", data=("test.csv",), out="report")
        >>> report = evaluate(settings)                                                # doctest: +SKIP
        >>> report["metrics"]["test/short/i2t_r@1"]                                    # doctest: +SKIP
        0.871
    """
    if config.list:
        sys.stdout.writelines(f"{line}\n" for line in told(config.benchmark))
        return {}
    out = Path(config.out or "")
    with open_output(out, "report", config=config.settings()):
        for name in config.benchmark if config.download else ():
            download(name, card_of(name), Path(str(config.root)))
        sources = open_all(config)
        if is_complete(out):
            done = dict(read_json(out / REPORT))
            check_current(done, config, sources)
            say_complete(out)
            return done
        report, galleries = score_datasets(sources, config)
        report["config"] = config.settings()
        write_json(out / REPORT, report)
        write_pages(out, report, galleries, log=Path(config.model or str(config.teacher)) / LOG)
        write_manifest(out, "report", config=config.settings(), metrics=report["metrics"], model=report["model"])
    for name, value in report["metrics"].items():
        logger.info("%s %.4f", name, value)
    for line in judge(report):
        logger.info("%s", line)
    return report


def open_all(config: EvaluateConfig) -> dict[str, Source | Named]:
    """The datasets and benchmarks that the settings name; what is missing of them is told before a model is opened.

    Raises:
        UsageError: for a source that cannot be, or two of one name.
        SourceError: for one that cannot be read.
    """
    needed = config.needs_images
    sources: dict[str, Source | Named] = {
        name: open_source(part, images=needed) for name, part in parts_of(config).items()
    }
    for name in dict.fromkeys(config.benchmark):
        if name in sources:
            raise UsageError(f"{setting('data')} {name} is called as the benchmark is; rename the file")
        sources[name] = Named(name, str(config.root), images=needed)
    return sources


def score_datasets(
    sources: Mapping[str, Source | Named], config: EvaluateConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `report.json` says of the datasets, and their galleries."""
    model, facts = open_encoder(config)
    other, baseline = open_baseline(config, facts)  # before anything is encoded: a wrong name is told at once
    report: dict[str, Any] = {"metrics": {}, "chance": {}, "datasets": {}, "similarity": {}, "model": facts}
    report |= {"intervals": {}, "baseline": baseline, "protocol": {}}
    galleries, ours = {}, {}
    teacher = config.teacher or facts.get("teacher")  # a released student knows its own
    own = ((config.model, config.model_revision), (teacher, config.teacher_revision))
    tower_revision = facts.get("tower_revision") if config.baseline is None else None
    features = features_of(config, model, *own)
    known = features_of(config, other, (baseline.get("model"), tower_revision))
    for name, source in sources.items():
        samples, encoder = read_dataset(source, model, config, features)
        ours[name] = scores = run_evaluators(source, samples, encoder)
        add_scores(report, name, scores)
        report["datasets"][name] = {**facts_of(source, samples, encoder), **notes_of(report, name, source, samples)}
        if isinstance(source, Named):
            report["protocol"][name], samples = source.told(), source.shown()
        else:
            report["similarity"][name] = similarity_of(samples, encoder, seed=config.seed)
        if encoder.sees_images and samples and config.needs_images:
            most = max(3, QUERIES // len(sources))
            galleries[name] = gallery(samples, encoder, seed=config.seed, most=most)
        if other is not None:
            beside = encoder_of(other, config, BadSamples(1.0, quiet=True), known)
            theirs = run_evaluators(source, samples, beside)
            add_scores(baseline, name, theirs)
            for key, found in differences_of(scores, theirs).items():
                baseline.setdefault("differences", {})[f"{name}/{key}"] = found
            if beside.num_cut is not None:
                baseline["captions_cut"] = baseline.get("captions_cut", 0) + beside.num_cut
        for kept in filter(None, (features, known)):
            kept.save()
    if config.compare:
        report["compare"] = compare_models(sources, ours, config)
    return report, galleries


def parts_of(config: EvaluateConfig) -> dict[str, SourceConfig]:
    """The source settings of each dataset, by its name in the report."""
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(SourceConfig)}
    return {name: SourceConfig(**{**shared, "data": specs}) for name, specs in named_datasets(config.data).items()}


def check_current(done: Mapping[str, Any], config: EvaluateConfig, sources: Mapping[str, Any]) -> None:
    """Check that a finished report is of the model and data that are there now.

    Raises:
        UsageError: naming what has changed since.
    """
    check_same_model(done, config)
    for name, source in sources.items():
        if source.fingerprint != done["datasets"][name]["fingerprint"]:
            raise UsageError(
                f"{setting('data')} {name} has changed since {setting('out')} {config.out}: name a new folder or "
                "delete that one"
            )


def encoder_of(
    model: TextEncoder, config: EvaluateConfig, bad: BadSamples, features: Features | None = None
) -> Remembering:
    """A model as evaluators see it."""
    device = pick_device(config.device)
    return Remembering(model, batch_size=config.batch_size, bad=bad, device=device, features=features)


def features_of(config: EvaluateConfig, model: Any, *names: tuple[str | None, str | None]) -> Features | None:
    """What is kept of the vectors of a model, if anything is to be.

    Args:
        model: it, opened.
        names: its own and its teacher's, each with the revision.
    """
    if config.cache is None or isinstance(model, StoredVectors):
        return None
    if len(names) == 1:  # what is compared is given without a teacher; a released student knows its own
        names = (*names, (getattr(model, "origin", {}).get("teacher"), None))
    arithmetic = arithmetic_of(model, config.precision, pick_device(config.device))
    return Features(Path(config.cache), model_digest(names, arithmetic))


def read_dataset(
    source: Source | Named, model: TextEncoder, config: EvaluateConfig, features: Features | None = None
) -> tuple[list[Sample], Remembering]:
    """The usable samples of a dataset, and the model that has seen their images, where it sees any.

    Raises:
        SourceError: if there is no usable one.
        TooManyBadSamples: if too many images cannot be read.
    """
    bad = NoneBad(source.name) if isinstance(source, Named) else BadSamples(config.max_bad_fraction)
    encoder = encoder_of(model, config, bad, features)
    samples = encoder.read(source) if encoder.sees_images else list(source)
    total = len(samples) + bad.num_bad + source.bad.num_bad
    bad.merge(source.bad)
    bad.check(total)
    if not samples:
        raise SourceError(f"{setting('data')} {' '.join(config.data)} holds no usable image")
    return samples, encoder


def run_evaluators(source: Source | Named, samples: Sequence[Sample], encoder: Remembering) -> list[Score]:
    """What each evaluator finds on a dataset; for a text encoder alone those that need no images."""
    sees = encoder.sees_images
    if isinstance(source, Named):
        found = source.evaluators(images=sees)
    else:
        names = [n for n in part_names(evaluators) if sees or not find_part(evaluators, n, "NEEDS_IMAGES")]
        found = [find_part(evaluators, name, "EVALUATOR")(samples) for name in names]
    return [score for evaluator in found for score in evaluator.run(encoder)]


def add_scores(report: dict[str, Any], dataset: str, scores: Sequence[Score]) -> None:
    """Put the scores of a dataset into a report, with chance and interval where there are such.

    The interval is a bootstrap over images where a score says what each image adds, otherwise Wilson's.
    """
    shares = {score.name: score.shares for score in scores if score.shares is not None}
    bounds = dict(zip(shares, intervals(list(shares.values())), strict=True)) if shares else {}
    for score in scores:
        name = f"{dataset}/{score.name}"
        report.setdefault("metrics", {})[name] = score.value
        if score.chance is not None:
            report.setdefault("chance", {})[name] = score.chance
        if score.num_images is not None:
            low, high = bounds.get(score.name) or interval(score.value, score.num_images)
            report.setdefault("intervals", {})[name] = [round(low, 6), round(high, 6)]


def facts_of(source: Source | Named, samples: Sequence[Sample], encoder: Remembering) -> dict[str, Any]:
    """The counts of a dataset; what its model read only in part is logged."""
    rows = Captions.of(samples).rows
    facts: dict[str, Any] = {
        "fingerprint": source.fingerprint,
        "images": len(samples),
        "captions": {kind: len(own) for kind, own in rows.items()},
        "bad": encoder.bad.to_json(),
    }
    if isinstance(source, Named):
        facts |= source.facts()
    if encoder.num_cut is not None:
        facts["captions_cut"] = encoder.num_cut
        say_cut(encoder.num_cut, encoder.num_texts, getattr(encoder.model, "context", None))
    return facts


def notes_of(
    report: Mapping[str, Any], dataset: str, source: Source | Named, samples: Sequence[Sample]
) -> dict[str, list[str]]:
    """What a reader must know of a dataset to read its scores, in words; logged as well."""
    captions, trained, notes = Captions.of(samples), report["model"].get("kinds", []), []
    if isinstance(source, Named):
        notes += source.told()["found"]
    elif trained and set(captions.rows) != set(trained):
        here = ", ".join(captions.rows)
        notes.append(f"captions here are of kind {here}; the model was trained on {', '.join(trained)}")
    for kind, rows in captions.rows.items() if isinstance(source, Source) else ():
        images = Counter(row for row, _ in set(zip(rows, captions.owners[kind], strict=True)))
        if shared := sum(images[row] > 1 for row in rows):
            whose = f"{shared:,} of the {len(rows):,} captions of kind {kind} are those of another image, too"
            notes.append(f"{whose}: no model can tell these images apart by them, and ties count against it")
    if not any(name.startswith(f"{dataset}/") for name in report["metrics"]):
        why = "images with two different captions, and here none has two: name a second column"
        why = "captions alone, and this benchmark takes images" if isinstance(source, Named) else why
        notes.append(f"there is no score: a text encoder alone is scored on {why}")
    for note in notes:
        logger.warning("%s: %s", dataset, note)
    return {"notes": notes} if notes else {}


def similarity_of(samples: Sequence[Sample], encoder: Encoder, *, seed: int) -> dict[str, Any]:
    """Alignment, uniformity and histograms of caption similarities, see `llm2clip.metrics.similarity_profile`."""
    captions = Captions.of(samples)
    rows, owners = captions.distinct(captions.rows)
    return similarity_profile(encoder.texts(captions.texts)[rows], owners, seed=seed)


def compare_models(
    sources: Mapping[str, Source | Named], ours: Mapping[str, Sequence[Score]], config: EvaluateConfig
) -> dict[str, Any]:
    """What the other models get on the same datasets, and how that differs from `ours`; one is open at a time."""
    report: dict[str, Any] = {}
    for model in dict.fromkeys(config.compare):
        other, found = open_beside("compare", model, config), report.setdefault(model, {"differences": {}})
        features = features_of(config, other, (model, None))
        for name, source in sources.items():
            samples, encoder = read_dataset(source, other, config, features)
            scores = run_evaluators(source, samples, encoder)
            add_scores(found, name, scores)
            changes = differences_of(scores, ours[name])
            found["differences"] |= {f"{name}/{key}": change for key, change in changes.items()}
            if features is not None:
                features.save()
    return report
