"""From a name to a model's folder: what is refused, and that loading leaves the logs as they were."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from transformers.utils import logging as transformers_logging

from llm2clip.errors import ArtifactError, UsageError
from llm2clip.teacher.opening import check_is_text_model, is_decoder, is_from_llm2vec, one_line_errors, resolve_folder


def test_a_teacher_that_is_not_finished_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    check_is_text_model(tmp_path, "t")
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ArtifactError, match="t is unfinished"):
        check_is_text_model(tmp_path, "t")
    (tmp_path / "manifest.json").write_text('{"format": "llm2clip/teacher"}')
    check_is_text_model(tmp_path, "t")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "siglip"}, "is a vision model"),
        ({"model_type": "x", "architectures": ["Dinov2Model"]}, "is a vision model"),
        ({}, "has no model_type"),
    ],
)
def test_what_is_no_text_model_is_refused(config: dict[str, object], words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=words):
        check_is_text_model(tmp_path, "t")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip", "vocab_size": 5}))  # it reads text too
    check_is_text_model(tmp_path, "t")


def test_decoders_and_llm2vecs_classes_are_known() -> None:
    assert is_decoder({"model_type": "llama"}) and is_decoder(
        {"model_type": "new", "architectures": ["NewForCausalLM"]}
    )
    assert not is_decoder({"model_type": "bert"}) and not is_decoder({})
    assert is_from_llm2vec({"architectures": ["MistralBiForMNTP", "LlamaEncoderModel"]})
    assert is_from_llm2vec({"auto_map": {"AutoModel": "a/b--c.Qwen2BiModel"}})
    assert not is_from_llm2vec({"architectures": ["LlamaModel"], "auto_map": None})
    assert not is_from_llm2vec({"architectures": ["MyLlamaEncoderModel"]})


def test_names_that_are_no_place_are_refused(tmp_path: Path) -> None:
    assert resolve_folder(tmp_path) == tmp_path
    for name in ("./here", "/nowhere", "~/x", "a/b/c", " "):
        with pytest.raises(UsageError, match="is no folder"):
            resolve_folder(name)


def test_logs_are_as_before_whatever_loading_came_to() -> None:
    loading = logging.getLogger("transformers.modeling_utils")
    before = (transformers_logging.get_verbosity(), loading.level, list(loading.filters))
    with one_line_errors("a"):
        assert transformers_logging.get_verbosity() == logging.ERROR
    with (
        pytest.raises(UsageError, match=r"^a cannot be loaded as a text model: two lines$") as caught,
        one_line_errors("a"),
    ):
        raise ValueError("two\n lines")
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(UsageError, match=r"^ours$"), one_line_errors("a"):  # ours says what to do already
        raise UsageError("ours")
    assert (transformers_logging.get_verbosity(), loading.level, list(loading.filters)) == before


def test_weights_that_are_missing_are_counted_but_for_poolers() -> None:
    report = "name | status |\nlayers.0.weight | MISSING |\npooler.weight | MISSING |\nlm_head | UNEXPECTED |"
    lacking = pytest.raises(UsageError, match=r"a lacks weights of its model, such as layers.0.weight \(1 in all\)")
    with lacking, one_line_errors("a"):
        logging.getLogger("transformers.modeling_utils").warning(report)
    with one_line_errors("a"):
        logging.getLogger("transformers.modeling_utils").warning("pooler.weight | MISSING |")
