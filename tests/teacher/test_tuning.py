"""What trains, also where the weights are sharded over processes (FSDP2)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llm2clip.teacher.model import llm, llm_as_encoder
from llm2clip.teacher.tuning import add_lora, is_sharded, load_trained, set_attention_dropout, trained_weights

SHARDED = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from llm2clip.teacher.loss import CaptionLoss
from llm2clip.teacher.model import llm, llm_as_encoder
from llm2clip.teacher.tuning import add_lora, is_sharded, load_trained, trained_weights

TEXTS = ["a red disc", "a large blue square", "there is a small disc", "two plain shape are near"]

def start(folder):
    encoder = llm_as_encoder(folder, dtype="float32", device="cpu")
    add_lora(encoder, rank=4, dropout=0.0)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.05)
    return encoder.train()

def step(encoder, texts, micro):
    optimizer = torch.optim.SGD([w for w in encoder.parameters() if w.requires_grad], lr=0.1)
    features = [encoder.preprocess(texts), encoder.preprocess(texts[::-1])]
    CaptionLoss(encoder, scale=20.0, micro_batch_size=micro)(features, None).backward()
    optimizer.step()

dist.init_process_group("gloo")
rank = dist.get_rank()
for micro in (None, 1):
    encoder = start(sys.argv[1])
    mesh = init_device_mesh("cpu", (2,))
    for layer in llm(encoder).base_model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(encoder, mesh=mesh)
    assert is_sharded(encoder)
    before = trained_weights(encoder)
    step(encoder, TEXTS[2 * rank : 2 * rank + 2], micro)
    after = trained_weights(encoder)
    load_trained(encoder, before)
    assert all(torch.equal(trained_weights(encoder)[name], before[name]) for name in before)
    torch.save((before, after), f"{sys.argv[2]}/{rank}-{micro}.pt")
dist.destroy_process_group()
"""


def test_trained_weights_go_out_and_back(llm_of):
    encoder = llm_as_encoder(llm_of("llama"), dtype="float32")
    add_lora(encoder, rank=2)
    weights = trained_weights(encoder)
    assert weights and all("lora_" in name for name in weights) and not is_sharded(encoder)
    other = llm_as_encoder(llm_of("llama"), dtype="float32")
    add_lora(other, rank=2, seed=9)
    assert any(not torch.equal(trained_weights(other)[name], weights[name]) for name in weights)
    load_trained(other, weights)
    assert all(torch.equal(trained_weights(other)[name], weights[name]) for name in weights)


def test_adapters_are_drawn_from_the_seed_and_leave_other_draws_alone(llm_of):
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(7)
        encoder = llm_as_encoder(llm_of("llama"), dtype="float32")
        state = torch.get_rng_state()
        add_lora(encoder, rank=2, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        drawn.append(torch.cat([weight.flatten() for weight in trained_weights(encoder).values()]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_attention_dropout_is_set_in_every_layer_and_not_in_the_config(llm_of):
    model = llm(llm_as_encoder(llm_of("llama"), dtype="float32"))
    set_attention_dropout(model, 0.25)
    assert [layer.self_attn.attention_dropout for layer in model.layers] == [0.25, 0.25]
    assert model.config.attention_dropout == 0


@pytest.mark.slow
def test_a_sharded_step_equals_a_whole_one(llm_of, tmp_path):
    """Two processes with half of the texts each, against one with all."""
    from llm2clip.teacher.loss import pair_loss

    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(script), str(llm_of("llama")), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = {path.stem: torch.load(path) for path in Path(tmp_path).glob("*.pt")}
    assert len(results) == 4
    before, after = results["0-None"]
    for other in results.values():
        for name, weight in after.items():
            torch.testing.assert_close(other[1][name], weight, rtol=1e-3, atol=1e-6)
    encoder = llm_as_encoder(llm_of("llama"), dtype="float32")
    add_lora(encoder, rank=4, dropout=0.0)
    load_trained(encoder, before)
    encoder.train()
    texts = ["a red disc", "a large blue square", "there is a small disc", "two plain shape are near"]
    positives = [*texts[1::-1], *texts[:1:-1]]  # of each process the other way round
    vectors = [encoder(encoder.preprocess(column))["sentence_embedding"] for column in (texts, positives)]
    pair_loss(vectors, None, scale=20.0).backward()
    for name, weight in encoder.named_parameters():
        if weight.requires_grad:
            assert weight.grad is not None
            torch.testing.assert_close(after[name], before[name] - 0.1 * weight.grad, rtol=1e-3, atol=1e-6)
