"""Folders that are no vision tower: one clear line each."""

import json

import pytest
import torch

from llm2clip.errors import UsageError
from llm2clip.student.start import open_transform, start_student
from llm2clip.student.transform import ImageTransform


def complaint(tower, **options) -> str:
    with pytest.raises(UsageError) as error:
        start_student(str(tower), teacher_dim=8, projection_dim=4, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_llm_is_no_tower(tiny_llm) -> None:
    assert "llama" in complaint(tiny_llm)


def test_a_teacher_is_no_tower(tmp_path) -> None:
    (tmp_path / "modules.json").write_text("[]")
    assert "teacher" in complaint(tmp_path)


def test_an_empty_folder_and_a_missing_one(tmp_path) -> None:
    assert "no config.json" in complaint(tmp_path)
    assert "is no folder" in complaint(tmp_path / "nowhere")


def test_a_hub_id_that_cannot_be_had() -> None:
    assert "no-such/tower" in complaint("no-such/tower")


def test_a_student_of_ours_goes_on_as_it_is(tiny_tower, tmp_path) -> None:
    """Tower, projection, adaptor, scale and bias; at another size, too."""
    whole = start_student(str(tiny_tower), teacher_dim=8, projection_dim=4, loss="sigmoid")
    torch.nn.init.constant_(whole.logit_bias, -3.0)
    whole.save_pretrained(tmp_path)
    assert "no usable image processor" in complaint(tmp_path)
    ImageTransform(image_size=(32, 32), resize=40).save(tmp_path)
    further = start_student(str(tmp_path), teacher_dim=8, projection_dim=4, loss="sigmoid")
    for name, value in whole.state_dict().items():
        assert torch.equal(further.state_dict()[name], value), name
    assert open_transform(str(tmp_path), image_size=48).resize == 60
    larger = start_student(str(tmp_path), teacher_dim=8, projection_dim=4, image_size=48)
    assert larger.logit_bias is None and larger.tower.embeddings.position_embedding.weight.shape == (37, 32)
    assert torch.equal(larger.adaptor.projection.weight, whole.adaptor.projection.weight)
    with pytest.raises(UsageError, match="reads vectors of 8 numbers, the bank's have 6; build the bank with its own"):
        start_student(str(tmp_path), teacher_dim=6, projection_dim=4)
    with pytest.raises(UsageError, match="is a whole student, which goes on as it is: give dim=4"):
        start_student(str(tmp_path), teacher_dim=8, projection_dim=5)


def test_naflex_is_named(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip2_vision_model"}))
    assert "fixed resolution" in complaint(tmp_path)


def test_a_checkpoint_without_the_towers_weights(tiny_tower, tmp_path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text((tiny_tower / "config.json").read_text())
    save_file({"something.else": torch.zeros(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "lacks" in complaint(tmp_path)


def test_damaged_and_absent_weights(tiny_tower, tmp_path) -> None:
    (tmp_path / "config.json").write_text((tiny_tower / "config.json").read_text())
    assert "cannot be used" in complaint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    assert "cannot be used" in complaint(tmp_path)


def test_a_size_that_does_not_fit(tiny_tower) -> None:
    assert "use 32 or 40" in complaint(tiny_tower, image_size=37)


def test_pickled_weights_run_no_code(tiny_tower, tmp_path) -> None:
    import pickle

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "config.json").write_text((tiny_tower / "config.json").read_text())
    with (tmp_path / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"x": Evil()}, file)
    complaint(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_images_are_prepared_as_the_tower_says_or_as_clip(tiny_tower, tmp_path) -> None:
    import shutil

    tower = tmp_path / "tower"
    shutil.copytree(tiny_tower, tower)
    assert open_transform(str(tower)).image_size == (32, 32)
    assert open_transform(str(tower), image_size=48).image_size == (48, 48)
    (tower / "preprocessor_config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"preprocessor_config\.json cannot be used"):
        open_transform(str(tower))
    (tower / "preprocessor_config.json").unlink()
    assert open_transform(str(tower)).image_size == (32, 32)


def test_a_student_normalises_images_as_its_towers_folder_says(tiny_tower, tmp_path) -> None:
    import shutil

    tower = shutil.copytree(tiny_tower, tmp_path / "tower")
    settings = json.loads((tower / "preprocessor_config.json").read_text())
    settings |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tower / "preprocessor_config.json").write_text(json.dumps(settings))
    student = start_student(str(tower), teacher_dim=8, projection_dim=4)
    assert list(student.config.image_mean) == [0.1, 0.2, 0.3] and list(student.config.image_std) == [0.4, 0.5, 0.6]
    torch.testing.assert_close(student.pixel_mean.flatten(), 255 * torch.tensor([0.1, 0.2, 0.3]))
    torch.testing.assert_close(student.pixel_std.flatten(), 255 * torch.tensor([0.4, 0.5, 0.6]))


def test_what_of_a_checkpoint_is_not_taken_is_named(towers, caplog) -> None:
    with caplog.at_level("INFO", logger="llm2clip"):
        start_student(str(towers["clip"]), teacher_dim=8, projection_dim=4)
    assert "the vision tower is taken of it; left out: logit_scale, text_model (" in caplog.text
    assert "text_projection, visual_projection" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO", logger="llm2clip"):
        start_student(str(towers["dinov2"]), teacher_dim=8, projection_dim=4)
    assert "left out" not in caplog.text


def test_a_tower_whose_config_names_code_of_others_does_not_pass_it_on(tiny_tower, tmp_path) -> None:
    import shutil

    tower = shutil.copytree(tiny_tower, tmp_path / "tower")
    config = json.loads((tower / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "org/else--modeling.EvilModel"}, "architectures": ["EvilModel"]}
    (tower / "config.json").write_text(json.dumps(config))
    student = start_student(str(tower), teacher_dim=8, projection_dim=4)
    student.save_pretrained(tmp_path / "student")
    student.tower.save_pretrained(tmp_path / "again")
    assert "Evil" not in (tmp_path / "student" / "config.json").read_text()
    assert "Evil" not in (tmp_path / "again" / "config.json").read_text()
