"""What we need of other libraries and they offer only under private names: here, and nowhere else.

Each function says why no public way does it and which versions it was read in, so that an upgrade is one file to look
at. Libraries are imported where they are used: this module is light.
"""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware (AVX512_BF16, AMX, or Arm's).

    `torch.cpu.get_capabilities` tells; before it there were only private questions, one an instruction set. Read in
    torch 2.14, which has it.
    """
    import torch

    if not hasattr(torch.cpu, "get_capabilities"):
        return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    has = torch.cpu.get_capabilities()
    return any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def attention_of(model: Any) -> str:
    """The attention that a transformers model runs, to be given back to `set_attn_implementation`, which has no twin.

    Read in transformers 5.10.1 and 5.24.
    """
    return str(model.config._attn_implementation)


def forget_precision() -> None:
    """Let accelerate forget the precision of a run that ended in this process; it refuses a second one of another.

    Read in accelerate 1.10 and 1.15, which offer no way but a fresh process.
    """
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()


def bicubic_into(out: Any, pixels: Any) -> None:
    """Resize pixels [1, C, h, w] into `out` [1, C, H, W] as torch's `interpolate` does, bicubic and antialiased.

    That makes a tensor of its own, and the copy of it into a batch costs a loader 3 to 10 % of its speed. Read in torch
    2.9 and 2.14.
    """
    import torch

    torch.ops.aten._upsample_bicubic2d_aa.out(pixels, out.shape[2:], False, None, None, out=out)


def take_back_signal_handler() -> None:
    """Take back the handler of SIGCHLD by which torch raises anywhere in this process when a loader's worker dies.

    A DataLoader sets it at the first use of workers and never takes it back; torch has no switch for it. The loader
    notices a death by itself, at the latest five seconds after it waits for that worker, and says it in one line. A
    handler of anybody else stays. Read in torch 2.14.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    if (
        getattr(handler, "__module__", "").startswith("torch.")
        and threading.current_thread() is threading.main_thread()
    ):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


class OwnWeights:
    """A transformers Trainer whose checkpoints are read by its `load_weights`; name it before the Trainer.

    `train(resume_from_checkpoint=...)` reads the weights by a private method, and has no callback in its place. Read in
    transformers 5.10.1 and 5.24, sentence-transformers 6.0 and 6.2.
    """

    def load_weights(self, folder: Path, model: Any = None) -> None:
        """Read the weights of a checkpoint into `model`, by default the trainer's own."""
        raise NotImplementedError

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.load_weights(Path(resume_from_checkpoint), model)
