"""From a name to a model's folder: what is refused, and that loading leaves the logs as they were."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModel
from transformers.utils import logging as transformers_logging

from llm2clip.errors import UsageError
from llm2clip.hub import find_model
from llm2clip.teacher.model import check_weights, find_text_model, is_decoder, is_from_llm2vec, one_line_errors


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "siglip"}, "is a vision model"),
        ({"model_type": "x", "architectures": ["Dinov2Model"]}, "is a vision model"),
        ({"hidden_size": 8}, "has no model_type"),
    ],
)
def test_what_is_no_text_model_is_refused(config: dict[str, object], words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=words):
        find_text_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip", "vocab_size": 5}))  # it reads text too
    assert find_text_model(tmp_path).config == {"model_type": "siglip", "vocab_size": 5}
    (tmp_path / "manifest.json").write_text('{"format": "llm2clip/student"}')
    with pytest.raises(UsageError, match=r"is no teacher .found: student"):
        find_text_model(tmp_path)


def test_decoders_and_llm2vecs_classes_are_known() -> None:
    assert is_decoder({"model_type": "llama"}) and is_decoder(
        {"model_type": "new", "architectures": ["NewForCausalLM"]}
    )
    assert not is_decoder({"model_type": "bert"}) and not is_decoder({})
    assert is_from_llm2vec({"architectures": ["MistralBiForMNTP", "LlamaEncoderModel"]})
    assert is_from_llm2vec({"auto_map": {"AutoModel": "a/b--c.Qwen2BiModel"}})
    assert not is_from_llm2vec({"architectures": ["LlamaModel"], "auto_map": None})
    assert not is_from_llm2vec({"architectures": ["MyLlamaEncoderModel"]})


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


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A folder that holds a tiny BERT and, as many encoders, no pooler."""
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_weights_that_are_missing_are_counted_but_for_poolers(bert: Path) -> None:
    model, folder = AutoModel.from_pretrained(bert), find_model(bert)
    assert hasattr(model, "pooler")
    check_weights(model, folder)
    weights = load_file(bert / "model.safetensors")
    for name in ("encoder.layer.0.output.dense.bias", "encoder.layer.0.output.dense.weight"):
        del weights[name]
    save_file(weights, bert / "model.safetensors", metadata={"format": "pt"})
    lacking = r"bert lacks weights of its model, such as encoder\.layer\.0\.output\.dense\.bias \(2 in all\)"
    with pytest.raises(UsageError, match=lacking):
        check_weights(model, folder)


def test_weights_that_a_module_lacks_are_found_too(bert: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(bert)
    whole = tmp_path / "whole"
    (whole / "query_0_Transformer").mkdir(parents=True)
    bert.rename(whole / "query_0_Transformer" / "0_Transformer")
    (whole / "modules.json").write_text("[]")
    check_weights(model, find_model(whole))
    file = whole / "query_0_Transformer" / "0_Transformer" / "model.safetensors"
    weights = load_file(file)
    del weights["embeddings.word_embeddings.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"lacks weights of its model, such as embeddings\.word_embeddings\.weight"):
        check_weights(model, find_model(whole))


def test_weights_saved_in_few_bits_are_left_to_who_opens_them(bert: Path) -> None:
    model = AutoModel.from_pretrained(bert)
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    save_file({}, bert / "model.safetensors", metadata={"format": "pt"})
    check_weights(model, find_model(bert))
