"""The trained model in use: `LLM2CLIP` encodes images and texts into one space.

A student needs its teacher for texts; a folder written by `export --to sentence-transformers` holds both. No code that
lies in a student's or exported folder is run.

Letters: N images or texts, T teacher width, D shared width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from llm2clip.bundle import open_bundle
from llm2clip.cuts import CutCounter
from llm2clip.data.feeder import batched, prepared
from llm2clip.data.images import ImageSource, load_image
from llm2clip.errors import UsageError
from llm2clip.hub import ModelFolder, find_model, pick_device
from llm2clip.opening import check_match, open_student, origin_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from llm2clip.student.model import Student
    from llm2clip.student.transform import ImageTransform

logger = logging.getLogger("llm2clip")
ImageInput = ImageSource | np.ndarray | Tensor


class CountsCuts:
    """Counts the texts that a teacher reads only the beginning of; a warning says so once.

    Attributes:
        num_cut: texts so far that were longer than the teacher reads.
        warns: whether there is a warning; `evaluate` says it with the share.
    """

    num_cut = 0
    warns = True
    _counter: CutCounter | None = None

    @property
    def context(self) -> int | None:
        """Tokens read of a text; None before the first, and where there is no limit."""
        return None if self._counter is None else self._counter.limit

    def _count_cut(self, teacher: SentenceTransformer, texts: Sequence[str], prompt: str | None = None) -> None:
        """Count those of `texts`, as `encode_texts` encodes them."""
        if self._counter is None:
            default = teacher.prompts.get(teacher.default_prompt_name or "")
            self._counter = CutCounter(teacher, prompt if prompt is not None else default)
        number = int(self._counter.cut(texts).sum())
        if number and not self.num_cut and self.warns:
            logger.warning("texts longer than %s tokens are cut; num_cut counts them", f"{self.context:,}")
        self.num_cut += number


class LLM2CLIP(CountsCuts):
    """A student and, for texts, its teacher.

    Args:
        student: tower, projection and adaptor.
        transform: how images are resized and cropped for it.
        teacher: gives the vectors that the adaptor reads, or a function that opens it at the first text; None if only
            images will be encoded.
        prompt: what the bank put before each caption; None for the teacher's own default.
        origin: what the model's manifest says of where it comes from.

    Example:
        >>> model = LLM2CLIP.from_pretrained("student", teacher="teacher")              # doctest: +SKIP
        >>> image = model.encode_image(["cat.jpg"])                                     # doctest: +SKIP
        >>> text = model.encode_text(["a grey cat", "two dogs on a beach"])             # doctest: +SKIP
        >>> (text @ image.T).shape                                                      # doctest: +SKIP
        (2, 1)
    """

    def __init__(
        self,
        student: Student,
        transform: ImageTransform,
        teacher: SentenceTransformer | Callable[[], SentenceTransformer] | None = None,
        *,
        prompt: str | None = None,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        self.student, self.transform, self.prompt = student.eval(), transform, prompt
        self._teacher: Any = teacher
        self.origin = dict(origin or {})

    @classmethod
    def from_pretrained(
        cls,
        student: str | Path | ModelFolder,
        teacher: str | Path | ModelFolder | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        teacher_revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> LLM2CLIP:
        """Load a student's folder or Hub id, or one exported for sentence-transformers, which needs no teacher.

        Of the students that the paper's authors released (`microsoft/LLM2CLIP-Openai-L-14-336` and others) the teacher
        is known; it is opened at the first text.

        Args:
            student: the model.
            teacher: the teacher whose vectors it was trained on; may be left out if only images will be encoded.
            device: "cpu", "cuda", "mps", ...; by default a GPU if there is one.
            dtype: of all weights ("bfloat16", ...); "auto" for each as saved. By default as saved too, but float32
                where this CPU would emulate a half precision. What comes out is always float32.
            revision: branch, tag or commit of a Hub `student`.
            teacher_revision: the same of a Hub `teacher`.
            trust_remote_code: run Python code that comes with the teacher.

        Raises:
            UsageError: if there is no such model, or the teacher is not the one it was trained with.
        """
        from llm2clip.teacher.model import load_teacher

        folder, device = find_model(student, revision=revision), pick_device(device)
        origin = origin_of(folder.manifest, folder)
        if folder.kind == "bundle":
            if teacher is not None:
                raise UsageError(f"{folder.name} holds its own teacher; leave the teacher {teacher} out")
            return cls(*open_bundle(folder, device=device, dtype=dtype), origin=origin)
        model, transform = open_student(folder, device=device, dtype=dtype)
        prompt, name = folder.manifest.get("prompt"), teacher or origin.get("teacher")
        if name is None:
            return cls(model, transform, origin=origin)

        def load() -> SentenceTransformer:
            text = load_teacher(
                name, revision=teacher_revision, device=device, dtype=dtype, trust_remote_code=trust_remote_code
            )
            check_match(model, folder, text, teacher_name=name)
            return text

        return cls(model, transform, load() if teacher is not None else load, prompt=prompt, origin=origin)

    @property
    def teacher(self) -> SentenceTransformer | None:
        """The teacher, opened now if it was not yet; None without one."""
        if self._teacher is not None and not isinstance(self._teacher, torch.nn.Module):
            self._teacher = self._teacher()
        teacher: Any = self._teacher
        return teacher

    @property
    def parts(self) -> list[torch.nn.Module]:
        """The student, and the teacher if it is open."""
        return [self.student, *([self._teacher] if isinstance(self._teacher, torch.nn.Module) else [])]

    @property
    def dim(self) -> int:
        """D, the width of the shared space."""
        return int(self.student.config.projection_dim)

    @property
    def device(self) -> torch.device:
        """Where the student lies."""
        return self.student.adaptor.projection.weight.device

    def prepare_image(self, image: ImageInput) -> Tensor:
        """The pixels uint8 [3, H, W] that the tower sees of an image; such pixels stay as they are.

        Raises:
            BadImage: if it cannot be read.
            UsageError: if it is nothing that can be an image.
        """
        if not isinstance(image, Tensor):
            return self.transform(load_image(_opened(image)))
        if image.dtype == torch.uint8 and tuple(image.shape) == (3, *self.transform.image_size):
            return image
        raise UsageError(
            f"a tensor {image.dtype} {list(image.shape)} is not what prepare_image gives, uint8 "
            f"{[3, *self.transform.image_size]}; give pixels of other sizes as an array uint8 [H, W, 3]"
        )

    @torch.inference_mode()
    def encode_image(self, images: Sequence[ImageInput], *, batch_size: int = 32) -> np.ndarray:
        """float32 [N, D] of unit length, a row an image.

        Args:
            images: paths, encoded bytes, Pillow images of any mode and size, arrays uint8 [H, W, 3] (RGB) or
                [H, W], or what `prepare_image` gave.
            batch_size: images in the tower at once; the pixels of only two batches are in memory.

        Raises:
            BadImage: if one cannot be read; it is named.
        """
        _check_list(images, "encode_image", 'encode_image(["cat.jpg"])')
        rows = [np.empty((0, self.dim), np.float32)]
        for batch in batched(prepared(images, self.prepare_image, ahead=batch_size), batch_size):
            pixels = torch.stack([image.result() for _, image in batch])
            features = self.student.get_image_features(pixels.to(self.device, non_blocking=True))
            rows.append(normalize(features.float(), dim=-1).cpu().numpy())
        return np.concatenate(rows)

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str], *, batch_size: int = 32) -> np.ndarray:
        """float32 [N, D] of unit length, a row a text; `batch_size` texts are in the teacher at once.

        Texts longer than the teacher reads are cut, and counted in `num_cut`; a warning says so once.

        Raises:
            UsageError: if the model was loaded without its teacher, or something is no text.
        """
        teacher = self.teacher
        if teacher is None:
            raise UsageError("this model was opened without its teacher, so it encodes images only; add the teacher")
        vectors = torch.from_numpy(encode_texts(teacher, texts, batch_size=batch_size, prompt=self.prompt))
        self._count_cut(teacher, texts, self.prompt)
        rows = [np.empty((0, self.dim), np.float32)]
        for batch in vectors.split(4 * batch_size):
            features = self.student.get_text_features(batch.to(self.device))
            rows.append(normalize(features.float(), dim=-1).cpu().numpy())
        return np.concatenate(rows)


class Teacher(CountsCuts):
    """A text encoder alone, as scores see it: any SentenceTransformer, one of our teachers, or a bare LLM.

    Example:
        >>> Teacher.from_pretrained("teacher").encode_text(["a grey cat"]).shape         # doctest: +SKIP
        (1, 4096)
    """

    def __init__(self, model: SentenceTransformer) -> None:
        self.model = model

    @classmethod
    def from_pretrained(cls, teacher: str | Path, **options: Any) -> Teacher:
        """Load a folder or Hub id; `options` as for `llm2clip.load_teacher`."""
        from llm2clip.teacher.model import load_teacher

        return cls(load_teacher(teacher, **{**options, "device": pick_device(options.get("device"))}))

    @property
    def dim(self) -> int | None:
        """T."""
        return self.model.get_embedding_dimension()

    @property
    def fingerprint(self) -> str:
        """The teacher's fingerprint, as in a bank's manifest."""
        from llm2clip.teacher.fingerprint import teacher_fingerprint

        return teacher_fingerprint(self.model)

    def encode_text(self, texts: Sequence[str], *, batch_size: int = 32) -> np.ndarray:
        """float32 [N, T] of unit length, a row a text."""
        vectors = torch.from_numpy(encode_texts(self.model, texts, batch_size=batch_size))
        self._count_cut(self.model, texts)
        return normalize(vectors, dim=-1).numpy()


def encode_texts(
    teacher: SentenceTransformer, texts: Sequence[str], *, batch_size: int, prompt: str | None = None
) -> np.ndarray:
    """float32 [N, T], a teacher's own vectors of `texts`, of whatever length it gives them."""
    _check_list(texts, "encode_text", 'encode_text(["a grey cat"])')
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise UsageError(f"encode_text takes texts; number {i} of {len(texts)} is {text!r}")
    if not len(texts):
        return np.empty((0, teacher.get_embedding_dimension() or 0), np.float32)
    read = [text.strip() for text in texts]  # as captions are read from tables
    vectors = teacher.encode(read, batch_size=batch_size, prompt=prompt, show_progress_bar=False)
    return np.asarray(vectors, dtype=np.float32)


def _opened(image: Any) -> ImageSource:
    """An array as a Pillow image; what else can be an image stays as it is."""
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint8 and (image.ndim == 2 or image.shape[2:] in ((3,), (4,))) and image.size:
            return Image.fromarray(image)
        raise UsageError(
            f"an array {image.dtype} {list(image.shape)} is no image; write it as uint8 [H, W, 3], 0 to 255, RGB"
        )
    if isinstance(image, get_args(ImageSource)):
        return image  # type: ignore[no-any-return]
    raise UsageError(
        f"an image is given as a path, encoded bytes, a Pillow image or an array, not as {type(image).__name__}"
    )


def _check_list(inputs: Any, name: str, example: str) -> None:
    if isinstance(inputs, (str, bytes, Path)) or not isinstance(inputs, Sequence):
        raise UsageError(f"{name} takes a list, not {type(inputs).__name__}; write for example {example}")
