"""Building banks: once each, resumed anywhere, shared, refused when something else changed."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import logging
import os
import re
import shutil
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llm2clip import progress
from llm2clip.bank import build as build_module
from llm2clip.bank import encoder
from llm2clip.bank.build import build_bank
from llm2clip.bank.config import BankAddConfig, BankConfig
from llm2clip.bank.merge import add_to_bank
from llm2clip.bank.reader import Bank
from llm2clip.bank.reuse import teacher_of
from llm2clip.bank.vectors import ShardBuffer
from llm2clip.bank.verify import cosines
from llm2clip.errors import LLM2CLIPError, TooManyBadSamples, UsageError
from llm2clip.teacher.model import load_teacher

Files = Callable[[Path], dict[str, bytes]]


def test_a_bank_is_the_teacher_of_its_captions(bank: Bank, tiny_llm: Path) -> None:
    teacher = load_teacher(tiny_llm, device="cpu")
    expected = teacher.encode([bank.text(row) for row in range(120)])
    assert cosines(bank.vectors(range(120)).astype(np.float32), expected).min() > 0.99999
    assert bank.tokens([0, 1]).tolist() == [6, 16]


def test_equal_captions_are_encoded_once(tmp_path: Path, write_captions, build, encoded: list[int]) -> None:
    write_captions(tmp_path / "a.csv", 30, columns={"raw": 1})
    (tmp_path / "a.csv").write_text("image,raw\n" + "".join(f"{i}.jpg,a red disc {i % 3}\n" for i in range(30)))
    bank = build(tmp_path / "a.csv", tmp_path / "bank")
    assert (bank.num_samples, bank.num_rows, sum(encoded)) == (30, 3, 3)
    assert bank.rows(4).tolist() == [1]


def test_the_same_command_again_does_nothing(captions_csv, build, tmp_path, encoded, files_of: Files, caplog) -> None:
    build(captions_csv, tmp_path / "bank")
    before = files_of(tmp_path / "bank")
    encoded.clear()
    with caplog.at_level(logging.INFO, "llm2clip"):
        build(captions_csv, tmp_path / "bank")
    assert caplog.text.endswith("is already complete; to make it anew, remove it or give another out\n") and not encoded
    assert files_of(tmp_path / "bank") == before


def test_equal_banks_are_equal_bytes_wherever_they_lie(bank: Bank, captions_csv, build, tmp_path, files_of) -> None:
    again = build(captions_csv, tmp_path / "elsewhere" / "bank")
    assert files_of(again.folder) == files_of(bank.folder)
    assert str(tmp_path) not in (again.folder / "manifest.json").read_text()


@pytest.mark.parametrize(
    ("lost", "again"),
    [("vectors/00003.json", [16]), ("vectors/vectors.npy", [*[16] * 7, 8]), ("vectors/tokens.npy", [*[16] * 7, 8])],
)
def test_a_lost_shard_is_rebuilt_alone(
    lost: str, again: list[int], bank: Bank, captions_csv, build, tmp_path, encoded, files_of
) -> None:
    """All are lost with one of the arrays."""
    copy = Path(shutil.copytree(bank.folder, tmp_path / "bank"))
    (copy / lost).unlink()
    build(captions_csv, copy)
    assert encoded == again
    assert files_of(copy) == files_of(bank.folder)


@pytest.mark.parametrize("lost", ["samples.arrow", "texts.arrow", "facts.json"])
def test_a_lost_table_is_collected_again(lost, bank: Bank, captions_csv, build, tmp_path, encoded, files_of) -> None:
    copy = Path(shutil.copytree(bank.folder, tmp_path / "bank"))
    (copy / "table" / lost).unlink()
    build(captions_csv, copy)
    assert encoded == []
    assert files_of(copy) == files_of(bank.folder)


def test_another_teacher_is_refused_naming_both(bank: Bank, captions_csv, build, tmp_path, tiny_llm) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    other = Path(shutil.copytree(tiny_llm, tmp_path / "other"))
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.model.norm.weight += 0.5
    model.save_pretrained(other)
    with pytest.raises(UsageError, match="another teacher") as error:
        build(captions_csv, bank.folder, teacher=str(other))
    assert bank.teacher_fingerprint in str(error.value) and str(other) in str(error.value)


def test_the_same_teacher_from_another_place_goes_on(captions_csv, build, tmp_path, tiny_llm, encoded) -> None:
    build(captions_csv, tmp_path / "bank")
    (tmp_path / "bank" / "vectors" / "00000.json").unlink()
    encoded.clear()
    build(captions_csv, tmp_path / "bank", teacher=str(shutil.copytree(tiny_llm, tmp_path / "moved")))
    assert encoded == [16]


def test_other_settings_are_refused(bank: Bank, captions_csv, build) -> None:
    with pytest.raises(UsageError, match="dtype was 'float16', now 'float32'"):
        build(captions_csv, bank.folder, dtype="float32")


def test_mistyped_sources_leave_nothing_in_the_way_of_the_right_ones(tmp_path: Path, build, captions_csv) -> None:
    with pytest.raises(UsageError, match=r"captoins\.csv"):
        build(captions_csv.with_name("captoins.csv"), tmp_path / "bank")
    assert not (tmp_path / "bank").exists()
    assert build(captions_csv, tmp_path / "bank").num_rows


def test_a_bank_that_came_to_no_table_is_begun_anew_with_other_settings(
    tmp_path: Path, build, write_captions, caplog
) -> None:
    write_captions(tmp_path / "a.csv", 10, columns={"raw": 3})
    (tmp_path / "3.jpg").unlink()
    with pytest.raises(TooManyBadSamples):
        build(tmp_path / "a.csv", tmp_path / "bank")
    assert (tmp_path / "bank" / "teacher.json").exists()
    caplog.set_level("INFO", "llm2clip")
    assert build(tmp_path / "a.csv", tmp_path / "bank", max_bad_fraction=0.2).num_samples == 9
    assert "an earlier run with other settings had come to no result; begun anew" in caplog.text
    with pytest.raises(UsageError, match=r"max_bad_fraction was 0\.2, now 0\.05; to go on give max_bad_fraction=0\.2"):
        build(tmp_path / "a.csv", tmp_path / "bank")


def test_changed_sources_are_refused(tmp_path: Path, build, write_captions) -> None:
    data = write_captions(tmp_path / "data" / "a.csv", 5, columns={"raw": 3})
    build(data, tmp_path / "bank")
    write_captions(data, 6, columns={"raw": 3})
    with pytest.raises(UsageError, match=r"sources .* changed .* bank add"):
        build(data, tmp_path / "bank")


def test_speed_settings_may_change(captions_csv, build, tmp_path, encoded) -> None:
    build(captions_csv, tmp_path / "bank", batch_tokens=64)
    (tmp_path / "bank" / "vectors" / "00000.json").unlink()
    encoded.clear()
    bank = build(captions_csv, tmp_path / "bank", batch_tokens=512)
    assert encoded == [16] and "batch_tokens" not in bank.manifest["config"]


def test_reuse_copies_what_is_known(bank: Bank, captions_csv, write_captions, build, tmp_path, encoded) -> None:
    folder = tmp_path / "data"
    data = write_captions(folder / "a.csv", 70, columns={"short_caption": 4, "long_caption": 14})
    more = build(data, tmp_path / "more", reuse=(bank.folder,))
    assert sum(encoded) == 20
    np.testing.assert_array_equal(more.vectors(range(120)), bank.vectors(range(120)))
    np.testing.assert_array_equal(more.tokens(range(120)), bank.tokens(range(120)))
    assert "reuse" not in more.manifest["config"]


def test_reuse_across_dtypes_and_prompts(bank: Bank, captions_csv, build, tmp_path, encoded) -> None:
    exact = build(captions_csv, tmp_path / "exact", dtype="float32")
    whole = exact.vectors(range(exact.num_rows))
    assert whole.dtype == np.float32 and not np.array_equal(whole, whole.astype(np.float16))  # not by way of float16
    encoded.clear()
    for dtype in ("float16", "bfloat16", "int8"):
        build(captions_csv, tmp_path / dtype, dtype=dtype, reuse=(exact.folder,))
    assert encoded == []
    with pytest.raises(UsageError, match="holds float16 vectors, which cannot become float32"):
        build(captions_csv, tmp_path / "worse", dtype="float32", reuse=(bank.folder,))
    with pytest.raises(UsageError, match="built with the prompt '', not 'this is '"):
        build(captions_csv, tmp_path / "prompted", prompt="this is ", reuse=(bank.folder,))


def test_reuse_of_another_precision_is_refused(bank: Bank, captions_csv, build, tmp_path, encoded) -> None:
    message = f"{bank.folder} was built in fp32, not bf16: .*; give precision='fp32', or leave it out of reuse"
    with pytest.raises(UsageError, match=message):
        build(captions_csv, tmp_path / "half", precision="bf16", reuse=(bank.folder,))
    assert not (tmp_path / "half").exists()  # else the same --out with the precision named would be refused, too
    build(captions_csv, tmp_path / "half", precision="fp32", reuse=(bank.folder,))
    assert encoded == []


def test_another_precision_is_refused(bank: Bank, captions_csv, tiny_llm, tmp_path, monkeypatch) -> None:
    """As when two machines, one without bf16, begin a bank at the same moment with `--precision auto`."""
    monkeypatch.setattr(build_module, "pick_precision", lambda precision, device: "fp32")
    begin = build_module._agree_on_teacher

    def late(plan, claims):
        begin(dataclasses.replace(plan, teacher=dataclasses.replace(plan.teacher, precision="bf16")), claims)
        begin(plan, claims)

    monkeypatch.setattr(build_module, "_agree_on_teacher", late)
    says = r"begun in bf16, and this process encodes in fp32.*give precision='bf16' to all"
    with pytest.raises(UsageError, match=says):
        build_bank(BankConfig(data=(str(captions_csv),), out=tmp_path / "bank", teacher=str(tiny_llm), device="cpu"))


@pytest.mark.parametrize("moment", range(11))
def test_the_disk_is_full_at(moment: int, captions_csv, build, bank, tmp_path, monkeypatch, files_of) -> None:
    """At any flush, of table, shards, facts or manifest: one line, and the same command goes on."""
    flush = os.fsync
    left = [moment * 3]  # of 33 flushes

    def full(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LLM2CLIPError, match="no space left"):
        build(captions_csv, tmp_path / "bank")
    monkeypatch.setattr(os, "fsync", flush)
    build(captions_csv, tmp_path / "bank")
    assert files_of(tmp_path / "bank") == files_of(bank.folder)


def test_a_full_disk_stops_cleanly_and_the_run_goes_on(
    captions_csv, build, tmp_path, monkeypatch, encoded, bank, files_of
) -> None:
    write = ShardBuffer.write

    def full(buffer):
        if len(encoded) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(buffer)

    monkeypatch.setattr(ShardBuffer, "write", full)
    with pytest.raises(LLM2CLIPError, match="no space left"):
        build(captions_csv, tmp_path / "bank")
    monkeypatch.setattr(ShardBuffer, "write", write)
    encoded.clear()
    build(captions_csv, tmp_path / "bank")
    assert sum(encoded) == 120 - 32
    assert files_of(tmp_path / "bank") == files_of(bank.folder)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """What was logged since the last look; 5 kB are free on the disk, and the first two batches count as early."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # no terminal
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=5000))
    monkeypatch.setattr(progress, "EARLY_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(progress, "LOG_EVERY_SECONDS", float("inf"))
    caplog.set_level(logging.INFO, "llm2clip")

    def look() -> list[str]:
        lines = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return lines

    return look


def test_size_and_time_left_are_said_before_and_while_it_is_built(captions_csv, build, tmp_path, said) -> None:
    build(captions_csv, tmp_path / "bank", batch_tokens=100)
    lines = said()
    collected = [line for line in lines if line.startswith("collect: ")]
    assert collected[0] == "collect: 0 samples" and collected[-1].startswith("collect: 60 samples")
    size, full, *encoded = lines[len(collected) :]
    assert size == (
        "120 captions of 60 samples, 120 distinct: 7.68 kB vectors of 32 x float16, 64 B each; 5 kB free on the disk"
    )
    assert full == "the disk will be full before the bank is whole: free 2.68 kB more"
    assert [re.sub(r"[\d.e+-]+/s|\d+ s left", "_", line) for line in encoded] == [
        "encode: 0/120 captions, 0 B of 7.68 kB",
        "encode: 6/120 captions, _, 384 B of 7.68 kB, _",  # six long ones of 16 tokens are a batch
        "encode: 8/120 captions, _, 512 B of 7.68 kB, _",
        "encode: 120/120 captions, _, 7.68 kB of 7.68 kB",
    ]


@pytest.mark.parametrize("ahead", [True, False])
def test_long_captions_count_for_more_of_the_time(ahead: bool, captions_csv, build, tmp_path, monkeypatch) -> None:
    """They come first in a shard; by their number alone a bank would seem to take several times as long."""
    advance, done = progress.Progress.advance, []

    def noted(self, count=1, *, work=None, note=""):
        done.append((count, work))
        advance(self, count, work=work, note=note)

    monkeypatch.setattr(progress.Progress, "advance", noted)
    if not ahead:  # a teacher that tokenises itself: by characters
        monkeypatch.setattr(encoder, "can_tokenise_ahead", lambda teacher: False)
    build(captions_csv, tmp_path / "bank", batch_tokens=100, shard_rows=120)
    batches = [(count, work) for count, work in done if work is not None]
    assert sum(count for count, _ in batches) == 120 == pytest.approx(sum(work for _, work in batches))
    assert batches[0][1] > 1.3 * batches[0][0] and batches[-1][1] < 0.7 * batches[-1][0]


def test_what_is_there_already_needs_no_room(captions_csv, build, bank, tmp_path, write_captions, said) -> None:
    copy = Path(shutil.copytree(bank.folder, tmp_path / "bank"))
    (copy / "vectors" / "00000.json").unlink()
    build(captions_csv, copy)
    size, *encoded = said()
    assert "7.68 kB vectors" in size and encoded[0].startswith("encode: ") and "of 7.68 kB" in encoded[0]
    data = write_captions(tmp_path / "new" / "a.csv", 2, columns={"raw": 6}, first=100)
    add_to_bank(BankAddConfig(data=(str(data),), bank=bank.folder, out=tmp_path / "more", device="cpu"))
    assert "will be full before the bank is whole: free 2.81 kB more" in "".join(said())  # a bank of its own


def test_bad_samples_are_listed(tmp_path: Path, write_captions, build) -> None:
    write_captions(tmp_path / "a.csv", 40, columns={"raw": 1})
    (tmp_path / "a.csv").write_text("image,raw\n" + "".join(f"{i}.jpg,{'' if i == 7 else i}\n" for i in range(40)))
    bank = build(tmp_path / "a.csv", tmp_path / "bank")
    assert bank.num_samples == 39
    assert bank.manifest["bad_samples"]["num_bad"] == 1


def test_a_missing_image_whose_name_is_no_utf8_is_listed(tmp_path: Path, write_captions, build) -> None:
    write_captions(tmp_path / "a.csv", 1, columns={"raw": 1})
    (tmp_path / "a.csv").write_bytes(b"image,raw\n0.jpg,a\nb\xe9.jpg,b\n")
    bad = build(tmp_path / "a.csv", tmp_path / "bank", max_bad_fraction=0.5).manifest["bad_samples"]
    assert bad["examples"] == {"missing file": [f"b\udce9.jpg: {tmp_path}/b\udce9.jpg"]}


def test_a_reader_in_another_thread_sees_a_whole_bank(bank: Bank) -> None:
    seen = []
    threads = [threading.Thread(target=lambda: seen.append(bank.vectors(range(120)).sum())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(seen)) == 1 and len(seen) == 4


def test_the_manifest_says_what_a_reader_needs(bank: Bank) -> None:
    manifest = json.loads((bank.folder / "manifest.json").read_text())
    assert manifest["kinds"] == {"short": {"samples": 60, "captions": 60}, "long": {"samples": 60, "captions": 60}}
    assert (manifest["dim"], manifest["dtype"], manifest["num_rows"]) == (32, "float16", 120)
    assert manifest["teacher"]["precision"] == "fp32" and manifest["teacher_fingerprint"]
    assert len(manifest["shards"]) == 8 and len(manifest["shards"][0]["sha256"]["vectors"]) == 64
    assert (manifest["format"], manifest["format_version"]) == ("llm2clip/bank", 2)
    assert manifest["num_tokens"] == int(bank.tokens(range(120)).sum())
    digests = {name: hashlib.sha256((bank.folder / name).read_bytes()).hexdigest() for name in manifest["table"]}
    assert {name: entry["sha256"] for name, entry in manifest["table"].items()} == digests
    assert set(digests) == {f"table/{path.name}" for path in (bank.folder / "table").iterdir()}
    assert {"out", "device", "shard"}.isdisjoint(manifest["config"])


def test_the_fingerprint_is_of_teacher_prompt_kinds_and_every_array(bank: Bank, tmp_path: Path) -> None:
    def fingerprint(*, facts=None, shards=None, **teacher: str) -> str:
        table = types.SimpleNamespace(folder=bank.folder, facts={**bank.facts, **(facts or {})})
        settings = {"teacher": dataclasses.replace(teacher_of(bank), **teacher), "dtype": bank.dtype, "shard_rows": 16}
        plan = build_module.Plan(out=tmp_path, settings={}, encoder=None, intake=lambda: None, **settings)
        build_module.write_bank_manifest(plan, table, shards or bank.manifest["shards"])
        return json.loads((tmp_path / "manifest.json").read_text())["fingerprint"]

    assert fingerprint() == fingerprint(name="elsewhere") == bank.fingerprint
    kinds = bank.facts["kinds"]
    found = [bank.fingerprint, fingerprint(prompt="this is "), fingerprint(fingerprint="0" * 16)]
    found.append(fingerprint(facts={"kinds": {"brief": kinds["short"], "long": kinds["long"]}}))
    for name in bank.facts["files"]:
        found.append(fingerprint(facts={"files": {**bank.facts["files"], name: {"sha256": "0" * 64}}}))
    for number, part in ((0, "vectors"), (7, "vectors"), (3, "tokens")):
        shards = json.loads(json.dumps(bank.manifest["shards"]))
        shards[number]["sha256"][part] = "0" * 64
        found.append(fingerprint(shards=shards))
    assert len(set(found)) == len(found) == 4 + 2 + 3


def test_a_vector_that_overflows_stops_the_build(captions_csv, build, tmp_path, monkeypatch) -> None:
    forward = encoder.CaptionEncoder._forward
    monkeypatch.setattr(encoder.CaptionEncoder, "_forward", lambda self, features: forward(self, features) * 1e6)
    with pytest.raises(LLM2CLIPError, match=r"the vector of caption '.*' overflows float16"):
        build(captions_csv, tmp_path / "bank")
    assert not list((tmp_path / "bank" / "vectors").glob("*.json"))


def test_settings_of_the_teacher_are_handed_on(captions_csv, tiny_llm, tmp_path, monkeypatch) -> None:
    asked, compiled = [], []

    def load(name, **options):
        asked.append((name, options))
        teacher = load_teacher(tiny_llm, device="cpu")
        teacher.prompts = {"query": "this is "}
        return teacher

    monkeypatch.setattr(build_module, "load_for_encoding", load)
    monkeypatch.setattr(encoder.CaptionEncoder, "_compile", lambda self: compiled.append(self))
    settings = {"teacher": "org/name", "teacher_revision": "v1", "precision": "fp32", "device": "cpu"}
    config = BankConfig(
        data=(str(captions_csv),),
        out=tmp_path / "bank",
        prompt_name="query",
        compile=True,
        batch_tokens=77,
        trust_remote_code=True,
        **settings,
    )
    made, facts = build_module.load_encoder(
        config, config.teacher, config.teacher_revision, config.out, config.dtype, prompt_name=config.prompt_name
    )
    assert (made.prompt, made.batch_tokens, facts.prompt, compiled) == ("this is ", 77, "this is ", [made])
    ((name, options),) = asked
    assert (name, options.pop("device").type) == ("org/name", "cpu")
    assert options == {"revision": "v1", "precision": "fp32", "trust_remote_code": True}
    compiled.clear()
    assert Bank.open(build_bank(config)).manifest["teacher"]["prompt"] == "this is " and len(compiled) == 1


def test_a_bank_begun_on_other_hardware_goes_on_in_its_precision(captions_csv, build, tmp_path, monkeypatch) -> None:
    from llm2clip import hub

    monkeypatch.setattr(hub, "cpu_has_bf16", lambda: False)
    config = {"precision": "auto", "out": tmp_path / "bank", "shard_rows": 64}
    with pytest.raises(LLM2CLIPError, match="is unfinished"):
        build(captions_csv, shard="0/2", **config)
    monkeypatch.setattr(hub, "cpu_has_bf16", lambda: True)
    assert build(captions_csv, shard="1/2", **config).manifest["teacher"]["precision"] == "fp32"
