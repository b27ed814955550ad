"""Teachers: two-way by test, exact round trips, one line for what is no teacher."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense
from transformers import AutoModel, LlamaConfig, LlavaConfig

from llm2clip.errors import UsageError
from llm2clip.teacher.model import llm_as_encoder, load_teacher, restore_attention, save, teacher_fingerprint
from llm2clip.teacher.tuning import add_adaptor, add_lora, merge_lora

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "phi", "phi3"]
TEXTS = ["a red disc", "a large blue square on the left of the dark background", "there"]


def first_token_moves(model: torch.nn.Module) -> float:
    """How far the first token's state moves when the last token changes."""
    ids = torch.tensor([[1, 7, 8, 9, 10, 11]])
    other = ids.clone()
    other[0, -1] = 30
    with torch.no_grad():
        states = [model(input_ids=x, attention_mask=torch.ones_like(x)).last_hidden_state[0, 0] for x in (ids, other)]
    return float((states[0] - states[1]).abs().max())


def shake_adapters(encoder: SentenceTransformer) -> None:
    """Give the adapters weights, as training would (peft starts them at zero)."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.05)


def cosine_distance(a: np.ndarray, b: np.ndarray) -> float:
    """1 - cosine of the row where it is largest."""
    return float((1 - (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_attends_two_ways_and_comes_back_the_same(family, llm_of, tmp_path):
    causal = llm_as_encoder(llm_of(family), attention="causal", dtype="float32")
    assert first_token_moves(causal[0].model) == 0
    encoder = llm_as_encoder(llm_of(family), dtype="float32")
    assert first_token_moves(encoder[0].model) > 1e-3
    bare = encoder.encode(TEXTS)
    add_lora(encoder, rank=4, alpha=8)
    np.testing.assert_allclose(encoder.encode(TEXTS), bare, atol=1e-6)  # adapters start as nothing
    shake_adapters(encoder)
    unmerged = encoder.eval().encode(TEXTS)
    assert np.abs(unmerged - bare).max() > 1e-3
    merge_lora(encoder)
    merged = encoder.encode(TEXTS)
    np.testing.assert_allclose(merged, unmerged, atol=1e-3)
    save(encoder, tmp_path / "t", attention="two-way")
    for reloaded in (load_teacher(tmp_path / "t"), SentenceTransformer(str(tmp_path / "t"), device="cpu")):
        np.testing.assert_array_equal(reloaded.encode(TEXTS), merged)
    assert first_token_moves(AutoModel.from_pretrained(tmp_path / "t")) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_sits_on_every_linear_layer_and_only_it_trains(family, llm_of):
    encoder = llm_as_encoder(llm_of(family), dtype="float32")
    linear = [name for name, module in encoder[0].model.named_modules() if isinstance(module, torch.nn.Linear)]
    add_lora(encoder, rank=2)
    names = [name for name, weight in encoder.named_parameters() if weight.requires_grad]
    assert len(names) == 2 * len(linear) and all("lora_" in name for name in names)
    before = {name: weight.clone() for name, weight in encoder.named_parameters()}
    features = encoder.preprocess(TEXTS)
    optimizer = torch.optim.AdamW([w for w in encoder.parameters() if w.requires_grad], lr=1e-2)
    encoder(features)["sentence_embedding"].square().mean().backward()
    optimizer.step()
    changed = {name for name, weight in encoder.named_parameters() if not torch.equal(weight, before[name])}
    assert changed and changed <= set(names)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["mean", "last-token", "weighted"])
def test_a_vector_does_not_depend_on_its_neighbours_or_padding(pooling, side, llm_of):
    encoder = llm_as_encoder(llm_of("llama"), pooling=pooling, dtype="float32")
    assert encoder[0].tokenizer.padding_side == "right"
    alone = np.concatenate([encoder.encode([text]) for text in TEXTS])
    if pooling == "weighted" and side == "left":
        pytest.skip("sentence-transformers 6.0 counts the weights from the padding; our teachers pad on the right")
    encoder[0].tokenizer.padding_side = side
    np.testing.assert_allclose(encoder.encode(TEXTS), alone, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_round_trip_is_exact(family, llm_of, tmp_path):
    encoder = llm_as_encoder(llm_of(family), dtype="bfloat16")
    bare = encoder.encode(TEXTS)
    add_lora(encoder, rank=4, alpha=8)
    shake_adapters(encoder)
    unmerged = encoder.eval().encode(TEXTS)
    merge_lora(encoder)
    vectors = encoder.encode(TEXTS)
    assert cosine_distance(vectors, unmerged) < 2e-3 < cosine_distance(vectors, bare)
    save(encoder, tmp_path / "t", attention="two-way")
    reloaded = load_teacher(tmp_path / "t", dtype="auto")
    assert reloaded[0].model.dtype == torch.bfloat16
    np.testing.assert_array_equal(reloaded.encode(TEXTS), vectors)


@pytest.mark.ci
def test_a_saved_teacher_is_two_way_in_a_process_that_never_saw_llm2clip(llm_of, tmp_path):
    encoder = llm_as_encoder(llm_of("llama"), dtype="float32")
    save(encoder, tmp_path / "t", attention="two-way")
    code = (
        "import sys, json; from sentence_transformers import SentenceTransformer as S;"
        "print(json.dumps(S(sys.argv[1], device='cpu').encode(['a red disc']).tolist())); "
        "assert 'llm2clip' not in sys.modules"
    )
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path / "t")], capture_output=True, text=True, check=True)
    np.testing.assert_allclose(json.loads(out.stdout.splitlines()[-1]), encoder.encode(["a red disc"]), atol=1e-7)


def test_the_flag_given_as_config_kwargs_is_dropped_which_is_why_we_set_it(llm_of):
    """The trap this package steps around; if this fails, sentence-transformers has mended it."""
    model = SentenceTransformer(str(llm_of("llama")), config_kwargs={"is_causal": False}, device="cpu")
    assert first_token_moves(model[0].model) == 0 and model[1].pooling_mode == "lasttoken"
    assert llm_as_encoder(llm_of("llama"))[1].pooling_mode == "mean"


def test_saving_with_an_adapter_loses_the_attention_which_is_why_we_merge(llm_of, tmp_path):
    """The trap this package steps around; if this fails, sentence-transformers has mended it."""
    encoder = llm_as_encoder(llm_of("llama"), dtype="float32")
    add_lora(encoder, rank=2)
    encoder.save_pretrained(str(tmp_path / "adapter"), create_model_card=False)
    reloaded = SentenceTransformer(str(tmp_path / "adapter"), device="cpu")
    assert first_token_moves(reloaded[0].model) == 0
    merge_lora(encoder)
    save(encoder, tmp_path / "merged", attention="two-way")
    assert first_token_moves(load_teacher(tmp_path / "merged")[0].model) > 1e-3


def test_packed_captions_see_each_other_which_is_why_nothing_is_packed(llm_of):
    """Two captions in one row with positions starting anew: a causal mask keeps them apart, a two-way one does not."""
    encoder = llm_as_encoder(llm_of("llama"), dtype="float32")
    assert not encoder[0].can_flatten_inputs
    one, two = torch.tensor([[1, 7, 8]]), torch.tensor([[1, 30, 31, 32]])
    packed = torch.cat([one, two], dim=1)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    model = encoder[0].model
    with torch.no_grad():
        alone = model(input_ids=one).last_hidden_state[0]
        together = model(input_ids=packed, position_ids=positions).last_hidden_state[0, :3]
    assert float((alone - together).abs().max()) > 1e-3


def test_an_llm_that_does_not_listen_is_refused(llm_of, monkeypatch):
    from llm2clip.teacher import model

    monkeypatch.setattr(model, "restore_attention", lambda encoder, attention: None)
    with pytest.raises(UsageError, match=r"keeps its causal attention.*attention=.causal"):
        llm_as_encoder(llm_of("llama"))


def test_a_manifest_of_another_program_is_no_matter(llm_of, tmp_path):
    save(llm_as_encoder(llm_of("llama"), dtype="float32"), tmp_path / "t", attention="two-way")
    (tmp_path / "t" / "manifest.json").write_text('{"name": "an app"}')
    assert first_token_moves(load_teacher(tmp_path / "t")[0].model) > 1e-3
    assert teacher_fingerprint(tmp_path / "t")


def test_a_bare_llm_loads_as_the_default_encoder_and_another_embedder_as_it_is(llm_of, tmp_path):
    teacher = load_teacher(llm_of("llama"))
    assert first_token_moves(teacher[0].model) > 1e-3 and teacher[1].pooling_mode == "mean"
    assert teacher.max_seq_length == 512
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    transformer = Transformer(str(llm_of("llama")))
    SentenceTransformer(modules=[transformer, Pooling(32, "lasttoken")], device="cpu").save(str(tmp_path / "e"))
    other = load_teacher(tmp_path / "e")
    assert first_token_moves(other[0].model) == 0 and other[1].pooling_mode == "lasttoken"


def test_fingerprint_is_of_the_content_not_of_the_place(llm_of, tmp_path):
    encoder = llm_as_encoder(llm_of("llama"), dtype="float32")
    save(encoder, tmp_path / "a", attention="two-way")
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere" / "b")
    save(load_teacher(tmp_path / "a"), tmp_path / "c", attention="two-way")
    prints = {teacher_fingerprint(tmp_path / name) for name in ("a", "elsewhere/b", "c")}
    assert len(prints) == 1
    assert teacher_fingerprint(load_teacher(tmp_path / "a")) in prints
    save(load_teacher(tmp_path / "a"), tmp_path / "causal", attention="causal")
    assert teacher_fingerprint(tmp_path / "causal") not in prints
    pooling = tmp_path / "elsewhere" / "b" / "1_Pooling" / "config.json"
    pooling.write_text(pooling.read_text().replace("mean", "max"))
    assert teacher_fingerprint(tmp_path / "elsewhere" / "b") not in prints


def test_fingerprint_of_a_wrapped_llm_knows_its_settings(llm_of):
    a, b = llm_as_encoder(llm_of("llama")), llm_as_encoder(llm_of("llama"), pooling="last-token")
    assert teacher_fingerprint(a) == teacher_fingerprint(load_teacher(llm_of("llama")))
    assert teacher_fingerprint(a) != teacher_fingerprint(b)
    before = teacher_fingerprint(a)
    add_lora(a, rank=2)
    assert teacher_fingerprint(a) != before


def test_a_vision_tower_is_refused_in_one_line(tiny_tower):
    for function in (load_teacher, llm_as_encoder):
        with pytest.raises(UsageError, match="is a vision model") as caught:
            function(tiny_tower)
        assert "\n" not in str(caught.value)


def test_what_is_no_model_is_refused_in_one_line(tmp_path, llm_of):
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken"
    shutil.copytree(llm_of("llama"), broken)
    (broken / "model.safetensors").write_bytes(b"nothing")
    untokenised = tmp_path / "untokenised"
    shutil.copytree(llm_of("llama"), untokenised, ignore=shutil.ignore_patterns("token*"))
    student = tmp_path / "student"
    student.mkdir()
    (student / "manifest.json").write_text('{"format": "llm2clip/student", "config": {}}')
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "empty", broken, untokenised, student, tmp_path / "file", tmp_path / "missing/folder/x"):
        with pytest.raises(UsageError) as caught:
            load_teacher(path)
        assert path.name in str(caught.value) and "\n" not in str(caught.value)


def test_max_length_cuts(llm_of):
    encoder = llm_as_encoder(llm_of("llama"), max_length=6)
    long = " ".join(["red"] * 1000)
    assert encoder.preprocess([long])["input_ids"].shape == (1, 6)


def test_a_pickle_is_never_loaded(tiny_llm: Path, tmp_path: Path) -> None:
    folder = tmp_path / "llm"
    shutil.copytree(tiny_llm, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(1)}, folder / "pytorch_model.bin")
    with pytest.raises(
        UsageError, match=r"keeps its weights in a pickle \(pytorch_model\.bin\), which is never loaded"
    ):
        load_teacher(folder)


def test_a_pickle_in_a_module_is_never_loaded(tiny_llm: Path, tmp_path: Path) -> None:
    teacher = llm_as_encoder(tiny_llm)
    teacher.append(Dense(32, 16))
    teacher.save_pretrained(str(tmp_path / "teacher"))
    (dense,) = (tmp_path / "teacher").glob("*_Dense")
    (dense / "model.safetensors").unlink()
    torch.save({}, dense / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"in a pickle \(2_Dense/pytorch_model\.bin\)"):
        load_teacher(tmp_path / "teacher")


def test_a_checkpoint_that_lacks_weights_is_refused_and_not_filled_with_random_ones(
    tiny_llm: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "llm"
    shutil.copytree(tiny_llm, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for load in (load_teacher, llm_as_encoder):
        with pytest.raises(UsageError, match=r"lacks weights of its model, such as .*up_proj"):
            load(folder, device="cpu")
    save(llm_as_encoder(tiny_llm), tmp_path / "teacher", attention="two-way")
    weights = load_file(tmp_path / "teacher" / "model.safetensors")
    del weights[next(name for name in weights if "up_proj" in name)]
    save_file(weights, tmp_path / "teacher" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="lacks weights"):
        load_teacher(tmp_path / "teacher", device="cpu")


def test_both_parts_of_a_multimodal_llm_are_told_how_to_attend() -> None:
    config = LlavaConfig(text_config=LlamaConfig(hidden_size=32, num_hidden_layers=1).to_dict())
    assert config.get_text_config() is not config
    for attention in ("two-way", "causal"):
        restore_attention([SimpleNamespace(model=SimpleNamespace(config=config))], attention)  # type: ignore[arg-type]
        assert config.is_causal == config.get_text_config().is_causal == (attention == "causal")


def test_a_manifest_says_the_attention_where_the_config_lost_it(tiny_llm: Path, tmp_path: Path) -> None:
    save(llm_as_encoder(tiny_llm, dtype="float32"), tmp_path / "t", attention="two-way")
    config = json.loads((tmp_path / "t" / "config.json").read_text())
    assert config.pop("is_causal") is False
    (tmp_path / "t" / "config.json").write_text(json.dumps(config))
    assert first_token_moves(load_teacher(tmp_path / "t")[0].model) == 0
    manifest = {"format": "llm2clip/teacher", "config": {"attention": "two-way"}}
    (tmp_path / "t" / "manifest.json").write_text(json.dumps(manifest))
    assert first_token_moves(load_teacher(tmp_path / "t")[0].model) > 0


def test_an_adaptor_is_saved_in_the_llms_dtype_and_makes_another_teacher(tiny_llm: Path, tmp_path: Path) -> None:
    encoder = llm_as_encoder(tiny_llm, dtype="bfloat16")
    before = teacher_fingerprint(encoder)
    add_adaptor(encoder, layers=1)
    assert teacher_fingerprint(encoder) != before
    assert {weight.dtype for weight in encoder[2].parameters()} == {torch.float32}
    with torch.no_grad():
        encoder[2].linear.weight.normal_()
    state = encoder.state_dict()
    save(encoder, tmp_path / "t", attention="two-way")
    saved = load_file(tmp_path / "t" / "2_Dense" / "model.safetensors")["linear.weight"]
    torch.testing.assert_close(saved, state["2.linear.weight"].bfloat16(), rtol=0, atol=0)
    assert encoder[0].model.rotary_emb.inv_freq.dtype == torch.float32  # rounded, positions would go wrong
    np.testing.assert_array_equal(load_teacher(tmp_path / "t", dtype="auto").encode(TEXTS), encoder.encode(TEXTS))


def test_a_teacher_is_loaded_in_the_dtype_asked_for_and_ready_to_encode(tiny_llm: Path, tmp_path: Path) -> None:
    save(llm_as_encoder(tiny_llm, dtype="float32"), tmp_path / "t", attention="two-way")
    for place in (tiny_llm, tmp_path / "t"):
        teacher = load_teacher(place, dtype=torch.bfloat16, device="cpu")
        assert teacher[0].model.dtype == torch.bfloat16 and not teacher.training
