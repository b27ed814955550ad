"""`train-teacher`: captions in, teacher folder out; on sentence-transformers' trainer, with exact resume."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer

from llm2clip import few
from llm2clip.artifacts import is_complete, open_output, read_json, say_complete, write_json, write_manifest
from llm2clip.cuts import CutCounter, say_cut
from llm2clip.errors import LLM2CLIPError, SourceError, TooManyBadSamples, UsageError, setting
from llm2clip.hub import ModelFolder, find_model, settle_precision
from llm2clip.journal import LOG, logged
from llm2clip.outlook import ENOUGH, ends, has_gained, has_not_moved, learned_nothing, more_steps, too_few_steps
from llm2clip.teacher import tuning
from llm2clip.teacher.chat import turn_of
from llm2clip.teacher.config import JoinConfig, TeacherConfig
from llm2clip.teacher.data import TRIPLET, check_tasks, prepare_probe, prepare_tasks
from llm2clip.teacher.fingerprint import compute_fingerprint, quick_digests
from llm2clip.teacher.join import open_members, write_joined
from llm2clip.teacher.mixture import BatchOrder, Mixture, Task, check_sizes, count_steps, task_weights
from llm2clip.teacher.mntp import MNTP_LOG, mask_token_id, train_mntp
from llm2clip.teacher.model import find_text_model, four_bit_config, llm, llm_as_encoder, one_line_errors, save
from llm2clip.teacher.probe import CaptionSet, probe_captions
from llm2clip.teacher.trainer import fit
from llm2clip.teacher.tuning import merge_lora

logger = logging.getLogger("llm2clip")
MOST_COUNTED = 10_000
"""Rows of a task whose captions are counted before training; to tokenise all of millions takes hours."""
MERGE_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2, "fp16": 1e-3}
"""How far (1 - cosine) merging the adapter may move a vector: the rounding of the weights' dtype."""


def train_teacher(config: TeacherConfig) -> Path:
    """Train a teacher and write its folder; returns the folder.

    Run again after a kill, it goes on from the last checkpoint and ends with the same bytes. Under `torchrun` or
    `accelerate launch` every process calls it.

    Raises:
        UsageError: for settings that cannot work.
        SourceError: if there is nothing to learn from.
        TooManyBadSamples: if more samples than `max_bad_fraction` cannot be read.
        LLM2CLIPError: if memory runs out or the loss is no longer a number.

    Example:
        >>> settings = TeacherConfig(data=("captions.csv",), model="Qwen/Qwen3-0.6B", out="teacher", steps=1000)
        >>> train_teacher(settings)                                                    # doctest: +SKIP
        PosixPath('teacher')
    """
    # The others wait while the first process reads the captions, which may take longer than torch's half hour.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=1))
    out = Path(config.out)
    config = settle_precision(config, out)
    with _output(out, config, main=state.is_main_process):
        if is_complete(out):
            say_complete(out)
            shutil.rmtree(config.work, ignore_errors=True)  # a kill may have come just before this
            return out
        check_tasks(config)
        llm_folder = check_model(config, state)
        with state.main_process_first():
            config.work.mkdir(exist_ok=True)
            tasks, facts = prepare_tasks(config, config.work)
            check_sizes(tasks, batch_size=config.batch_size)
            probe_set = prepare_probe(config, tasks)
        sizes = [len(task) for task in tasks]
        config = settle_few(config, sizes, llm_folder, main=state.is_main_process)
        if state.is_main_process and (short := too_short(config, sizes, state.num_processes)):
            logger.warning("%s", short)
        model = llm_folder
        if config.mntp:
            model = find_model(train_mntp(config, model, tasks[0].rows if config.data else [], state))
        encoder = build_encoder(config, model, state)
        if state.is_main_process:
            facts = {**facts, "captions_cut": count_cut(encoder, tasks)}
        before = _probe(encoder, probe_set, config.work / "before.json", state)
        train(config, encoder, tasks, probe_set, state)
        if tuning.is_sharded(encoder):  # one process puts the whole together again
            weights = tuning.trained_weights(encoder)
            encoder = build_encoder(config, model, state)
            tuning.load_trained(encoder, weights)
        _finish(config, encoder, llm_folder, probe_set, state, {**facts, "before": before})
    return out


