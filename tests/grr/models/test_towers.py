"""Towers of transformers: their features, their modes, and what a CoCa around one makes of them."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from tower_folders import FAMILIES, PROCESSOR, SIZE, family, features, saved

import grr
from grr.components import adapter_parameters
from grr.data.images import normalize
from grr.inference.towers import find_tower, load_tower
from grr.models.coca import CoCa, encode_pixels, evaluating
from grr.models.towers import Tower, tower_coca
from grr.models.tuning import tune_parts
from grr.parallel.blocks import blocks
from grr.parallel.initialize import initialize
from grr.parallel.parallelize import parallelize
from grr.training.optim import adamw

pytest.importorskip("transformers", reason='pip install "grr-coca[transformers]"')

CPU = torch.device("cpu")
SIZES = {"dim": 16, "num_heads": 2, "text_layers": 1, "multimodal_layers": 1, "vocab_size": 50, "context_length": 8}


def captioner(folder: Path, **changes) -> CoCa:
    return captioner_of(f"hf/{folder}", **changes)


def captioner_of(name: str, **changes) -> CoCa:
    """A CoCa around a tower, built on the meta device and filled, as a recipe does it."""
    tower = find_tower(name)
    with torch.device("meta"):
        model = grr.create_model("tower_coca", **tower.arguments | {**SIZES, "num_queries": 4} | changes)
    initialize(model, CPU, seed=0)
    load_tower(tower, model)
    return model


def images(count: int = 2, size: int = SIZE) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def ids() -> Tensor:
    return torch.tensor([[3, 9, 8, 1, 4, 0, 0, 0], [3, 7, 6, 5, 1, 4, 0, 0]])


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_those_of_transformers(name, tmp_path):
    original = saved(name, tmp_path)
    tower = captioner(tmp_path).vision_encoder.eval()
    with torch.no_grad():
        ours, theirs = tower(images()), features(original, images())
    if theirs.ndim == 4:  # [b, d, rows, columns] in raster order
        theirs = torch.stack([theirs[:, :, y, x] for y in range(theirs.shape[2]) for x in range(theirs.shape[3])], 1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert ours.shape[2] == tower.dim
    assert theirs.std() > 0.01  # not all alike


@pytest.mark.parametrize("name", ["dinov2", "dinov3_vit", "clip", "siglip", "vit"])
def test_images_of_another_size_are_read_by_interpolated_positions(name, tmp_path):
    original = saved(name, tmp_path)
    tower = captioner(tmp_path, image_size=48).vision_encoder.eval()
    takes = {} if name.startswith("dino") else {"interpolate_pos_encoding": True}
    theirs = getattr(original, "vision_model", original)(pixel_values=images(size=48), **takes).last_hidden_state
    torch.testing.assert_close(tower(images(size=48)), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["vit", "clip"])
def test_pixels_are_normalised_as_by_the_towers_own_image_processor(name, tmp_path):
    from transformers import AutoImageProcessor

    saved(name, tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    model = captioner(tmp_path)
    pixels = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    theirs = processor(list(pixels), return_tensors="pt", do_resize=False)["pixel_values"]
    ours: list[Tensor] = []
    model.vision_encoder.register_forward_pre_hook(lambda _, inputs: ours.append(inputs[0]))
    encode_pixels(model.vision_encoder, pixels)
    torch.testing.assert_close(ours[0], theirs, rtol=0, atol=1e-6)
    assert not torch.allclose(ours[0], normalize(pixels), atol=0.1)  # not ImageNet's


def count_saved(model: CoCa) -> tuple[int, int]:
    """Returns how many tensors the vision encoder, and the rest of the model, keep for the backward pass."""
    counts = {"tower": 0, "rest": 0}
    where = ["rest"]
    model.vision_encoder.register_forward_pre_hook(lambda *_: where.append("tower"))
    model.vision_encoder.register_forward_hook(lambda *_: where.append("rest"))

    def count(x: Tensor) -> Tensor:
        counts[where[-1]] += 1
        return x

    with saved_tensors_hooks(count, lambda x: x):
        output = model(images(), ids())
    (output.image_embeddings.sum() + output.logits.sum()).backward()
    return counts["tower"], counts["rest"]


def test_a_frozen_tower_keeps_nothing_for_a_backward_pass_and_has_no_gradients(tmp_path):
    saved("dinov2", tmp_path)
    frozen, trained = captioner(tmp_path), captioner(tmp_path)
    tune_parts(frozen, frozen=("vision_encoder",))
    tower, rest = count_saved(frozen)
    assert tower == 0
    assert rest > 20
    assert count_saved(trained)[0] > 20
    assert all(p.grad is None for p in frozen.vision_encoder.parameters())
    assert frozen.pooler_norm.linear.weight.grad.abs().sum() > 0  # the projection is trained
    unused = {name for name, p in trained.vision_encoder.named_parameters() if p.grad is None}
    assert unused == {"inner.embeddings.mask_token"}
    in_optimizer = {id(p) for group in adamw(frozen).param_groups for p in group["params"]}
    assert in_optimizer == {id(p) for p in frozen.parameters()} - {id(p) for p in frozen.vision_encoder.parameters()}


def test_a_frozen_tower_stays_in_evaluation_mode_and_one_with_adapters_does_not(tmp_path):
    saved("dinov2", tmp_path)
    model = captioner(tmp_path)
    assert model.vision_encoder.training
    tune_parts(model, frozen=("vision_encoder",))
    for _ in range(2):
        assert not any(module.training for module in model.vision_encoder.modules())
        assert model.text_decoder.training
        with evaluating(model):
            pass
        model.train()
    adapted = captioner(tmp_path)
    tune_parts(adapted, lora=("vision_encoder",), projections=("q_proj", "v_proj"))
    adapted.train()
    assert adapted.vision_encoder.inner.encoder.layer[0].training
    assert len(adapter_parameters(adapted)) == 8
    assert count_saved(adapted)[0] > 0


def test_batch_norms_keep_their_statistics_while_the_tower_is_trained(tmp_path):
    saved("resnet", tmp_path)
    model = captioner(tmp_path).train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    assert before
    optimizer = adamw(model, lr=0.1)
    model(images(), ids()).image_embeddings[0, 0].backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert all(p.grad is not None for p in model.vision_encoder.parameters())


def test_random_weights_are_drawn_by_the_library_from_the_seed_alone(tmp_path):
    saved("dinov2", tmp_path)
    tower = find_tower(f"hf/{tmp_path}", weights="random")

    def drawn(seed: int) -> CoCa:
        with torch.device("meta"):
            model = grr.create_model("tower_coca", **tower.arguments, **SIZES)
        initialize(model, CPU, seed=seed)
        load_tower(tower, model)
        return model

    first, again, other = (dict(drawn(seed).vision_encoder.named_parameters()) for seed in (0, 0, 1))
    name = "inner.encoder.layer.0.mlp.fc1.weight"
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert not torch.equal(first[name], other[name])
    assert first[name].std().item() == pytest.approx(0.02, rel=0.1)  # initializer_range of its config
    assert not torch.equal(first[name], dict(saved("dinov2", tmp_path).named_parameters())[name[6:]])


def test_blocks_are_found_and_layers_counted_for_layer_decay(tmp_path):
    saved("dinov2", tmp_path)
    model = captioner(tmp_path)
    assert [type(block).__name__ for block in blocks(model)][:2] == ["Dinov2Layer", "Dinov2Layer"]
    optimizer = adamw(model, lr=1.0, layer_decay=0.5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    inner = model.vision_encoder.inner
    layers = inner.embeddings.cls_token, inner.encoder.layer[0].norm1.weight, inner.encoder.layer[1].norm1.weight
    assert [rates[id(p)] for p in (*layers, inner.layernorm.weight)] == [0.125, 0.25, 0.5, 1.0]


@pytest.mark.parametrize("options", [{"bf16": True}, {"activation_checkpointing": True, "bf16": True}])
def test_towers_are_trained_in_bfloat16_and_recomputed(options, tmp_path):
    saved("dinov2", tmp_path)
    exact, model = captioner(tmp_path), captioner(tmp_path)
    parallelize(model, CPU, **options)
    for one in (exact, model):
        one(images(), ids()).image_embeddings[0, :3].sum().backward()
    name = "vision_encoder.inner.encoder.layer.0.mlp.fc1.weight"
    ours, theirs = (dict(m.named_parameters())[name].grad.flatten() for m in (model, exact))
    assert ours.dtype == torch.float32
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.99


def test_a_tower_reads_floats_and_is_built_from_a_description():
    with pytest.raises(ValueError, match=r"vision_config and image_size must describe the tower hf/x, got vision_conf"):
        tower_coca(vision_encoder="hf/x")
    with pytest.raises(ValueError, match=r"library must be one of transformers, timm, got 'keras'; was the"):
        Tower({"library": "keras", "config": {}, "mean": [0] * 3, "std": [1] * 3}, image_size=8)


def test_a_missing_library_is_named_with_its_extra(monkeypatch, tmp_path):
    saved("vit", tmp_path)
    description = find_tower(f"hf/{tmp_path}").description
    monkeypatch.setitem(sys.modules, "transformers", None)
    for build in (
        lambda: find_tower(f"hf/{tmp_path}"),
        lambda: tower_coca(vision_encoder="hf/x", vision_config=description, image_size=SIZE, **SIZES),
    ):
        with pytest.raises(ImportError, match=r'need the package transformers, got .*; pip install "grr-coca\[transfo'):
            build()


def test_a_module_that_takes_other_inputs_is_refused(tmp_path):
    family("bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"forward pass needs pixel_values alone, got 'bert', BertModel\(input_ids, "):
        find_tower(f"hf/{tmp_path}")


def test_the_statistics_of_images_are_the_towers(tmp_path):
    saved("vit", tmp_path)
    tower = captioner(tmp_path).vision_encoder
    assert isinstance(tower, nn.Module)
    assert (tower.image_mean, tower.image_std) == (tuple(PROCESSOR["image_mean"]), tuple(PROCESSOR["image_std"]))
