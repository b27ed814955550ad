"""The softmax loss with captions passed around in a ring: what the library does not do, to be measured beside it.

Two rounds, as every pass over captions is one: the first gathers sums of exponentials (those of a caption travel with
it), the second carries captions, their sums and their growing gradient. A process holds the captions of one process
at a time, but each vector travels three times where gathering moves it twice.
`python -m benchmarks.ring {gathered,ring} NUM_PAIRS MEETING_FILE RANK`, on two processes.
"""

from __future__ import annotations

import json
import math
import sys
import time

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.loss import inputs, memory
from llm2clip.student.loss import CPU_TILE, contrastive_loss


def ring_loss(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of the whole batch, and this process's gradients by its images and captions (times processes)."""
    world, size = dist.get_world_size(), len(image) * dist.get_world_size()
    blocks = [slice(i, min(i + CPU_TILE, len(image))) for i in range(0, len(image), CPU_TILE)]
    own = (image * text).sum(dim=1) * scale
    image_lse, text_lse, block = torch.full_like(own, -math.inf), torch.full_like(own, -math.inf), text
    for _ in range(world):
        for rows in blocks:
            for columns in blocks:
                scores = (image[rows] * scale) @ block[columns].T
                image_lse[rows] = torch.logaddexp(image_lse[rows], scores.logsumexp(dim=1))
                text_lse[columns] = torch.logaddexp(text_lse[columns], scores.logsumexp(dim=0))
        block, text_lse = passed_on(block), passed_on(text_lse)
    loss = (image_lse + text_lse - 2 * own).sum() / (2 * size)
    dist.all_reduce(loss)
    by_image, by_text = -text / size, -image / size
    for _ in range(world):
        for rows in blocks:
            for columns in blocks:
                scores = (image[rows] * scale) @ block[columns].T
                by_score = (scores - image_lse[rows, None]).exp_()
                by_score += (scores - text_lse[columns]).exp_()
                by_score /= 2 * size
                by_image[rows].addmm_(by_score, block[columns])
                by_text[columns].addmm_(by_score.T, image[rows])
        block, text_lse, by_text = passed_on(block), passed_on(text_lse), passed_on(by_text)
    return loss, by_image.mul_(scale * world), by_text.mul_(scale * world)


def passed_on(rows: Tensor) -> Tensor:
    """What the process before this one had, while this one's goes to the next."""
    rank, world, received = dist.get_rank(), dist.get_world_size(), torch.empty_like(rows)
    sending = dist.isend(rows.contiguous(), (rank + 1) % world)
    dist.recv(received, (rank - 1) % world)
    sending.wait()
    return received


def main(variant: str, num_pairs: int, meeting_file: str, rank: int) -> None:
    """Measure one variant once and print it, on the first process."""
    dist.init_process_group("gloo", f"file://{meeting_file}", rank=rank, world_size=2)
    image, text, scale = inputs(2 * num_pairs, "cpu")
    mine = slice(rank * num_pairs, (rank + 1) * num_pairs)
    image, text = (x.detach()[mine].clone().requires_grad_() for x in (image, text))
    contrastive_loss(image[:64], text[:64], scale)
    dist.barrier()
    before, start = memory("cpu"), time.perf_counter()
    if variant == "ring":
        with torch.no_grad():
            loss, by_image, _ = ring_loss(image, text, scale)
    else:
        loss = contrastive_loss(image, text, scale)
        loss.backward()
        by_image = image.grad
    dist.barrier()
    seconds, extra = time.perf_counter() - start, memory("cpu", highest=True) - before
    if rank == 0:
        result = {"seconds": seconds, "extra_bytes": extra, "loss": loss.item(), "image": by_image.norm().item()}
        print(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