def _finish(
    config: TeacherConfig,
    encoder: SentenceTransformer,
    llm_folder: ModelFolder,
    probe_set: CaptionSet,
    state: PartialState,
    facts: dict[str, Any],
) -> None:
    """Merge, check and save the trained model; the manifest comes last."""
    out = Path(config.out)
    probed_on = "held-out captions" if config.eval_data else "a sample of the training captions"
    probed_on += ", by the LLM alone" if config.join else ""
    if state.is_main_process:
        if config.tuning == "lora":
            if config.save_adapter:
                llm(encoder).save_pretrained(str(out / "adapter"))
            if config.quantize:
                tuning.move_lora(encoder, _base(config, llm_folder, state), folder=config.work / "adapter")
            facts["merge_error"] = merge_checked(encoder, probe_set, tolerance=MERGE_TOLERANCE[config.precision])
        save(encoder, config.work / "tuned" if config.join else out, attention=config.attention)
        facts["after"] = probe_captions(lambda texts: _encode(encoder, texts), probe_set) if probe_set else None
        _log_scores(facts, probed_on)
        if told := nothing_learned(config, facts, logged(out / LOG, "loss")):
            logger.warning("%s", told)
        if config.join:
            facts.update(_join(config))
        else:
            files = {"fingerprint": compute_fingerprint(out), "files": quick_digests(out)}
            facts.update(files, dim=encoder.get_embedding_dimension())
        write_manifest(out, "teacher", config=config.settings(), probed_on=probed_on, **facts)
        shutil.rmtree(config.work)
    state.wait_for_everyone()


def _join(config: TeacherConfig) -> dict[str, Any]:
    """Write the teacher that the trained LLM and others make; returns what its manifest says of it."""
    names, trusted = (str(config.work / "tuned"), *config.join), config.trust_remote_code
    revisions = ("main", *config.join_revisions) if config.join_revisions else ()
    joining = JoinConfig(teachers=names, out=config.out, trust_remote_code=trusted)
    facts = write_joined(joining, list(open_members(names, revisions, trust_remote_code=trusted)))
    facts["members"][0]["name"] = config.model
    return facts


def check_model(config: TeacherConfig, state: PartialState) -> ModelFolder:
    """The LLM's folder; raises at once if it cannot be a teacher or trained so, before hours of reading captions."""
    if config.precision == "fp16" and state.device.type == "cpu":
        raise UsageError(f"{setting('precision', 'fp16')} needs a GPU; on a CPU give bf16 or fp32")
    for name in ("batch_size", "mntp_batch_size") if config.mntp else ("batch_size",):
        if getattr(config, name) % state.num_processes:
            raise UsageError(
                f"{setting(name)} {getattr(config, name)} is no multiple of the {state.num_processes} processes"
            )
    with state.main_process_first():
        folder = find_text_model(config.model, revision=config.model_revision)
    if folder.kind == "adapter" and (config.mntp or config.chat_template):
        raise UsageError(
            f"{setting('model')} {config.model} is an adapter; leave out {setting('mntp')} and "
            f"{setting('chat_template')}, or merge it into its model first"
        )
    if config.quantize:
        four_bit_config()
    members = open_members(config.join, config.join_revisions, trust_remote_code=config.trust_remote_code, what="join")
    for _ in members if state.is_main_process else ():  # what cannot be joined is told before the training
        pass
    if config.chat_template or config.mntp:
        with one_line_errors(config.model):
            tokenizer = AutoTokenizer.from_pretrained(folder.path, trust_remote_code=config.trust_remote_code)
        if config.chat_template:
            turn_of(tokenizer)
        if config.mntp:
            mask_token_id(tokenizer, config.mntp_mask_token)
    return folder


def build_encoder(config: TeacherConfig, model: ModelFolder, state: PartialState) -> SentenceTransformer:
    """The LLM as an encoder, with adapters in it if those are to be trained."""
    encoder = _base(config, model, state, quantize=config.quantize)
    if config.tuning == "lora":
        rank, alpha, dropout = config.lora_rank, config.lora_alpha, config.lora_dropout
        tuning.add_lora(encoder, rank=rank, alpha=alpha, dropout=dropout, seed=config.seed)
    elif config.tuning == "frozen":
        llm(encoder).requires_grad_(False)
    tuning.add_adaptor(encoder, layers=config.adaptor_layers)
    return encoder


