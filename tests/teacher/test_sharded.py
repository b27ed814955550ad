"""Weights sharded over processes by accelerate's FSDP2: the same teacher as without, killed or not.

Accelerate shards on GPUs only; the processes here are told that theirs are some.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ACCELERATE = """
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_state_dict_type: SHARDED_STATE_DICT
num_processes: 2
use_cpu: true
"""
SCRIPT = """
import json, os, sys
from pathlib import Path
from unittest import mock
import accelerate.state as state
from accelerate.utils import DistributedType
from transformers import TrainerCallback
from llm2clip.teacher.config import TeacherConfig
from llm2clip.teacher import train, trainer

settings = json.loads(sys.argv[1])
kill_at = settings.pop("kill_at", None)
init = state.AcceleratorState.__init__

def pretend(self, *args, **kwargs):
    state.PartialState(cpu=True)
    kind = state.PartialState._shared_state["distributed_type"]
    state.PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    init(self, *args, **kwargs)
    state.PartialState._shared_state["distributed_type"] = kind

class Watch(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        assert trainer.is_sharded(model)
        if state.global_step == kill_at:
            os._exit(9)

original = trainer.run_trainer
def watched(trainer, **options):
    trainer.add_callback(Watch())
    original(trainer, **options)

settings = {**settings, "data": tuple(settings["data"]), "out": Path(settings["out"])}
state.AcceleratorState.__init__ = pretend
with mock.patch.object(trainer, "run_trainer", watched), mock.patch("llm2clip.teacher.mntp.run_trainer", watched):
    train.train_teacher(TeacherConfig(**settings))
"""
SETTINGS = {
    "steps": 6,
    "save_every": 2,
    "batch_size": 6,
    "precision": "fp32",
    "learning_rate": 1e-2,
    "lora_dropout": 0.0,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch_size": 4, "gradient_checkpointing": True},
        {"tuning": "full"},
        {"mntp": True, "mntp_steps": 4, "mntp_batch_size": 8},
    ],
    ids=["lora", "full", "mntp"],
)
def test_a_sharded_run_equals_a_whole_one(changes, tmp_path, tiny_llm, images_csv):
    from llm2clip.teacher.config import TeacherConfig
    from llm2clip.teacher.train import train_teacher

    script, config = tmp_path / "run.py", tmp_path / "accelerate.yaml"
    script.write_text(SCRIPT)
    config.write_text(ACCELERATE)

    def sharded(name: str, **more: object) -> Path:
        out = tmp_path / name
        settings = {"data": [str(images_csv)], "model": str(tiny_llm), "out": str(out), **SETTINGS, **changes, **more}
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
        command = [sys.executable, *launcher, str(script), json.dumps(settings)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert (done.returncode != 0) == ("kill_at" in more), done.stderr[-3000:]
        return out

    whole = TeacherConfig(
        data=(str(images_csv),), model=str(tiny_llm), out=tmp_path / "whole", **{**SETTINGS, **changes}
    )
    expected, found = (load_file(out / "model.safetensors") for out in (train_teacher(whole), sharded("sharded")))
    assert max(float((expected[name] - found[name]).abs().max()) for name in expected) < 1e-4
    if "tuning" in changes:
        return
    sharded("killed", kill_at=3)
    resumed = sharded("killed")
    assert (resumed / "model.safetensors").read_bytes() == (tmp_path / "sharded" / "model.safetensors").read_bytes()
