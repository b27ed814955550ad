"""The adaptor by hand, its size, and the norm of its input."""

import pytest
import torch

from llm2clip.student.adaptor import Adaptor, AdaptorBlock


def size(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_released_sizes() -> None:
    with torch.device("meta"):
        of_8b, small, blocks = Adaptor(4096, 1280), Adaptor(3, 2, num_blocks=1), Adaptor(2048, 1280).blocks
    assert size(of_8b) == 273_769_728  # "273.8M" of the released 8B students
    # a block of width d: a norm of 2 d, d to 2 d and back; at the end a norm and the projection
    assert size(small) == (6 + (18 + 6) + (18 + 3)) + 6 + (6 + 2)
    matrices = sum(parameter.numel() for parameter in blocks.parameters() if parameter.ndim == 2)
    assert matrices == 67_108_864  # the paper's "67.1M" for a 1B teacher: the blocks' matrices alone


def test_block_by_hand() -> None:
    block = AdaptorBlock(2)
    with torch.no_grad():
        block.expand.weight.zero_()
        block.expand.bias.copy_(torch.tensor([1.0, -1.0, 0.0, 2.0]))
        block.shrink.weight.copy_(torch.eye(2, 4))
        block.shrink.bias.copy_(torch.tensor([0.5, 0.0]))
    x = torch.tensor([[3.0, 5.0]])
    gelu = torch.nn.functional.gelu(torch.tensor([1.0, -1.0]))
    torch.testing.assert_close(block(x), x + gelu + torch.tensor([0.5, 0.0]))


def test_length_of_the_teacher_vector_does_not_matter() -> None:
    torch.manual_seed(0)
    adaptor = Adaptor(8, 4, num_blocks=1)
    x = torch.randn(3, 8)
    torch.testing.assert_close(adaptor(x), adaptor(torch.tensor([[10.0], [0.1], [3.0]]) * x))
    torch.testing.assert_close(adaptor(x)[1:2], adaptor(x[1:2]))  # nor do the other vectors
    assert adaptor(x.half()).dtype == torch.float32


@pytest.mark.parametrize("num_blocks", [1, 4])
def test_every_parameter_gets_a_gradient(num_blocks: int) -> None:
    adaptor = Adaptor(8, 4, num_blocks=num_blocks)
    adaptor(torch.randn(3, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adaptor.parameters())