def _base(
    config: TeacherConfig, model: ModelFolder, state: PartialState, *, quantize: bool = False
) -> SentenceTransformer:
    return llm_as_encoder(
        model,
        pooling=config.pooling,
        attention=config.attention,
        max_length=config.max_length,
        chat_template=config.chat_template,
        device=state.device,
        dtype=config.load_dtype,
        quantize=quantize,
        trust_remote_code=config.trust_remote_code,
    )


def train(
    config: TeacherConfig, encoder: SentenceTransformer, tasks: list[Task], probe_set: CaptionSet, state: PartialState
) -> None:
    """Train `encoder` in place on the tasks."""
    sizes = [len(task) for task in tasks]
    steps = num_steps(config, sizes)
    order = BatchOrder(
        sizes,
        batch_size=config.batch_size,
        steps=steps,
        seed=config.seed,
        weights=task_weights([task.name for task in tasks], config.source_weights),
        num_parts=state.num_processes,
    )

    def probe() -> dict[str, Any]:
        scores = probe_captions(lambda texts: _encode(encoder, texts), probe_set)
        return {name: scores[name] for name in ("cra_second", "cra_all", "alignment", "uniformity")}

    fit(encoder, Mixture(tasks, seed=config.seed), order, config=config, probe=probe if probe_set else None)


def settle_few(config: TeacherConfig, sizes: list[int], model: ModelFolder, *, main: bool = True) -> TeacherConfig:
    """`config` with the length and rate that it leaves open; for few images other ones than the paper's."""
    chosen: dict[str, Any] = {}
    if (images := sum(sizes)) < few.FEW_IMAGES:
        chosen["steps"] = few.TEACHER_STEPS
        if config.tuning == "lora" and (width := model.config.get("hidden_size")):
            chosen["learning_rate"] = few.lora_rate(width)
    found = few.settle(config, chosen, images=images, main=main)
    if "steps" in found and main and not config.join:
        logger.info(
            "if the tower to come has a text half that reads these captions, as CLIP's and SigLIP's, far more is found "
            "with it beside the LLM: %s (docs/few-images.md)",
            setting("join", ("TOWER",)),
        )
    if config.learning_rate is None:
        found.setdefault("learning_rate", few.LORA_RATE)
    return dataclasses.replace(config, **found)


def num_steps(config: TeacherConfig, sizes: list[int]) -> int:
    """The steps of a training on tasks of these sizes."""
    return config.steps or count_steps(sizes, batch_size=config.batch_size, epochs=config.epochs or 1)


def too_short(config: TeacherConfig, sizes: list[int], num_processes: int) -> str:
    """A warning if a training on tasks of these sizes has too few steps to learn anything."""
    return too_few_steps(
        "teacher",
        sizes,
        steps=num_steps(config, sizes),
        batch_size=config.batch_size,
        by_steps=config.steps is not None,
        num_processes=num_processes,
    )


def nothing_learned(config: TeacherConfig, facts: Mapping[str, Any], losses: list[dict[str, float]]) -> str:
    """A warning if neither the loss nor the captions that are found again show that anything was learned.

    Args:
        facts: the scores `before` and `after`, None where there are no captions to score, and the tasks' `rows`.
        losses: the log's lines with a loss.
    """
    if not losses:
        return ""
    first, last = ends([line["loss"] for line in losses])
    # with one random caption of another image beside each positive, as many again
    guessing = math.log(config.batch_size * (2 if config.random_negative else 1))
    before, after = facts["before"], facts["after"]
    found = ""
    if after:
        if has_gained(before["cra_all"], after["cra_all"], after["images"]):
            return ""
        found = f"{after['cra_all']:.1%} of the captions find another of their image, {before['cra_all']:.1%} before"
    if not has_not_moved(first, last, guessing=guessing):
        return ""
    sizes, by_steps = list(facts["rows"].values()), config.steps is not None
    advice = f"give {setting('scale', 20)} or another {setting('learning_rate')} (now {config.learning_rate:g})"
    if num_steps(config, sizes) < ENOUGH:
        advice = f"give {more_steps(sizes, batch_size=config.batch_size, by_steps=by_steps)}"
    return learned_nothing("teacher", first, last, guessing=guessing, found=found, advice=advice)


