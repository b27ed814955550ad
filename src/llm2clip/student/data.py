"""Images and the teacher's vectors of their captions, drawn from banks: any part of any batch, always the same.

Letters: B images, m captions of each, T teacher width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from llm2clip.bank.reader import Bank
from llm2clip.data.bad import BadImage
from llm2clip.errors import LLM2CLIPError, SourceError, setting
from llm2clip.student.mix import check_banks, check_batch_size, choose_captions, kind_weights, open_order, wanted_kinds
from llm2clip.student.order import Ints, key_of, uniforms
from llm2clip.student.pixels import MIN_CROP, NUM_DRAWS
from llm2clip.student.transform import ImageTransform

MAX_SUBSTITUTES = 100
"""Samples tried in the place of a bad one before the run stops."""
GROUP_PIXELS = 1 << 21
"""Images are decoded until they have so many pixels, and then resized: in turns, image by image, each of the two steps
would find its code and what it needs gone from the processor's caches, which costs a sixth of the speed."""
NO_CAPTION = "no wanted caption"
BadOne = tuple[str, str, str]
"""Sample id, cause, detail."""
Found = tuple[Ints, Image.Image]
"""Rows of the captions to take of a sample, and its image."""


@dataclass
class Batch:
    """Images, each with the teacher's vectors of m of its captions (1, unless told otherwise).

    Attributes:
        packed: uint8 [B, H, W, 4], the images as Pillow and torch's resize keep them, the fourth byte without
            meaning: to drop it for each image would cost the loader a tenth of its speed.
        text_embeds: [B * m, T], float16 or float32 as the bank gives them; the captions of an image follow each other.
        rows: int64 [B * m], the captions' rows, counted on through all banks.
        samples: int64 [B], the image's sample, counted on through all banks.
        bad: samples that could not be used and were replaced.
    """

    packed: Tensor
    text_embeds: Tensor
    rows: Tensor
    samples: Tensor
    bad: list[BadOne] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def pixels(self) -> Tensor:
        """The images, uint8 [B, 3, H, W], a view; the student normalises them."""
        return self.packed.permute(0, 3, 1, 2)[:, :3]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Packed images, vectors, rows and samples."""
        return self.packed, self.text_embeds, self.rows, self.samples

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """A batch of what `function` makes of each tensor."""
        packed, text_embeds, rows, samples = map(function, self.tensors())
        return Batch(packed, text_embeds, rows, samples, bad=self.bad)

    def pin_memory(self) -> Batch:
        """The same in page-locked memory, from which a GPU copies by itself; torch's DataLoader calls it."""
        return self.map(Tensor.pin_memory)


Part = tuple[int, int, int]
"""Number of a batch, first place in it, and the first place that is not in it any more."""


