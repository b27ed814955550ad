"""`build-bank`: collect the captions, encode each distinct one, write the manifest last; goes on after any death."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm2clip.artifacts import (
    file_digest,
    fingerprint,
    is_complete,
    one_line_disk_errors,
    open_output,
    read_json,
    read_manifest,
    say_complete,
    write_json,
    write_manifest,
)
from llm2clip.bank.claims import CLAIMS, Claims
from llm2clip.bank.collect import Intake, collect
from llm2clip.bank.config import BankConfig, EncodeConfig
from llm2clip.bank.dtypes import row_bytes
from llm2clip.bank.encoder import CaptionEncoder
from llm2clip.bank.fill import WAIT_SECONDS, fill
from llm2clip.bank.load import TeacherFacts, facts_of, load_for_encoding, resolve_prompt
from llm2clip.bank.reader import FACTS, TABLE, Bank, Table, has_table
from llm2clip.bank.reuse import Reuse, check_reuse, limit_of
from llm2clip.bank.vectors import VECTORS, Layout
from llm2clip.cuts import say_cut
from llm2clip.data.bad import BadSamples
from llm2clip.data.sample import ImageRef, Sample
from llm2clip.data.source import open_source
from llm2clip.errors import UsageError, setting
from llm2clip.eval.named import Named
from llm2clip.hub import pick_device, pick_precision
from llm2clip.progress import human_bytes

logger = logging.getLogger("llm2clip")
TEACHER = "teacher.json"
SCRAPS = (TEACHER, CLAIMS, ".*.tmp")
"""What a bank has before its table of captions is whole."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A bank to be written.

    Attributes:
        settings: what decides its content, for `run.json` and the manifest.
        teacher: what encodes.
        encoder: encodes; None if every caption comes from another bank.
        intake: opens the samples; its fingerprint is checked on every run.
        dtype: how vectors are stored.
        shard_rows: captions of a shard.
        reuse: banks to copy vectors from.
        part: (i, n): make only every n-th shard.
    """

    out: Path
    settings: Mapping[str, Any]
    teacher: TeacherFacts
    encoder: CaptionEncoder | None
    intake: Callable[[], Intake]
    dtype: str
    shard_rows: int
    reuse: tuple[Bank, ...] = ()
    part: tuple[int, int] = (0, 1)


def build_bank(config: BankConfig) -> Path:
    """Build a bank and return its folder; with `--shard`, build that part of it.

    Several processes may run this on one folder at once (torchrun, accelerate launch, or by hand on machines that
    share it): each takes the shards that no other is working on, and all return when the bank is whole.

    Raises:
        UsageError: if the folder is in use for something else, or was begun with another teacher (both are named).
        LLM2CLIPError: if the disk is full, too many samples are bad, a vector cannot be stored.

    Example:
        >>> build_bank(BankConfig(data=("captions.csv",), teacher="teacher", out="bank"))     # doctest: +SKIP
        PosixPath('bank')
    """
    out, intake = Path(config.out), open_intake(config)  # before the teacher: what is not there is told at once
    encoder, teacher = load_encoder(
        config,
        config.teacher,
        config.teacher_revision,
        out,
        config.dtype,
        prompt=config.prompt,
        prompt_name=config.prompt_name,
    )
    settings = same_teacher_settings(out, config.settings(), teacher)

    return write_bank(
        Plan(
            out=out,
            settings=settings,
            teacher=teacher,
            encoder=encoder,
            intake=lambda: intake,
            dtype=config.dtype,
            shard_rows=config.shard_rows,
            reuse=tuple(Bank.open(bank) for bank in config.reuse),
            part=config.part(),
        )
    )


def open_intake(config: BankConfig) -> Intake:
    """The samples of the sources; of named benchmarks each text that is asked for, a sample without an image."""
    if not config.benchmark:
        source = open_source(config, images=config.needs_images)
        return Intake(source, source.fingerprint, source.bad)
    named = [Named(name, str(config.root), images=False) for name in dict.fromkeys(config.benchmark)]
    samples = (
        Sample(f"{one.name}/{number}", ImageRef(""), {one.name: (text,)})
        for one in named
        for number, text in enumerate(one.texts())
    )
    return Intake(samples, fingerprint([one.fingerprint for one in named]), BadSamples(0.0))


def load_encoder(
    config: EncodeConfig,
    name: str,
    revision: str | None,
    out: Path,
    dtype: str,
    *,
    prompt: str | None = None,
    prompt_name: str | None = None,
    auto_precision: str = "auto",
) -> tuple[CaptionEncoder, TeacherFacts]:
    """The teacher `name`, ready to encode, and its facts.

    Args:
        revision: of a Hub id.
        out: the bank's folder; one begun there fixes what `--precision auto` means.
        auto_precision: what it means otherwise, if not the best for the hardware.
    """
    device = pick_device(config.device)
    begun = out / TEACHER
    precision = config.precision if config.precision != "auto" else auto_precision
    if config.precision == "auto" and begun.exists():
        precision = read_json(begun)["precision"]
    precision = pick_precision(precision, device)
    teacher = load_for_encoding(
        name,
        revision=revision,
        device=device,
        precision=precision,
        trust_remote_code=config.trust_remote_code,
    )
    text = resolve_prompt(teacher, prompt, prompt_name)
    encoder = CaptionEncoder(
        teacher, prompt=text, dtype=dtype, batch_tokens=config.batch_tokens, compile=config.compile
    )
    facts = facts_of(teacher, name, prompt=text, precision=precision, dim=encoder.dim, revision=revision)
    return encoder, facts


def same_teacher_settings(out: Path, settings: dict[str, Any], teacher: TeacherFacts) -> dict[str, Any]:
    """`settings` for a bank begun in `out`, whose teacher may lie elsewhere by now.

    Raises:
        UsageError: if the bank was begun with another teacher, naming both fingerprints.
    """
    if not ((out / TEACHER).exists() and has_table(out)):  # without a table it may be begun anew
        return settings
    begun = TeacherFacts(**read_json(out / TEACHER))
    _check_same_teacher(out, begun, teacher)
    if begun.name == teacher.name:
        return settings
    return {**settings, "teacher": begun.name, "teacher_revision": begun.revision}


def _check_same_teacher(out: Path, begun: TeacherFacts, teacher: TeacherFacts) -> None:
    if begun.fingerprint != teacher.fingerprint:
        raise UsageError(
            f"{setting('out')} {out} holds a bank by another teacher: its fingerprint is {begun.fingerprint} "
            f"({begun.name}), that of {teacher.name} is {teacher.fingerprint}; name a new folder"
        )


def write_bank(plan: Plan) -> Path:
    """Write what `plan` says, or go on with it; returns the folder."""
    check_reuse(plan.reuse, plan.teacher, plan.dtype)  # before the folder is begun
    intake = plan.intake()  # as are sources that are not there
    with (
        one_line_disk_errors(plan.out),
        open_output(plan.out, "bank", config=plan.settings, shared=True, scraps=SCRAPS),
        Claims(plan.out) as claims,
    ):
        if is_complete(plan.out):
            read_manifest(plan.out, "bank")  # refuses an older format
        plan = dataclasses.replace(plan, teacher=_agree_on_teacher(plan, claims))
        table = _table(plan, intake, claims)
        layout = Layout(plan.out, table.num_rows, plan.shard_rows, plan.dtype, plan.teacher.dim)
        with claims.hold("vectors"):
            layout.prepare()
        if is_complete(plan.out) and all(map(layout.is_whole, range(layout.num_shards))):
            say_complete(plan.out)
            return plan.out
        _say_size(layout, table)
        fill(layout, table, plan.encoder, Reuse(plan.reuse), claims=claims, part=plan.part, offset=_rank_offset())
        _finish(plan, layout, table, claims)
    return plan.out


def _agree_on_teacher(plan: Plan, claims: Claims) -> TeacherFacts:
    """Write `teacher.json`, unless another process was first; returns what it says.

    Raises:
        UsageError: if that one is of another teacher, or encodes in another precision, as `--precision auto` may mean
            on other hardware.
    """
    path = plan.out / TEACHER
    with claims.hold("teacher"):
        if not path.exists():
            write_json(path, dataclasses.asdict(plan.teacher))
    begun = TeacherFacts(**read_json(path))
    _check_same_teacher(plan.out, begun, plan.teacher)
    if begun.precision != plan.teacher.precision:
        raise UsageError(
            f"{plan.out} was begun in {begun.precision}, and this process encodes in {plan.teacher.precision}: it may "
            "start again now that the bank is begun; in a new folder give "
            f"{setting('precision', begun.precision)} to all"
        )
    return begun


def _table(plan: Plan, intake: Intake, claims: Claims) -> Table:
    """The table of samples and captions, made by one process while the others wait.

    Raises:
        UsageError: if the sources changed since it was made.
    """
    while not has_table(plan.out):
        if claims.take("table"):
            try:
                if not has_table(plan.out):
                    collect(intake, plan.out)
            finally:
                claims.release("table")
        else:
            time.sleep(WAIT_SECONDS)
    table = Table(plan.out)
    if table.facts["source_fingerprint"] != intake.fingerprint:
        raise UsageError(
            f"the sources of {plan.out} changed since it was begun (fingerprint {table.facts['source_fingerprint']}, "
            f"now {intake.fingerprint}); name a new folder, or add to the bank with: llm2clip bank add"
        )
    return table


def _rank_offset() -> float:
    """Where among the shards this process begins, by its rank under torchrun or accelerate."""
    return int(os.environ.get("RANK", "0")) / int(os.environ.get("WORLD_SIZE", "1"))


def _say_size(layout: Layout, table: Table) -> None:
    """Say how large the bank will be, and warn if the disk has no room for what is not there yet."""
    needed, each = layout.num_bytes(), row_bytes(layout.dtype, layout.dim)
    missing = each * sum(len(layout.rows(shard)) for shard in range(layout.num_shards) if not layout.is_whole(shard))
    free = shutil.disk_usage(layout.folder).free
    logger.info(
        "%s captions of %s samples, %s distinct: %s vectors of %s x %s, %s each; %s free on the disk",
        f"{table.facts['num_captions']:,}",
        f"{table.num_samples:,}",
        f"{table.num_rows:,}",
        human_bytes(needed),
        layout.dim,
        layout.dtype,
        human_bytes(each),
        human_bytes(free),
    )
    if missing > free:
        logger.warning("the disk will be full before the bank is whole: free %s more", human_bytes(missing - free))


def _finish(plan: Plan, layout: Layout, table: Table, claims: Claims) -> None:
    """Write the manifest, if every shard is whole; the last of several processes does."""
    shards = [layout.facts_path(shard) for shard in range(layout.num_shards) if layout.is_whole(shard)]
    if len(shards) < layout.num_shards:
        logger.info(
            "part %d/%d is done; %d of %d shards are made, the part that ends last completes the bank",
            *plan.part,
            len(shards),
            layout.num_shards,
        )
        return
    with claims.hold("finish"):
        write_bank_manifest(plan, table, [read_json(path) for path in shards])
        for leftover in [*plan.out.glob(".*.tmp"), *(plan.out / VECTORS).glob(".*.tmp")]:  # of killed processes
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def write_bank_manifest(plan: Plan, table: Table, shards: list[dict[str, Any]]) -> None:
    """Write `manifest.json`: everything a reader needs to know, and checksums of all."""
    facts = table.facts
    num_cut = sum(shard.get("cut", 0) for shard in shards)  # a shard that an older version made did not count
    limit = limit_of(plan.reuse) if plan.encoder is None else plan.encoder.cuts.limit
    say_cut(num_cut, facts["num_rows"], limit, what="distinct captions")
    digests = [entry["sha256"] for entry in facts["files"].values()]
    digests += [digest for shard in shards for digest in shard["sha256"].values()]
    write_manifest(
        plan.out,
        "bank",
        fingerprint=fingerprint([plan.teacher.fingerprint, plan.teacher.prompt, facts["kinds"], digests]),
        teacher_fingerprint=plan.teacher.fingerprint,
        teacher=dataclasses.asdict(plan.teacher),
        source_fingerprint=facts["source_fingerprint"],
        dtype=plan.dtype,
        dim=plan.teacher.dim,
        shard_rows=plan.shard_rows,
        num_samples=facts["num_samples"],
        num_captions=facts["num_captions"],
        num_rows=facts["num_rows"],
        num_tokens=sum(shard["tokens"] for shard in shards),
        cut={"rows": num_cut, "limit": limit},
        kinds=facts["kinds"],
        bad_samples=facts["bad"],
        table={
            **{f"{TABLE}/{name}": entry for name, entry in facts["files"].items()},
            f"{TABLE}/{FACTS}": {"sha256": file_digest(table.folder / TABLE / FACTS)},
        },
        shards=shards,
        config=plan.settings,
    )
