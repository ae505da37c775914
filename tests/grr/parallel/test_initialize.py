"""The initial weights of a model that was built on the meta device."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from grr.models.builders import grr_coca_tiny
from grr.parallel.initialize import initialize
from grr.parallel.shard import shard_over

pytestmark = pytest.mark.usefixtures("process_group")

OPTIONS = {
    "vision_position": "rope_mixed",
    "text_position": "learned",
    "qk_norm": True,
    "pooler_norm": True,
    "learned_temperature": True,
}


def initialized(*, seed: int = 0, sharded: bool = True, **options) -> nn.Module:
    with torch.device("meta"):
        model = grr_coca_tiny(**options)
    if sharded:
        shard_over(model, init_device_mesh("cpu", (1,)))
    initialize(model, torch.device("cpu"), seed=seed)
    return model


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.state_dict().items()}


def test_no_parameter_of_any_option_is_left_uninitialized(monkeypatch):
    with torch.device("meta"):
        model = grr_coca_tiny(**OPTIONS)
    for name in ("empty", "empty_like"):  # new memory is often zero by chance: make it NaN, so that nothing hides
        empty = getattr(torch, name)
        poisoned = lambda *args, empty=empty, **kwargs: empty(*args, **kwargs).fill_(float("nan"))  # noqa: E731
        monkeypatch.setattr(torch, name, poisoned)
    initialize(model, torch.device("cpu"), seed=0)
    assert [name for name, p in model.named_parameters() if not p.isfinite().all()] == []


def test_weights_depend_on_the_seed_and_the_name_alone():
    whole, sharded, other = initialized(sharded=False), initialized(), initialized(seed=1)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(sharded)[name], value, rtol=0, atol=0)
    changed = [n for n, v in weights(other).items() if not torch.equal(v, weights(whole)[n])]
    assert "vision_encoder.blocks.0.attention.qkv.weight" in changed
    first, second = (whole.vision_encoder.blocks[i].attention.qkv.weight for i in (0, 1))
    assert not torch.equal(first, second)


def test_weights_are_drawn_from_the_distributions_that_building_without_meta_draws_from():
    torch.manual_seed(0)
    ours = dict(initialized(sharded=False).named_parameters())
    for name, built in grr_coca_tiny().named_parameters():
        if built.numel() > 1000:
            assert ours[name].std().item() == pytest.approx(built.std().item(), rel=0.15), name


def test_tied_embeddings_stay_tied():
    for sharded in (False, True):
        model = initialized(tied_embeddings=True, sharded=sharded)
        assert model.multimodal_decoder.head.weight is model.text_decoder.embedding.weight


def test_a_module_without_reset_parameters_is_named():
    class Mystery(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    with torch.device("meta"):
        model = nn.Sequential(Mystery())
    with pytest.raises(ValueError, match=r"0 \(Mystery\); give them a reset_parameters\(\) method"):
        initialize(model, torch.device("cpu"), seed=0)
