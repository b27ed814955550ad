"""The log: a line a step, resumed without repeats, and a stop at a loss that is no number."""

import json

import pytest
import torch

from llm2clip.errors import LLM2CLIPError, UsageError
from llm2clip.journal import FLUSH_EVERY, Journal, find_tracker, flat


class OneProcess:
    """What the journal needs of an accelerator."""

    is_main_process = True
    trackers = ()
    scaler = None

    def __init__(self) -> None:
        self.logged = []

    def log(self, values, step) -> None:
        self.logged.append((step, values))


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_line_a_step_and_no_repeats_after_a_kill(tmp_path) -> None:
    accelerator = OneProcess()
    journal = Journal(accelerator, tmp_path, total=20, step=0, images=8)
    for step in range(1, FLUSH_EVERY + 3):
        journal.add(step, {"loss": torch.tensor(1 / step), "scale": 14.0})
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, FLUSH_EVERY + 1)), "the rest waits"
    journal.flush()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')  # torn by a kill
    journal = Journal(accelerator, tmp_path, total=20, step=4, images=8)
    journal.add(5, {"loss": torch.tensor(0.5), "scale": 14.0})
    journal.note(5, {"val": 0.25})
    journal.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 5]
    assert lines(tmp_path)[1]["loss"] == 0.5 and lines(tmp_path)[-1] == {"step": 5, "val": 0.25}
    assert accelerator.logged[0][0] == 1 and accelerator.logged[0][1]["loss"] == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step(tmp_path, bad) -> None:
    journal = Journal(OneProcess(), tmp_path, total=20, step=0, images=8)
    journal.add(1, {"loss": torch.tensor(2.0)})
    journal.add(2, {"loss": torch.tensor(bad)})
    with pytest.raises(LLM2CLIPError, match=r"loss is (nan|inf) at step 2"):
        journal.flush()
    assert [line["step"] for line in lines(tmp_path)] == [1], "what was good is written"


def test_trackers_are_ended_with_the_run(tmp_path) -> None:
    class Tracker:
        ended = False

        def finish(self) -> None:
            self.ended = True

    accelerator = OneProcess()
    accelerator.trackers = [Tracker(), Tracker()]
    journal = Journal(accelerator, tmp_path, total=1, step=0, images=8)
    journal.add(1, {"loss": torch.tensor(1.0)})
    journal.close()
    assert [tracker.ended for tracker in accelerator.trackers] == [True, True]
    assert [line["step"] for line in lines(tmp_path)] == [1]


def test_trackers(monkeypatch) -> None:
    assert find_tracker("none") == []
    with pytest.raises(UsageError, match="pip install trackio"):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        find_tracker("trackio")
    assert find_tracker("auto") == []


def test_settings_for_trackers_are_plain_and_can_be_written() -> None:
    assert flat({"a": None, "b": 1, "c": True, "d": ["圆"], "e": {}}) == {
        "a": None,
        "b": 1,
        "c": True,
        "d": '["圆"]',
        "e": "{}",
    }
    told = flat({"out": "b\udce9", "bank": ["b\udce9"]})
    assert [value.encode() for value in told.values()] == [b"b\\udce9", b'["b\\udce9"]'], "a name that is no UTF-8"


def test_a_gradient_that_is_no_number_stops_the_run_unless_a_scaler_skips_it(tmp_path) -> None:
    accelerator = OneProcess()
    journal = Journal(accelerator, tmp_path, total=20, step=0, images=8)
    journal.add(1, {"loss": torch.tensor(1.0), "grad_norm": torch.tensor(2.0)})
    journal.add(2, {"loss": torch.tensor(1.0), "grad_norm": torch.tensor(float("inf"))})
    with pytest.raises(LLM2CLIPError, match="gradient norm is inf at step 2"):
        journal.flush()
    assert [line["step"] for line in lines(tmp_path)] == [1]
    accelerator.scaler = object()
    journal.add(3, {"loss": torch.tensor(1.0), "grad_norm": torch.tensor(float("inf"))})
    journal.flush()
    assert lines(tmp_path)[-1] == {**lines(tmp_path)[-1], "step": 3, "grad_norm": None}


def test_values_at_hand_keep_their_digits_and_are_looked_at_too(tmp_path) -> None:
    journal = Journal(OneProcess(), tmp_path, total=3, step=0, file="mntp.jsonl", digits=17)
    journal.note(1, {"loss": 2.0, "learning_rate": 1 / 3})
    with pytest.raises(LLM2CLIPError, match="loss is nan at step 2"):
        journal.note(2, {"loss": float("nan"), "learning_rate": 1 / 3})
    text = (tmp_path / "mntp.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()] == [{"step": 1, "loss": 2.0, "learning_rate": 1 / 3}]
    assert not (tmp_path / "log.jsonl").exists()


def test_other_processes_write_nothing_and_stop_with_the_first(tmp_path, caplog) -> None:
    other = OneProcess()
    other.is_main_process = False
    with caplog.at_level("INFO", logger="llm2clip"):
        journal = Journal(other, tmp_path, total=3, step=0, images=8)
        journal.add(1, {"loss": torch.tensor(2.0)})
        journal.flush()
        journal.advance(1)
        with pytest.raises(LLM2CLIPError, match="loss is inf at step 2"):
            journal.note(2, {"loss": float("inf")})
        journal.close()
    assert not list(tmp_path.iterdir()) and not caplog.text and not other.logged


def test_the_progress_goes_on_from_the_step_and_ends(tmp_path, caplog) -> None:
    with caplog.at_level("INFO", logger="llm2clip"):
        journal = Journal(OneProcess(), tmp_path, total=9, step=7, description="train teacher")
        journal.note(8, {"loss": 2.0})
        journal.advance(9)
        journal.close()
    told = [record.getMessage() for record in caplog.records]
    assert told[0] == "train teacher: 7/9 steps" and told[-1].startswith("train teacher: 9/9 steps")
