"""The running average of weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from llm2clip.student.ema import Average


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))


def walk(net: nn.Module, step: int) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * (step + 1))


def test_it_is_the_recursion_by_hand() -> None:
    net = model()
    wanted = net[0].weight.detach().clone()
    average = Average(net, decay=0.4)
    for step, decay in enumerate([0.1, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 0.4]):
        walk(net, step)
        average.update(net)
        wanted = decay * wanted + (1 - decay) * net[0].weight.detach()
    torch.testing.assert_close(average.values["0.weight"], wanted)
    assert average.values["num_updates"].dtype == torch.int64 and int(average.values["num_updates"]) == 7


def test_applied_swaps_and_swaps_back() -> None:
    net = model()
    average = Average(net, decay=0.9)
    walk(net, 0)
    average.update(net)
    own = {name: value.clone() for name, value in net.state_dict().items()}
    mean = {name: value.clone() for name, value in average.values.items()}
    with average.applied(net):
        assert all(torch.equal(value, mean[name]) for name, value in net.state_dict().items())
        assert not torch.equal(net[0].weight, own["0.weight"])
    assert all(torch.equal(value, own[name]) for name, value in net.state_dict().items())
    with pytest.raises(KeyError), average.applied(net):
        raise KeyError
    assert all(torch.equal(value, own[name]) for name, value in net.state_dict().items())


def test_values_are_all_a_checkpoint_needs() -> None:
    net, other = model(), model()
    average = Average(net, decay=0.99)
    for step in range(5):
        walk(net, step)
        average.update(net)
    other.load_state_dict(net.state_dict())
    again = Average(other, decay=0.99)
    for name, value in average.values.items():
        again.values[name].copy_(value)
    for step in range(3):
        for net_, average_ in ((net, average), (other, again)):
            walk(net_, step)
            average_.update(net_)
    assert all(torch.equal(value, again.values[name]) for name, value in average.values.items())


def test_it_follows_the_model_into_shards(tmp_path: Path) -> None:
    """FSDP2 turns parameters into sharded tensors, and a run may begin its average before."""
    from torch.distributed.fsdp import fully_shard

    net, sharded = model(), model()
    average, sharded_average = Average(net, decay=0.9), Average(sharded, decay=0.9)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        fully_shard(sharded)
        for step in range(3):
            for net_, average_ in ((net, average), (sharded, sharded_average)):
                walk(net_, step)
                average_.update(net_)
        with average.applied(net), sharded_average.applied(sharded):
            for p, q in zip(net.parameters(), sharded.parameters(), strict=True):
                assert torch.equal(p, q.full_tensor())
    finally:
        torch.distributed.destroy_process_group()
