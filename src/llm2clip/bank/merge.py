"""`bank merge` and `bank add`: a new bank out of existing ones; only captions that none of them holds are encoded."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from llm2clip.artifacts import fingerprint
from llm2clip.bank.build import Plan, load_encoder, same_teacher_settings, write_bank
from llm2clip.bank.collect import Intake, collect
from llm2clip.bank.config import BankAddConfig, BankMergeConfig
from llm2clip.bank.hashes import Hashes, HashIndex, as_hashes, digest
from llm2clip.bank.load import TeacherFacts
from llm2clip.bank.reader import Bank, Table, blocks
from llm2clip.bank.reuse import check_same_teacher, find_teacher, teacher_of
from llm2clip.data.bad import BadSamples
from llm2clip.data.sample import Sample
from llm2clip.data.source import Source, open_source
from llm2clip.errors import setting

ADDED = "added"


def merge_banks(config: BankMergeConfig) -> Path:
    """Write the bank that holds what several banks by one teacher hold, and return its folder.

    Raises:
        UsageError: if their teachers, prompts, precisions or stored dtypes differ.
    """
    banks = [Bank.open(folder) for folder in config.banks]
    teacher = teacher_of_all(banks)
    for bank in banks[1:]:
        again = f"build it again with {setting('precision', teacher.precision)}"
        check_same_teacher(bank, teacher, remedy=again)

    def intake() -> Intake:
        return Intake(joined(banks), fingerprint([bank.fingerprint for bank in banks]), bad_of(banks), base=banks[0])

    return write_bank(
        Plan(
            out=Path(config.out),
            settings=config.settings(),
            teacher=teacher,
            encoder=None,
            intake=intake,
            dtype=banks[0].dtype,
            shard_rows=banks[0].manifest["shard_rows"],
            reuse=tuple(banks),
        )
    )


def add_to_bank(config: BankAddConfig) -> Path:
    """Write the bank that holds what `config.bank` and further sources hold, and return its folder.

    Raises:
        UsageError: if the teacher or its precision is another than the bank's, naming both.
    """
    bank, out = Bank.open(config.bank), Path(config.out)
    recorded = teacher_of(bank)
    name, revision = find_teacher(bank, config.teacher)
    encoder, teacher = load_encoder(
        config,
        name,
        config.teacher_revision or revision,
        out,
        bank.dtype,
        prompt=recorded.prompt,
        auto_precision=recorded.precision,
    )
    check_same_teacher(bank, teacher, remedy=f"leave out {setting('precision')}")
    settings = {**config.settings(), "teacher": teacher.name, "teacher_revision": teacher.revision}

    def intake() -> Intake:
        source = open_source(config)
        bad = bad_of([bank])
        samples = samples_with(bank, source, out / f".{ADDED}.tmp", bad)
        return Intake(samples, fingerprint([bank.fingerprint, source.fingerprint]), bad, base=bank)

    return write_bank(
        Plan(
            out=out,
            settings=same_teacher_settings(out, settings, teacher),
            teacher=teacher,
            encoder=encoder,
            intake=intake,
            dtype=bank.dtype,
            shard_rows=bank.manifest["shard_rows"],
            reuse=(bank,),
            part=config.part(),
        )
    )


def samples_with(bank: Bank, source: Source, folder: Path, bad: BadSamples) -> Iterator[Sample]:
    """The samples of `bank` with the captions that `source` has for their images, then its other samples.

    The source is laid down as a table of its own in `folder` first: it may name images in another order.
    """
    shutil.rmtree(folder, ignore_errors=True)  # of a killed run
    folder.mkdir()
    try:
        collect(Intake(source, source.fingerprint, source.bad), folder)
        bad.merge(source.bad)
        yield from joined([bank, Table(folder)])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def teacher_of_all(banks: list[Bank]) -> TeacherFacts:
    """What the manifest of a bank out of `banks` says of their teacher: what the first one's does.

    A bank that knows a Hub teacher by the same name may have pinned its revision where the first did not: with equal
    fingerprints it was the same then, and will be the one to find when the Hub has a newer one. Of two revisions pinned
    the first is as good as the other.
    """
    teacher, *others = map(teacher_of, banks)
    pinned = [other.revision for other in others if other.name == teacher.name and other.revision is not None]
    return teacher if teacher.revision is not None or not pinned else dataclasses.replace(teacher, revision=pinned[0])


def bad_of(banks: list[Bank]) -> BadSamples:
    """What was bad in the sources of `banks`; it was weighed when they were built, and stops nothing now."""
    bad = BadSamples(1.0)
    for bank in banks:
        bad.merge(bank.manifest["bad_samples"])
    return bad


def joined(tables: Sequence[Table]) -> Iterator[Sample]:
    """The samples of several tables one after another; captions of one image are gathered in its first sample."""
    indexes = [image_index(table) for table in tables[1:]]
    taken = [np.zeros(table.num_samples, bool) for table in tables]
    for number, table in enumerate(tables):
        for block in blocks(table.num_samples):
            hashes = image_hashes(table, block)
            matches = {later: indexes[later - 1].lookup(hashes) for later in range(number + 1, len(tables))}
            for place, i in enumerate(block):
                if taken[number][i]:
                    continue
                sample = table.sample(i)
                for later, found in matches.items():
                    if (j := found[place]) >= 0 and not taken[later][j]:
                        taken[later][j] = True
                        sample = with_captions(sample, tables[later].sample(j))
                yield sample


def with_captions(sample: Sample, other: Sample) -> Sample:
    """`sample` with the captions of `other` that it does not have already.

    >>> from llm2clip.data.sample import ImageRef
    >>> a = Sample("a", ImageRef("a.jpg"), {"short": ("a disc",)})
    >>> b = Sample("b", ImageRef("a.jpg"), {"short": ("a disc", "one disc"), "zh": ("圆",)})
    >>> dict(with_captions(a, b).captions)
    {'short': ('a disc', 'one disc'), 'zh': ('圆',)}
    """
    captions = dict(sample.captions)
    for kind, texts in other.captions.items():
        have = captions.get(kind, ())
        captions[kind] = (*have, *(text for text in texts if text not in have))
    return Sample(sample.id, sample.image, captions)


def image_index(table: Table) -> HashIndex:
    """From the hash of where an image lies to its (first) sample."""
    index = HashIndex()
    for block in blocks(table.num_samples):
        hashes, first = np.unique(image_hashes(table, block), axis=0, return_index=True)
        new = index.lookup(hashes) < 0
        index.insert(hashes[new], first[new] + block.start)
    return index


def image_hashes(table: Table, samples: range) -> Hashes:
    """The hash of where each sample's image lies."""
    images = (table.image(i) for i in samples)
    return as_hashes([digest(os.fsencode(f"{p.path}\0{p.offset}\0{p.length}\0{p.column}")) for p in images])
