"""examples/llava: the data's layouts, the loss on answers alone, both stages of training, going on after a kill."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from PIL import Image

from examples.llava.conversations import IGNORED, Collator, encode, read_conversations
from examples.llava.make_llava import MakeConfig, make_llava
from examples.llava.train import TrainConfig, new_trainer, open_model, train
from llm2clip.errors import LLM2CLIPError, SourceError, UsageError

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 70, 220), "yellow": (230, 220, 50)}
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'user ' + message['content'] + ' . ' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def llava(tiny_llm: Path, tiny_tower: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    (folder / "template").write_text(TEMPLATE)
    settings = {"tower": str(tiny_tower), "llm": str(tiny_llm), "template": str(folder / "template")}
    return make_llava(MakeConfig(**settings, out=folder / "made"))


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """captions.json and mix.json beside one image a colour; the mix has turns of text alone."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "coco").mkdir()
    captions, mix = [], []
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 20), colour).save(folder / "coco" / f"{name}.png")
        image = {"id": name, "image": f"coco/{name}.png"}
        captions.append({**image, "conversations": [human("describe\n<image>"), gpt(f"a {name} square")]})
        mix.append({**image, "conversations": [human("<image>\nshows colour"), gpt(name)]})
        mix.append({"id": f"text-{name}", "conversations": [human(f"{name} <image>"), gpt("plain")]})
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "mix.json").write_text(json.dumps(mix))
    return folder