class BankDataset(Dataset[Batch | LLM2CLIPError]):
    """Parts of batches: `dataset[number, first, last]` gives those places of that batch, the same ones every time.

    A sample whose image cannot be read, or that has no caption of a wanted kind, is replaced by another of its bank
    and reported in `Batch.bad`. An error that stops the run is returned, not raised, so that it comes out of a loader
    process as it is.

    Args:
        banks: of one teacher.
        transform: of the tower.
        batch_size: images a batch, over all processes.
        seed: source of order, crops and choice of captions.
        mix: how often a caption is of each kind, among the kinds that its sample has; empty for all alike.
        bank_weights: how often each bank is drawn; empty for by size.
        min_crop: smallest share of an image that a random crop keeps; 1 for no augmentation.
        captions_per_image: captions drawn of each, different ones as far as it has them.
        num_processes: processes that share a batch.

    Raises:
        UsageError: if banks, kinds and batch size do not go together.

    Example:
        >>> dataset = BankDataset([Bank.open("bank")], transform=transform, batch_size=64)   # doctest: +SKIP
        >>> dataset[0, 0, 64].pixels.shape                                                   # doctest: +SKIP
        torch.Size([64, 3, 224, 224])
    """

    def __init__(
        self,
        banks: Sequence[Bank],
        *,
        transform: ImageTransform,
        batch_size: int,
        seed: int = 0,
        mix: Mapping[str, float] | None = None,
        bank_weights: Sequence[float] = (),
        min_crop: float = MIN_CROP,
        captions_per_image: int = 1,
        num_processes: int = 1,
    ) -> None:
        if bank_weights:  # a bank that is never drawn needs no kind, no teacher, no epoch
            banks = [bank for bank, weight in zip(banks, bank_weights, strict=True) if weight]
            bank_weights = [weight for weight in bank_weights if weight]
        check_banks(banks)
        check_batch_size(batch_size, num_processes, num_samples=sum(bank.num_samples for bank in banks))
        self.num_processes = num_processes
        self.banks, self.transform, self.batch_size = list(banks), transform, batch_size
        self.seed, self.min_crop, self.num_captions = seed, min_crop, captions_per_image
        self.mix_setting = setting("mix")  # written here: a loader process may be a fresh one, without the command line
        self.kinds = wanted_kinds(banks, mix or {})
        self.kind_weights = [kind_weights(bank, mix or {}) for bank in banks]
        self.num_samples = sum(bank.num_samples for bank in banks)
        self.order, self.load_image = open_order(
            banks, weights=bank_weights or None, batch_size=batch_size, seed=seed, num_processes=num_processes
        )
        self.first_sample = np.cumsum([0, *(bank.num_samples for bank in banks)], dtype=np.int64)
        self.first_row = np.cumsum([0, *(bank.num_rows for bank in banks)], dtype=np.int64)
        self.dtype = np.result_type(*(bank.vector_dtype for bank in banks))

    @property
    def batches_per_epoch(self) -> int:
        """Full batches in a pass over all banks; the rest of a pass is dropped."""
        return self.order.batches_per_epoch

    def __getitem__(self, part: Part) -> Batch | LLM2CLIPError:
        try:
            return self._load(*part)
        except LLM2CLIPError as error:
            return error

    def _load(self, number: int, first: int, last: int) -> Batch:
        places = np.arange(first, last)
        banks, samples = self.order.draw(number, places)
        positions = number * self.batch_size + places
        crops = uniforms(positions, NUM_DRAWS, key_of("crop", self.seed)).tolist()
        choices = uniforms(positions, 2 * self.num_captions, key_of("caption", self.seed)).tolist()
        packed = empty_shared((len(places), *self.transform.image_size, 4))
        rows = np.empty((len(places), self.num_captions), np.int64)
        bad: list[BadOne] = []
        for i, found in enumerate(self._decoded(banks, samples, choices)):
            if found is None:
                tried = self._candidates(int(banks[i]), samples, i, position=int(positions[i]))
                samples[i], found = self._first_usable(int(banks[i]), tried, choices[i], bad)
            rows[i], image = found
            self._write(packed[i], image, crops[i])
        text_embeds = np.empty((*rows.shape, self.banks[0].dim), self.dtype)
        for bank in np.unique(banks).tolist():
            here = banks == bank
            text_embeds[here] = self.banks[bank].vectors(rows[here]).reshape(-1, *text_embeds.shape[1:])
        return Batch(
            packed=packed,
            text_embeds=torch.from_numpy(text_embeds).flatten(0, 1),
            rows=torch.from_numpy(rows + self.first_row[banks][:, None]).flatten(),
            samples=torch.from_numpy(samples + self.first_sample[banks]),
            bad=bad,
        )

    def _candidates(self, bank: int, samples: Ints, place: int, *, position: int) -> Iterable[int]:
        """The sample at a place; in case it is bad others of its bank, first those that this part has not already."""
        sample = int(samples[place])
        yield sample
        draws = uniforms(np.array([position]), MAX_SUBSTITUTES, key_of("substitute", self.seed))[0].tolist()
        others = list(dict.fromkeys(self.order.orders[bank].substitute(sample, draw) for draw in draws))
        taken = set(samples.tolist())
        yield from (other for other in others if other not in taken)
        yield from (other for other in others if other in taken and other != sample)

    def _decoded(self, banks: Ints, samples: Ints, choices: list[list[float]]) -> Iterator[Found | None]:
        """What is found of each sample, in order; None where it cannot be used."""
        group: list[Found | None] = []
        pixels = 0
        for bank, sample, choice in zip(banks.tolist(), samples.tolist(), choices, strict=True):
            try:
                group.append(found := self._find(bank, sample, choice))
                pixels += found[1].width * found[1].height
            except BadImage:
                group.append(None)
            if pixels >= GROUP_PIXELS:
                yield from group
                group, pixels = [], 0
        yield from group

    def _first_usable(
        self, bank: int, candidates: Iterable[int], choice: list[float], bad: list[BadOne]
    ) -> tuple[int, Found]:
        """The first candidate that can be used, and what is found of it; those before it are added to `bad`."""
        before = len(bad)
        for sample in candidates:
            try:
                return sample, self._find(bank, sample, choice)
            except BadImage as problem:
                bad.append((self.banks[bank].sample_id(sample), problem.cause, problem.detail))
        sample_id, cause, detail = bad[-1]
        hint = (
            f"choose another {self.mix_setting}"
            if cause == NO_CAPTION
            else "are the images where they were when it was built?"
        )
        raise SourceError(
            f"{len(bad) - before} samples of {self.banks[bank].folder} tried for one place cannot be used, the last "
            f"({sample_id}) for: {cause}, {detail}; {hint}"
        )

    def _find(self, bank: int, sample: int, choice: list[float]) -> Found:
        """BadImage if the image cannot be read, or no caption is wanted."""
        rows = self._captions(bank, sample, choice)
        size = self.transform.eval_decode_size if self.min_crop >= 1 else self.transform.train_decode_size
        return rows, self.load_image(self.banks[bank].image(sample), min_size=size)

    def _write(self, packed: Tensor, image: Image.Image, crop: list[float]) -> None:
        """Crop and resize an image into `packed` [H, W, 4]."""
        if self.min_crop >= 1:
            pixels = self.transform(image)
        else:
            pixels = self.transform.augmented(image, crop, min_crop=self.min_crop, out=packed)
        if pixels.data_ptr() != packed.data_ptr():  # not written there already
            packed[..., : len(pixels)] = pixels.permute(1, 2, 0)
            packed[..., len(pixels) :] = 255  # as Pillow fills it

    def _captions(self, bank: int, sample: int, draws: list[float]) -> Ints:
        """The rows of the captions to take of a sample."""
        table = self.banks[bank].table
        start, end = table.caption_start[sample], table.caption_start[sample + 1]
        places = choose_captions(table.caption_kind[start:end].tolist(), self.kind_weights[bank], draws)
        if not places:
            raise BadImage(NO_CAPTION, f"it has none of {', '.join(self.kinds)}")
        return table.caption_row[start:end][places]


def empty_shared(shape: tuple[int, ...]) -> Tensor:
    """An uninitialised uint8 tensor; in a loader process in shared memory, which saves a copy on the way out."""
    empty = torch.empty(shape, dtype=torch.uint8)
    return empty if get_worker_info() is None else empty.share_memory_()
