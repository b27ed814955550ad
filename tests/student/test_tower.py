"""Pooling, resizing and patch dropout of towers."""

import pytest
import torch
from transformers import CLIPVisionModel, SiglipVisionModel

from llm2clip.student.tower import (
    PatchDropout,
    add_patch_dropout,
    checkpoint_activations,
    default_pooling,
    pooled_output,
    prune_tower,
    resample_positions,
    resize_tower,
    tower_blocks,
    tower_width,
)


def test_positions_keep_the_class_token_and_the_mean() -> None:
    table = torch.randn(1 + 16, 8)
    larger = resample_positions(table, torch.Size([1 + 64, 8]))
    torch.testing.assert_close(larger[0], table[0])
    torch.testing.assert_close(larger[1:].mean(0), table[1:].mean(0), atol=0.1, rtol=0)
    assert resample_positions(table, table.shape) is table


def test_positions_of_a_plane_stay_a_plane() -> None:
    rows = torch.arange(8.0).repeat_interleave(8)
    smaller = resample_positions(rows[:, None], torch.Size([16, 1])).reshape(4, 4)
    torch.testing.assert_close(smaller, torch.tensor([0.5, 2.5, 4.5, 6.5])[:, None].expand(4, 4), atol=0.2, rtol=0)


def test_resized_tower_gives_nearly_the_same_on_a_flat_image(tiny_tower) -> None:
    from transformers import CLIPVisionModel

    tower = CLIPVisionModel.from_pretrained(tiny_tower).eval()
    larger = resize_tower(tower, image_size=64).eval()
    assert larger.config.image_size == 64
    flat = torch.full((1, 3, 64, 64), 0.5)
    a, b = tower(flat[..., :32, :32]).pooler_output, larger(flat).pooler_output
    assert torch.cosine_similarity(a, b) > 0.98
    with pytest.raises(ValueError, match="use 32 or 40"):
        resize_tower(tower, image_size=36)


@pytest.mark.parametrize(("family", "pooling"), [("vit", "cls"), ("clip-vision", "pooler"), ("dinov2", "pooler")])
def test_the_pooled_vector_is_the_family_s_own_but_where_its_pooler_is_untrained(towers, family, pooling) -> None:
    from transformers import AutoModel

    from llm2clip.student.start import start_student

    whole = AutoModel.from_pretrained(towers[family]).eval()
    assert default_pooling(whole.config) == pooling
    student = start_student(str(towers[family]), teacher_dim=8, projection_dim=4).eval()
    assert student.config.pooling == pooling
    assert family != "vit" or student.tower.pooler is None
    image = torch.rand(2, 3, 32, 32)
    outputs = whole(image)
    pooled = outputs.last_hidden_state[:, 0] if pooling == "cls" else outputs.pooler_output
    torch.testing.assert_close(student.get_image_features(image), student.visual_projection(pooled))


def test_blocks_are_found_in_order(towers) -> None:
    from transformers import AutoModel

    for name in ("clip-vision", "siglip-vision", "dinov2", "dinov3", "vit"):
        blocks = tower_blocks(AutoModel.from_pretrained(towers[name]))
        assert [block[0].rpartition(".")[2] for block in blocks] == ["0", "1"], name


def test_patch_dropout_keeps_prefix_and_order() -> None:
    torch.manual_seed(0)
    tokens = torch.arange(11.0).expand(5, 11).unsqueeze(-1)
    drop = PatchDropout(0.5, num_prefix_tokens=1)
    kept = drop(tokens)
    assert kept.shape == (5, 6, 1)
    assert (kept[:, 0] == 0).all()
    assert (kept.diff(dim=1) > 0).all()
    assert len({tuple(row) for row in kept.squeeze(-1).tolist()}) > 1, "every image loses other patches"
    assert drop.eval()(tokens) is tokens


@pytest.mark.parametrize("family", ["clip-vision", "siglip-vision", "dinov2", "vit"])
def test_patch_dropout_shortens_training_only(towers, family) -> None:
    from transformers import AutoModel

    tower = AutoModel.from_pretrained(towers[family])
    image = torch.rand(2, 3, 32, 32)
    before = tower.eval()(image).last_hidden_state
    add_patch_dropout(tower, rate=0.5, image_size=32)
    torch.testing.assert_close(tower.eval()(image).last_hidden_state, before)
    assert tower.train()(image).last_hidden_state.shape[1] == before.shape[1] - 8


def test_patch_dropout_of_timms_eva_takes_rotary_positions_along(towers) -> None:
    pytest.importorskip("timm")
    from transformers import AutoModel

    tower = AutoModel.from_pretrained(towers["timm-eva02"])
    image = torch.rand(2, 3, 28, 28)
    before = tower.eval()(image).last_hidden_state
    add_patch_dropout(tower, rate=0.5, image_size=28)
    torch.testing.assert_close(tower.eval()(image).last_hidden_state, before)
    assert tower.train()(image).last_hidden_state.shape[1] == before.shape[1] - 2
    tower.timm_model.patch_drop.rate = 0.0
    torch.testing.assert_close(tower(image).last_hidden_state, before)


def test_patch_dropout_is_refused_where_positions_are_rotary(towers) -> None:
    from transformers import AutoModel

    with pytest.raises(ValueError, match="dinov3"):
        add_patch_dropout(AutoModel.from_pretrained(towers["dinov3"]), rate=0.5, image_size=32)


def test_a_head_that_is_not_read_is_left_out_and_missed_by_nobody(towers) -> None:
    tower = prune_tower(SiglipVisionModel.from_pretrained(towers["siglip-vision"]), pooling="mean")
    assert not any(name.startswith("head.") for name, _ in tower.named_parameters())
    pixels = torch.zeros(2, 3, 32, 32)
    assert pooled_output(tower, pixels, pooling="mean").shape == (2, 32)
    clip = CLIPVisionModel.from_pretrained(towers["clip-vision"])
    assert dict(prune_tower(clip, pooling="pooler").named_parameters()).keys() == dict(clip.named_parameters()).keys()


def test_a_tower_that_sees_nothing_is_told_with_the_first_line_of_its_reason() -> None:
    class Blind(torch.nn.Module):
        def forward(self, **inputs) -> None:
            raise ValueError("\n no eyes \nat all")

    with pytest.raises(ValueError, match=r"no pooled vector for a 8 px image \(no eyes\)$"):
        tower_width(Blind(), image_size=8, pooling="pooler")


def test_patch_dropout_leaves_one_patch() -> None:
    dropout = PatchDropout(0.99, num_prefix_tokens=1).train()
    assert dropout(torch.randn(2, 17, 4)).shape == (2, 2, 4)


def test_activations_are_recomputed_where_asked(towers) -> None:
    tower = CLIPVisionModel.from_pretrained(towers["clip-vision"]).train()
    seen = []
    block = tower_blocks(tower)[0][1]
    block.mlp.register_forward_pre_hook(lambda *_: seen.append(1))
    for expected in (1, 2):
        seen.clear()
        tower(pixel_values=torch.zeros(1, 3, 32, 32)).pooler_output.sum().backward()
        assert len(seen) == expected
        checkpoint_activations(tower)