def test_the_loss_is_on_the_answers_alone(llava: Path, tmp_path: Path) -> None:
    """Against a mask made by hand: two turns, each answer with the token that ends it, and nothing else."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    turns = [human("<image>\nis this red"), gpt("red disc"), human("two"), gpt("the square")]
    (tmp_path / "a.json").write_text(json.dumps([{"id": "a", "image": "a.png", "conversations": turns}]))
    processor = t.AutoProcessor.from_pretrained(llava)
    (sample,) = read_conversations(tmp_path / "a.json", tmp_path)
    ids, labels = encode(sample, processor, plain=False, max_length=99)
    words = "<s> user IMAGES is this red . *red *disc *</s> user two . *the *square *</s>".replace(
        "IMAGES", " ".join(["<image>"] * 16)
    ).split()
    known = processor.tokenizer.convert_tokens_to_ids
    assert ids == [known(word.lstrip("*")) for word in words]
    assert labels == [known(word[1:]) if word[0] == "*" else IGNORED for word in words]
    parts = [{"type": "text", "text": "is this red"}, {"type": "image"}]
    told = processor.apply_chat_template([{"role": "user", "content": parts}])
    assert told == processor.tokenizer.apply_chat_template(sample.messages[:1], tokenize=False)
    plain, of_caption = encode(sample, processor, plain=True, max_length=99)
    assert plain == [1, *[processor.image_token_id] * 16, *map(known, ("red", "disc"))]
    assert of_caption == [IGNORED] * 17 + plain[17:]


def test_a_long_conversation_is_cut_at_its_end_and_never_in_an_image(llava: Path, tmp_path: Path) -> None:
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    row = {"id": "me", "image": ["a.png", "b.png"], "conversations": [human("<image> is <image>"), gpt("red disc")]}
    (tmp_path / "a.json").write_text(json.dumps([row]))
    processor = t.AutoProcessor.from_pretrained(llava)
    (sample,) = read_conversations(tmp_path / "a.json", tmp_path)
    whole, labels = encode(sample, processor, plain=False, max_length=99)
    assert len(whole) == 2 + 32 + 2 + 3 and whole.count(processor.image_token_id) == 32
    assert encode(sample, processor, plain=False, max_length=37) == (whole[:37], labels[:37])
    with pytest.raises(LLM2CLIPError, match=r"me: its images take 32 tokens, max_length 33 would cut them; .*39"):
        encode(sample, processor, plain=False, max_length=33)


def test_a_template_that_rewrites_earlier_turns_is_refused(llava: Path, files: Path) -> None:
    processor = t.AutoProcessor.from_pretrained(llava)
    processor.tokenizer.chat_template = "{{ messages | length }}" + processor.chat_template
    with pytest.raises(LLM2CLIPError, match=r"rewrites earlier turns.*template='vicuna'"):
        encode(read_conversations(files / "mix.json", files)[0], processor, plain=False, max_length=99)


def test_what_is_left_out_is_counted_and_named(files: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    rows = json.loads((files / "mix.json").read_text())
    rows += [{**rows[0], "image": f"gone/{i}.png"} for i in range(5)]
    rows += [{"id": "mute", "conversations": [human("a")]}, {**rows[0], "conversations": [human("a"), gpt("b")]}]
    (tmp_path / "mix.json").write_text(json.dumps(rows))
    with caplog.at_level(logging.WARNING, logger="llm2clip"):
        found = read_conversations(tmp_path / "mix.json", files)
    assert len(found) == 8 and [len(each.images) for each in found] == [1, 0] * 4
    assert caplog.messages == [
        "mix.json: 5 of 15 samples left out, images missing: gone/0.png, gone/1.png, gone/2.png",
        "mix.json: 1 of 15 samples left out, nobody answers: mute",
        "mix.json: 1 of 15 samples left out, not as many <image> as images: coco/red.png",
    ]
    with pytest.raises(SourceError, match=r"no sample is left; images .*nowhere is where"):
        read_conversations(files / "captions.json", files / "nowhere")
    for text, said in [("{}", "no list of conversations"), ('[{"from": 1}]', "sample 0 is no conversation")]:
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(SourceError, match=said):
            read_conversations(tmp_path / "bad.json", files)
    with pytest.raises(UsageError, match="is no file"):
        read_conversations(tmp_path / "none.json", files)


def test_a_batch_has_conversations_with_and_without_images(llava: Path, files: Path) -> None:
    """And makes of each what it would be alone; `<image>` in a text without images is a word."""
    samples = read_conversations(files / "mix.json", files)
    processor = t.AutoProcessor.from_pretrained(llava)
    model = t.AutoModelForImageTextToText.from_pretrained(llava).eval()
    collate = Collator(processor, plain=False, max_length=99)
    batch = collate(samples[:4])
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [16, 0, 16, 0]
    batch.pop("labels")
    with torch.no_grad():
        together = model(**batch).logits
        for row, sample in enumerate(samples[:4]):
            single = collate([sample])
            alone = model(**{key: value for key, value in single.items() if key != "labels"}).logits[0]
            torch.testing.assert_close(together[row, : len(alone)], alone, atol=1e-5, rtol=1e-4)


def test_stage_1_crops_and_stage_2_pads(llava: Path, files: Path) -> None:
    processor = t.AutoProcessor.from_pretrained(llava)
    samples = read_conversations(files / "captions.json", files)[:1]
    cropped, padded = (
        Collator(processor, plain=plain, max_length=99)(samples)["pixel_values"][0] for plain in (True, False)
    )
    assert (cropped - cropped[:, :1, :1]).abs().max() < 1e-5 and (padded - padded[:, :1, :1]).abs().max() > 0.5


def towers(family: str, folder: Path, clip: Path) -> Path:
    """The tower of a family, random."""
    shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8}
    square = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    torch.manual_seed(1)
    if family == "clip":
        return clip
    if family == "siglip":
        t.SiglipVisionModel(t.SiglipVisionConfig(**shape, image_size=32)).save_pretrained(folder)
    else:
        pytest.importorskip("timm")
        arguments = {"img_size": 28, "depth": 2, "embed_dim": 48, "num_heads": 4}
        config = t.TimmWrapperConfig(architecture="eva02_tiny_patch14_224", model_args=arguments)
        t.TimmWrapperModel(config).save_pretrained(folder)
        square = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    t.CLIPImageProcessor(**square).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "family", ["clip", pytest.param("siglip", marks=pytest.mark.ci), pytest.param("eva02", marks=pytest.mark.ci)]
)
def test_both_stages_learn_and_the_answer_depends_on_the_image(
    family: str, llava: Path, tiny_llm: Path, tiny_tower: Path, files: Path, tmp_path: Path
) -> None:
    """The tower is frozen in both; stage 1 leaves the LLM as it is; a blind model cannot know the colours."""
    settings = {"tower": str(towers(family, tmp_path / "tower", tiny_tower)), "llm": str(tiny_llm)}
    made = make_llava(MakeConfig(**settings, template=str(llava.parent / "template"), out=tmp_path / "made"))
    small = {"images": files, "batch_size": 8, "micro_batch_size": 8, "workers": 0, "gradient_checkpointing": False}
    captions = {"data": files / "captions.json", "learning_rate": 3e-2}
    first = train(TrainConfig(model=made, stage=1, out=tmp_path / "1", steps=12, **captions, **small))
    how = {"model": first, "data": files / "mix.json", "stage": 2, "learning_rate": 1e-2, **small}
    second = train(TrainConfig(**how, out=tmp_path / "2", steps=50))
    blind = train(TrainConfig(**how, out=tmp_path / "blind", steps=12, blind=True))
    losses = {
        folder: [line["loss"] for line in json.loads((folder / "manifest.json").read_text())["log"]]
        for folder in (first, second, blind)
    }
    assert losses[first][-1] < losses[first][0] - 0.02 and len(losses[first]) == 12
    assert losses[second][-1] < 0.15 < 0.3 < losses[blind][-1]
    states = [t.AutoModelForImageTextToText.from_pretrained(each).state_dict() for each in (made, first, second)]
    moved = [
        {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
        for before, after in itertools.pairwise(states)
    ]
    assert moved[0] == {"multi_modal_projector"}
    assert moved[1] == {"multi_modal_projector", "language_model", "weight"}  # the last is lm_head's
    model, processor = t.AutoModelForImageTextToText.from_pretrained(second), t.AutoProcessor.from_pretrained(second)
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "shows colour"}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    for name in COLOURS:
        image = Image.open(files / "coco" / f"{name}.png")
        batch = processor(text=[text], images=[image], return_tensors="pt")
        answer = model.generate(**batch, max_new_tokens=3, do_sample=False)[0, batch["input_ids"].shape[1] :]
        assert processor.decode(answer, skip_special_tokens=True).strip() == name
    assert not (second / "checkpoints").exists()
    assert train(TrainConfig(**how, out=tmp_path / "2", steps=50)) == second  # done: nothing is run


def test_lora_is_merged_and_only_the_llm_and_projector_have_it(llava: Path, files: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        model=llava, data=files / "mix.json", images=files, out=tmp_path / "out", stage=2, steps=2, batch_size=4,
        micro_batch_size=4, lora_rank=2, workers=0,
    )  # fmt: skip
    learning = {
        name for name, p in open_model(config, frozen_dtype=torch.float32).named_parameters() if p.requires_grad
    }
    assert all("lora_" in name or "multi_modal_projector.modules_to_save" in name for name in learning)
    assert sum("lora_A" in name for name in learning) == 2 * 7 and not any("vision_tower" in name for name in learning)
    folder = train(config)
    before, after = (t.AutoModelForImageTextToText.from_pretrained(each).state_dict() for each in (llava, folder))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(moved) == 2 * 7 + 4 and not any("vision_tower" in name or "norm" in name for name in moved)


@pytest.mark.parametrize("lora_rank", [0, pytest.param(2, marks=pytest.mark.ci)])
def test_a_killed_run_goes_on_and_ends_in_the_same_weights(
    lora_rank: int, llava: Path, files: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "model": llava, "data": files / "mix.json", "images": files, "stage": 2, "steps": 4, "batch_size": 4,
        "micro_batch_size": 2, "save_every": 2, "workers": 0, "learning_rate": 1e-2, "lora_rank": lora_rank,
    }  # fmt: skip
    whole = train(TrainConfig(**settings, out=tmp_path / "whole"))
    killed = TrainConfig(**settings, out=tmp_path / "killed")

    class Kill(t.TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def killing(*args: Any) -> Any:
            trainer = new_trainer(*args)
            trainer.add_callback(Kill)
            return trainer

        patch.setattr("examples.llava.train.new_trainer", killing)
        train(killed)
    assert (tmp_path / "killed" / "checkpoints" / "checkpoint-2").is_dir()
    train(killed)
    one, other = (t.AutoModelForImageTextToText.from_pretrained(each).state_dict() for each in (whole, killed.out))
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.ci
def test_weights_are_saved_in_the_precision_they_had(llava: Path, files: Path, tmp_path: Path) -> None:
    settings = {"tower": str(tmp_path / "tower"), "llm": str(tmp_path / "llm"), "dtype": "bfloat16"}
    model = t.AutoModelForImageTextToText.from_pretrained(llava)
    t.CLIPVisionModel.from_pretrained(llava, config=model.config.vision_config).save_pretrained(tmp_path / "tower")
    llm = t.LlamaForCausalLM(model.config.text_config)
    llm.save_pretrained(tmp_path / "llm")
    t.AutoTokenizer.from_pretrained(llava).save_pretrained(tmp_path / "llm")
    half = make_llava(MakeConfig(**settings, template=str(llava.parent / "template"), out=tmp_path / "half"))
    data = {"data": files / "mix.json", "images": files, "steps": 1, "batch_size": 4, "micro_batch_size": 4}
    for rank in (0, 2):
        config = TrainConfig(model=half, **data, stage=2, lora_rank=rank, workers=0, out=tmp_path / f"out-{rank}")
        found = t.AutoModelForImageTextToText.from_pretrained(train(config), dtype="auto")
        assert {weight.dtype for weight in found.parameters()} == {torch.bfloat16}, rank


def test_the_recipe(llava: Path, files: Path, tmp_path: Path) -> None:
    """LLaVA-1.5's: batch 256 and 128, 1e-3 and 2e-5, cosine after 3 % of warm-up, no weight decay, one epoch."""
    samples = read_conversations(files / "captions.json", files)
    for stage, batch, rate in ((1, 256, 1e-3), (2, 128, 2e-5)):
        config = TrainConfig(model=llava, data=files / "captions.json", images=files, out=tmp_path, stage=stage)
        arguments = new_trainer(config, samples).args
        assert arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == batch
        assert (arguments.learning_rate, arguments.weight_decay, arguments.num_train_epochs) == (rate, 0, 1)
        assert arguments.lr_scheduler_type == "cosine" and arguments.get_warmup_steps(1000) == 30
    for settings, said in [
        ({"stage": 3}, "stage: '3'|stage.*3"),
        ({"stage": 1, "lora_rank": 4}, "lora_rank is of stage 2"),
        ({"stage": 1, "blind": True}, "blind is of stage 2"),
    ]:
        with pytest.raises(UsageError, match=said):
            TrainConfig(model=llava, data=files, images=files, out=tmp_path, **settings)
    with pytest.raises(UsageError, match=r"batch_size 20 is no multiple of 16, .*batch_size=16"):
        odd = TrainConfig(model=llava, data=files, images=files, out=tmp_path, stage=1, batch_size=20)
        new_trainer(odd, samples)


