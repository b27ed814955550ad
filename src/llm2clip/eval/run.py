"""evaluate: open the encoder that the settings name, score it on each dataset, write the report."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm2clip.artifacts import is_complete, open_output, read_json, write_json, write_manifest
from llm2clip.cuts import say_cut
from llm2clip.data.bad import BadSamples
from llm2clip.data.config import SourceConfig
from llm2clip.data.sample import Sample
from llm2clip.data.source import Source, open_source
from llm2clip.errors import LLM2CLIPError, SourceError, UsageError, one_line, setting
from llm2clip.eval import evaluators
from llm2clip.eval.config import NO_BASELINE, EvaluateConfig
from llm2clip.eval.datasets import named_datasets
from llm2clip.eval.encode import Remembering
from llm2clip.eval.encoders import ClipEncoder, SentenceTransformerEncoder
from llm2clip.eval.gallery import QUERIES, gallery
from llm2clip.eval.report import write_pages
from llm2clip.eval.verdict import judge
from llm2clip.hub import DTYPES, ModelFolder, find_model, pick_device
from llm2clip.journal import LOG
from llm2clip.metrics import similarity_profile
from llm2clip.on_hub import cached_folder
from llm2clip.opening import check_images_fit, check_unchanged
from llm2clip.parts import find_part, part_names
from llm2clip.pipeline import LLM2CLIP, Teacher
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
    out = Path(config.out)
    with open_output(out, "report", config=config.settings()):
        sources = {name: open_source(part, images=config.needs_images) for name, part in parts_of(config).items()}
        if is_complete(out):
            done = dict(read_json(out / REPORT))
            check_current(done, config, sources)
            logger.info("%s is already complete", out)
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


def score_datasets(sources: Mapping[str, Source], config: EvaluateConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `report.json` says of the datasets, and their galleries."""
    model, facts = open_encoder(config)
    other, baseline = open_baseline(config, facts)  # before anything is encoded: a wrong name is told at once
    report: dict[str, Any] = {"metrics": {}, "chance": {}, "datasets": {}, "similarity": {}, "model": facts}
    report |= {"intervals": {}, "baseline": baseline}
    galleries = {}
    for name, source in sources.items():
        samples, encoder = read_dataset(source, model, config)
        add_scores(report, name, run_evaluators(samples, encoder))
        report["datasets"][name] = {**facts_of(source, samples, encoder), **notes_of(report, name, samples)}
        report["similarity"][name] = similarity_of(samples, encoder, seed=config.seed)
        if encoder.sees_images:
            most = max(3, QUERIES // len(sources))
            galleries[name] = gallery(samples, encoder, seed=config.seed, most=most)
        if other is not None:
            beside = encoder_of(other, config, BadSamples(1.0, quiet=True))
            add_scores(baseline, name, run_evaluators(samples, beside))
            baseline["captions_cut"] = baseline.get("captions_cut", 0) + (beside.num_cut or 0)
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
    if config.model is not None:
        check_unchanged(config.out, config.model, done["model"].get("fingerprint"))
    elif config.teacher is not None:
        check_unchanged(config.out, config.teacher, done["model"].get("teacher_fingerprint"))
    for name, source in sources.items():
        if source.fingerprint != done["datasets"][name]["fingerprint"]:
            raise UsageError(
                f"{setting('data')} {name} has changed since {setting('out')} {config.out}: name a new folder or "
                "delete that one"
            )


def encoder_of(model: TextEncoder, config: EvaluateConfig, bad: BadSamples) -> Remembering:
    """A model as evaluators see it."""
    return Remembering(model, batch_size=config.batch_size, bad=bad, device=pick_device(config.device))


def read_dataset(source: Source, model: TextEncoder, config: EvaluateConfig) -> tuple[list[Sample], Remembering]:
    """The usable samples of a dataset, and the model that has seen their images, where it sees any.

    Raises:
        SourceError: if there is no usable one.
        TooManyBadSamples: if too many images cannot be read.
    """
    bad = BadSamples(config.max_bad_fraction)
    encoder = encoder_of(model, config, bad)
    samples = encoder.read(source) if encoder.sees_images else list(source)
    total = len(samples) + bad.num_bad + source.bad.num_bad
    bad.merge(source.bad)
    bad.check(total)
    if not samples:
        raise SourceError(f"{setting('data')} {' '.join(config.data)} holds no usable image")
    return samples, encoder


def run_evaluators(samples: Sequence[Sample], encoder: Remembering) -> Iterator[Score]:
    """What each evaluator finds on a dataset; for a text encoder alone those that need no images."""
    for name in part_names(evaluators):
        if encoder.sees_images or not find_part(evaluators, name, "NEEDS_IMAGES"):
            yield from find_part(evaluators, name, "EVALUATOR")(samples).run(encoder)


def add_scores(report: dict[str, Any], dataset: str, scores: Iterable[Score]) -> None:
    """Put the scores of a dataset into a report, with chance and interval where there are such."""
    for score in scores:
        name = f"{dataset}/{score.name}"
        report.setdefault("metrics", {})[name] = score.value
        if score.chance is not None:
            report.setdefault("chance", {})[name] = score.chance
        if score.num_images is not None:
            bounds = interval(score.value, score.num_images)
            report.setdefault("intervals", {})[name] = [round(bound, 6) for bound in bounds]


def facts_of(source: Source, samples: Sequence[Sample], encoder: Remembering) -> dict[str, Any]:
    """The counts of a dataset; what its model read only in part is logged."""
    rows = Captions.of(samples).rows
    facts: dict[str, Any] = {
        "fingerprint": source.fingerprint,
        "images": len(samples),
        "captions": {kind: len(own) for kind, own in rows.items()},
        "bad": encoder.bad.to_json(),
    }
    if encoder.num_cut is not None:
        facts["captions_cut"] = encoder.num_cut
        say_cut(encoder.num_cut, encoder.num_texts, getattr(encoder.model, "context", None))
    return facts


def notes_of(report: Mapping[str, Any], dataset: str, samples: Sequence[Sample]) -> dict[str, list[str]]:
    """What a reader must know of a dataset to read its scores, in words; logged as well."""
    here, trained, notes = list(Captions.of(samples).rows), report["model"].get("kinds", []), []
    if trained and set(here) != set(trained):
        notes.append(f"captions here are of kind {', '.join(here)}; the model was trained on {', '.join(trained)}")
    if not any(name.startswith(f"{dataset}/") for name in report["metrics"]):
        notes.append(
            "there is no score: a text encoder alone is scored on images with two different captions, and here "
            "none has two: name a second column"
        )
    for note in notes:
        logger.warning("%s: %s", dataset, note)
    return {"notes": notes} if notes else {}


def similarity_of(samples: Sequence[Sample], encoder: Encoder, *, seed: int) -> dict[str, Any]:
    """Alignment, uniformity and histograms of caption similarities, see `llm2clip.metrics.similarity_profile`."""
    captions = Captions.of(samples)
    rows, owners = captions.distinct(captions.rows)
    return similarity_profile(encoder.texts(captions.texts)[rows], owners, seed=seed)


def open_encoder(config: EvaluateConfig) -> tuple[TextEncoder, dict[str, Any]]:
    """The encoder that the settings name, and what the report says of it.

    Raises:
        UsageError: if there is none, or a student comes without its teacher.
    """
    options = options_of(config)
    if config.model is None:
        assert config.teacher is not None
        teacher = Teacher.from_pretrained(config.teacher, revision=config.teacher_revision, **options)
        teacher.warns = False
        return teacher, {"encoder": "text encoder", "dim": teacher.dim, "teacher_fingerprint": teacher.fingerprint}
    folder = find_model(config.model, revision=config.model_revision)
    if folder.kind in ("student", "bundle", "released"):
        model = LLM2CLIP.from_pretrained(folder, config.teacher, teacher_revision=config.teacher_revision, **options)
        if model.teacher is None:
            wanted = model.origin.get("teacher_fingerprint", "unknown")
            raise UsageError(
                f"{setting('model')} {config.model} reads the vectors of its teacher (fingerprint {wanted}); add "
                f"{setting('teacher', 'DIR')}"
            )
        model.warns = False
        return model, {"encoder": "llm2clip", "dim": model.dim, **model.origin}
    if config.teacher is not None:
        raise UsageError(
            f"{setting('model')} {config.model} encodes texts itself; leave {setting('teacher')} {config.teacher} out"
        )
    encoder = open_other(folder, options)
    return encoder, {"encoder": type(encoder.model).__name__}


def options_of(config: EvaluateConfig) -> dict[str, Any]:
    """How models are loaded."""
    return {
        "device": pick_device(config.device),
        "dtype": DTYPES.get(config.precision),  # auto: as saved, if the device computes in it
        "trust_remote_code": config.trust_remote_code,
    }


def open_other(folder: ModelFolder, options: Mapping[str, Any]) -> ClipEncoder | SentenceTransformerEncoder:
    """Another's model that encodes images and texts."""
    check_images_fit(folder)
    loader = SentenceTransformerEncoder if folder.kind == "sentence-transformers" else ClipEncoder
    return loader.from_pretrained(folder, **options)


def open_baseline(config: EvaluateConfig, facts: Mapping[str, Any]) -> tuple[TextEncoder | None, dict[str, Any]]:
    """What the model is compared with, and its name; or nothing, and in words why.

    Args:
        facts: what is known of the model that is scored.

    Raises:
        UsageError: if the baseline that was asked for cannot be one.
    """
    options = options_of(config)
    if config.baseline == NO_BASELINE or (config.baseline is None and facts.get("encoder") != "llm2clip"):
        return None, {}
    if config.baseline is None:
        try:
            folder = plain_tower(facts.get("tower"), revision=facts.get("tower_revision"))
            options["trust_remote_code"] = False  # which was said of other models
            return open_other(folder, options), {"model": folder.name}
        except LLM2CLIPError as error:
            return None, {"why": one_line(error)}
    found: Any
    if config.model is None:
        found = Teacher.from_pretrained(config.baseline, **options)
    elif (folder := find_model(config.baseline)).kind == "student":
        raise UsageError(
            f"{setting('baseline')} {config.baseline} needs its teacher beside it; export it to sentence-transformers, "
            "and give that folder"
        )
    else:
        ours = folder.kind in ("bundle", "released")
        found = LLM2CLIP.from_pretrained(folder, **options) if ours else open_other(folder, options)
    found.warns = False
    return found, {"model": config.baseline}


def plain_tower(name: str | None, *, revision: str | None) -> ModelFolder:
    """The model whose vision half a student's tower was, with its text half; nothing is downloaded.

    Raises:
        UsageError: if it is not here, or has no text half.
    """
    if name is None:
        raise UsageError("the model does not say which tower it was trained from")
    here = Path(name) if Path(name).is_dir() else cached_folder(name, revision)
    if here is None:
        raise UsageError(f"the tower it was trained from, {name}, is not on this machine")
    folder = dataclasses.replace(find_model(here), name=name)
    if not {"text_config", "vision_config"} <= set(folder.config):
        raise UsageError(f"the tower it was trained from, {name}, has no text half")
    return folder
