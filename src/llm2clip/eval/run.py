"""evaluate: open the encoder that the settings name, score it on each dataset, write the report."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm2clip.artifacts import is_complete, open_output, read_json, write_json, write_manifest
from llm2clip.cuts import say_cut
from llm2clip.data.bad import BadSamples
from llm2clip.data.config import SourceConfig
from llm2clip.data.sample import Sample
from llm2clip.data.source import open_source
from llm2clip.errors import SourceError, UsageError, setting
from llm2clip.eval import evaluators
from llm2clip.eval.config import EvaluateConfig
from llm2clip.eval.datasets import named_datasets
from llm2clip.eval.encode import Remembering
from llm2clip.eval.encoders import ClipEncoder, SentenceTransformerEncoder
from llm2clip.eval.report import write_pages
from llm2clip.hub import DTYPES, find_model, pick_device
from llm2clip.metrics import similarity_profile
from llm2clip.opening import check_images_fit, check_unchanged
from llm2clip.parts import find_part, part_names
from llm2clip.pipeline import LLM2CLIP, Teacher
from llm2clip.protocols import Encoder, ImageEncoder, Score, TextEncoder
from llm2clip.scores import Captions

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
        encoder, facts = open_encoder(config)
        report: dict[str, Any] = {"metrics": {}, "chance": {}, "datasets": {}, "similarity": {}, "model": facts}
        for name, source in sources.items():
            found = score_dataset(source, encoder, config)
            for part in ("metrics", "chance"):
                report[part] |= {f"{name}/{key}": value for key, value in found[part].items()}
            report["datasets"][name] = found["facts"]
            report["similarity"][name] = found["similarity"]
        report["config"] = config.settings()
        write_json(out / REPORT, report)
        write_pages(out, report)
        write_manifest(out, "report", config=config.settings(), metrics=report["metrics"], model=facts)
    for name, value in report["metrics"].items():
        logger.info("%s %.4f", name, value)
    return report


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


def score_dataset(source: Any, model: TextEncoder, config: EvaluateConfig) -> dict[str, Any]:
    """Scores, chance, similarity figures and facts of one dataset."""
    bad = BadSamples(config.max_bad_fraction)
    encoder = Remembering(model, batch_size=config.batch_size, bad=bad, device=pick_device(config.device))
    samples = encoder.read(source) if isinstance(model, ImageEncoder) else list(source)
    total = len(samples) + bad.num_bad + source.bad.num_bad
    bad.merge(source.bad)
    bad.check(total)
    if not samples:
        raise SourceError(f"{setting('data')} {' '.join(config.data)} holds no usable image")
    before = getattr(model, "num_cut", None)
    scores = list(run_evaluators(samples, encoder, images=isinstance(model, ImageEncoder)))
    captions = Captions.of(samples)
    rows, owners = captions.distinct(captions.rows)
    profile = similarity_profile(encoder.texts(captions.texts)[rows], owners, seed=config.seed)
    facts = {
        "fingerprint": source.fingerprint,
        "images": len(samples),
        "captions": {kind: len(rows) for kind, rows in captions.rows.items()},
        "bad": bad.to_json(),
    }
    if before is not None:
        facts["captions_cut"] = getattr(model, "num_cut", 0) - before
        say_cut(facts["captions_cut"], encoder.num_texts, getattr(model, "context", None))
    return {
        "metrics": {score.name: score.value for score in scores},
        "chance": {score.name: score.chance for score in scores if score.chance is not None},
        "similarity": profile,
        "facts": facts,
    }


def run_evaluators(samples: Sequence[Sample], encoder: Encoder, *, images: bool) -> Iterator[Score]:
    """What each evaluator finds on a dataset; without `images` those alone that need none."""
    for name in part_names(evaluators):
        if images or not find_part(evaluators, name, "NEEDS_IMAGES"):
            yield from find_part(evaluators, name, "EVALUATOR")(samples).run(encoder)


def open_encoder(config: EvaluateConfig) -> tuple[TextEncoder, dict[str, Any]]:
    """The encoder that the settings name, and what the report says of it.

    Raises:
        UsageError: if there is none, or a student comes without its teacher.
    """
    options: dict[str, Any] = {
        "device": pick_device(config.device),
        "dtype": DTYPES.get(config.precision),  # auto: as saved, if the device computes in it
        "trust_remote_code": config.trust_remote_code,
    }
    if config.model is None:
        assert config.teacher is not None
        teacher = Teacher.from_pretrained(config.teacher, revision=config.teacher_revision, **options)
        teacher.warns = False
        return teacher, {"encoder": "text encoder", "dim": teacher.dim, "teacher_fingerprint": teacher.fingerprint}
    folder = find_model(config.model, revision=config.model_revision)
    if folder.kind in ("student", "bundle"):
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
    check_images_fit(folder)
    loader = SentenceTransformerEncoder if folder.kind == "sentence-transformers" else ClipEncoder
    encoder = loader.from_pretrained(folder, **options)
    return encoder, {"encoder": type(encoder.model).__name__}