def test_a_first_turn_of_the_assistant_is_dropped_and_who_speaks_twice_left_out(
    files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"id": "greets", "conversations": [gpt("hello"), human("colour"), gpt("red")]},
        {"id": "twice", "conversations": [human("colour"), gpt("red"), gpt("blue")]},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with caplog.at_level("WARNING", "llm2clip"):
        (sample,) = read_conversations(tmp_path / "a.json", files)
    assert [message["content"] for message in sample.messages] == ["colour", "red"]
    assert "1 of 2 samples left out, the same speaks twice: twice" in caplog.text


@pytest.mark.parametrize("settings", [{"stage": 1}, {"stage": 2}, {"stage": 2, "lora_rank": 2}])
def test_what_learns_is_float32_beside_frozen_bf16(
    settings: dict[str, int], llava: Path, files: Path, tmp_path: Path
) -> None:
    config = TrainConfig(model=llava, data=files / "mix.json", images=files, out=tmp_path / "out", **settings)
    model = open_model(config, frozen_dtype=torch.bfloat16)
    dtypes = {wanted: {p.dtype for p in model.parameters() if p.requires_grad is wanted} for wanted in (True, False)}
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}
    if "lora_rank" in settings:
        return
    learned = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():  # what bf16 cannot hold
        for p in model.parameters():
            p.data = p.data.float()
            p.add_(1e-4 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    model.save_pretrained(tmp_path / "out" / "checkpoints" / "checkpoint-1")
    wanted = {name: p.detach().clone() for name, p in model.named_parameters() if name in learned}
    again = dict(open_model(config, frozen_dtype=torch.bfloat16).named_parameters())
    assert all(torch.equal(again[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("changes", [{"steps": 0}, {"warmup": 3.0}, {"lora_rank": -2}, {"learning_rate": 0.0}])
def test_impossible_settings_are_refused(changes: dict[str, float], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=next(iter(changes))):
        TrainConfig(**{"model": tmp_path, "data": tmp_path, "images": tmp_path, "out": tmp_path, "stage": 2, **changes})