def count_cut(encoder: SentenceTransformer, tasks: list[Task]) -> dict[str, Any]:
    """How many training captions are longer than the LLM reads; a warning if any are.

    Of many captions only those of some rows, the same of each task, are counted.
    """
    texts: list[str] = []
    for task in tasks:
        step = -(-len(task) // MOST_COUNTED)
        texts += [text for i in range(0, len(task), step) for text in all_texts(task.rows[i])]
    counter = CutCounter(encoder, encoder.prompts.get("caption"))
    number = int(counter.cut(texts).sum())
    sampled = any(len(task) > MOST_COUNTED for task in tasks)
    say_cut(number, len(texts), counter.limit, what="training captions" + (" of a sample" if sampled else ""))
    return {"captions": len(texts), "cut": number, "limit": counter.limit}


def all_texts(row: dict[str, Any]) -> list[str]:
    """The captions of a stored row, of whatever kind."""
    found = row["texts"] if "texts" in row else [row.get(name) for name in TRIPLET]
    return [text for text in found if text]


def merge_checked(encoder: SentenceTransformer, captions: CaptionSet, *, tolerance: float) -> float:
    """Merge the adapters; returns how far (1 - cosine) that moved the worst of up to 64 captions.

    Raises:
        LLM2CLIPError: if it is more than `tolerance`.
    """
    texts = [texts[0] for texts in captions[:64]] or ["an image of a cat"]
    unmerged = _encode(encoder, texts)
    merge_lora(encoder)
    merged = _encode(encoder, texts)
    error = float((1 - torch.nn.functional.cosine_similarity(torch.tensor(unmerged), torch.tensor(merged))).max())
    if not error <= tolerance:
        raise LLM2CLIPError(
            f"merging the adapter moved a caption's vector by {error:.2g} (allowed {tolerance}); "
            f"train with {setting('precision', 'fp32')} or keep the adapter apart with {setting('save_adapter', True)}"
        )
    return max(error, 0.0)


def _probe(
    encoder: SentenceTransformer, captions: CaptionSet, file: Path, state: PartialState
) -> dict[str, Any] | None:
    """The scores before training, read back from `file` if an earlier run of the same took them."""
    if state.is_main_process and captions and not file.exists():
        write_json(file, probe_captions(lambda texts: _encode(encoder, texts), captions))
    state.wait_for_everyone()
    return read_json(file) if captions else None


def _encode(encoder: SentenceTransformer, texts: Any) -> Any:
    encoder.eval()
    dtype = llm(encoder).dtype
    with torch.autocast(encoder.device.type, dtype=dtype, enabled=dtype != torch.float32):
        return encoder.encode(list(texts), batch_size=64, convert_to_numpy=True, show_progress_bar=False)


def _log_scores(facts: dict[str, Any], probed_on: str) -> None:
    for when in ("before", "after"):
        if facts[when]:
            cra, images = facts[when], facts[when]["images"]
            logger.info(
                "caption retrieval accuracy %s: %.1f%% among %s second captions (by chance %.1f%%), %.1f%% among all "
                "captions (%s)",
                when,
                100 * cra["cra_second"],
                f"{images:,}",
                100 / images,
                100 * cra["cra_all"],
                probed_on,
            )


@contextlib.contextmanager
def _output(out: Path, config: TeacherConfig, *, main: bool) -> Iterator[None]:
    """Hold the output folder: one process does, for all.

    If the settings or the data turn out wrong before any training, the folder is as it was, so that the corrected
    command may use it.
    """
    if not main:
        yield
        return

    def results() -> list[Path]:
        return [*config.work.glob("*/checkpoint-*"), *config.work.glob("mntp")]

    scraps = () if results() else (config.work.name, LOG, MNTP_LOG)
    with open_output(out, "teacher", config=config.settings(), scraps=scraps) as began:
        try:
            yield
        except (UsageError, SourceError, TooManyBadSamples):
            if not began and not results():
                shutil.rmtree(config.work, ignore_errors=True)
            raise
