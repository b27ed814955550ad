"""The settings of `demo`, and the budgets they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llm2clip.config import check_choice, check_positive
from llm2clip.errors import UsageError

SIZES = ("small", "large")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The whole method on generated images with mini models: every stage, all arms, one page of results.

    OUT/report.html is the page. Nothing is downloaded.
    """

    out: Path
    """Folder of everything: images, teachers, banks, students, scores, the page; made if it is not there."""
    seed: int = 0
    """Source of all randomness: images, captions, order, fresh weights."""
    seeds: int = 1
    """Whole pipelines to run, with seeds SEED, SEED+1, ...; the page then shows mean and spread."""
    quick: bool = False
    """A run of under a minute with too little data and training to mean anything: shows that all parts work."""
    size: str = "small"
    """small: the mini models that come with the package; large: a mini LLM of some 50 million parameters and a larger
    mini CLIP, made first (minutes on a GPU, hours on a CPU), with more images and steps."""
    ablations: bool = False
    """Two more arms, which take a third longer: the raw LLM left causal (C-causal), and stage 1 on every weight
    (D-full). --quick has them, as it shows all parts."""
    processes: int = 2
    """Parts of the pipeline that run at once, each in a process of its own."""

    def __post_init__(self) -> None:
        """Check what can be checked without doing anything.

        Raises:
            UsageError: for an impossible value or combination.
        """
        check_choice("--size", self.size, SIZES)
        check_positive(seeds=self.seeds, processes=self.processes)
        if self.quick and self.size == "large":
            raise UsageError("--quick and --size large exclude each other; leave one out")

    def settings(self) -> dict[str, object]:
        """The fields that decide the results, JSON-ready."""
        return {name: getattr(self, name) for name in ("seed", "seeds", "quick", "size", "ablations")}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much of everything; all rates were chosen on validation scenes, see docs/lab-notes.md."""

    train: int = 4000
    """Training images; a tenth of them in the few-pairs arms."""
    test: int = 500
    """Test images."""
    per_class: int = 8
    """Scenes of one thing, of each of 64 colours and shapes, for classification."""
    batch_size: int = 128
    """Images a step, in every arm."""
    steps: int = 96
    """Steps of stage 2 and of B and B-long, with all pairs."""
    steps_tenth: int = 48
    """The same with a tenth of the pairs."""
    teacher_steps: int = 40
    """Steps of stage 1."""
    teacher_batch: int = 96
    """Pairs of captions a step of stage 1."""
    lora_rate: float = 2e-3
    """Learning rate of stage 1 with LoRA."""
    full_rate: float = 2e-3
    """Learning rate of stage 1 with full fine-tuning."""
    student_rate: float = 2e-3
    """Learning rate of stage 2 (Muon scaled as AdamW)."""
    adaptor_rate: float = 2e-3
    """Learning rate of the adaptor and the other fresh parts."""
    clip_rate: float = 0.01
    """Muon's learning rate of B and B-long; AdamW's is a twentieth."""
    texts: int = 24_000
    """Captions without images, for the laboratory's arms that read them."""
    dim: int = 256
    """Width of the shared space of the students."""


BUDGETS = {
    "small": Budget(),
    "quick": Budget(
        train=160,
        test=50,
        per_class=1,
        batch_size=16,
        steps=3,
        steps_tenth=2,
        teacher_steps=2,
        teacher_batch=16,
        texts=60,
        dim=32,
    ),
    "large": Budget(
        train=40000, test=2000, batch_size=512, steps=2000, steps_tenth=1000, teacher_steps=1000, teacher_batch=256
    ),
}
