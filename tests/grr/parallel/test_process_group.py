"""A sharded model is filled whole, from its names, and gathering is exact. Many processes: see test_step."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from grr.models.builders import grr_coca_tiny
from grr.parallel.parallelize import parallelize
from grr.parallel.process_group import (
    all_sum,
    blocks,
    clip_gradients,
    derive_seed,
    gather,
    materialize,
    shard_over,
    unsharded,
)

pytestmark = pytest.mark.usefixtures("process_group")

OPTIONS = {
    "vision_position": "rope_mixed",
    "text_position": "learned",
    "qk_norm": True,
    "pooler_norm": True,
    "learned_temperature": True,
}


def filled(*, seed: int = 0, sharded: bool = True, **options) -> nn.Module:
    with torch.device("meta"):
        model = grr_coca_tiny(**options)
    if sharded:
        shard_over(model, init_device_mesh("cpu", (1,)))
    materialize(model, torch.device("cpu"), seed=seed)
    return model


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.state_dict().items()}


def test_a_process_that_keeps_the_whole_model_gathers_it_in_one_piece():
    assert [name for name, m in filled().named_modules() if isinstance(m, FSDPModule)] == [""]


def test_a_process_alone_keeps_plain_parameters():
    model = grr_coca_tiny()
    parallelize(model, torch.device("cpu"))
    assert {type(p) for p in model.parameters()} == {nn.Parameter}
    assert not any(isinstance(module, FSDPModule) for module in model.modules())


def test_clipping_tells_the_norm_before_of_plain_and_of_sharded_parameters():
    images, ids = torch.rand(2, 3, 32, 32), torch.tensor([[510, 7, 1, 511], [510, 8, 1, 511]])
    for model in (filled(), filled(sharded=False)):
        model(images, ids).logits.square().sum().backward()
        grads = {
            n: g.full_tensor() if hasattr(g, "full_tensor") else g
            for n, p in model.named_parameters()
            if (g := p.grad) is not None
        }
        norm = sum(g.double().square().sum() for g in grads.values()).sqrt().item()
        before = {n: g.clone() for n, g in grads.items()}
        assert clip_gradients(model, 0.5) == pytest.approx(norm, rel=1e-5)
        for name, p in model.named_parameters():
            if p.grad is not None:
                now = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                torch.testing.assert_close(now, before[name] * 0.5 / norm, rtol=1e-4, atol=1e-8)


def test_no_parameter_of_any_option_is_left_unfilled(monkeypatch):
    with torch.device("meta"):
        model = grr_coca_tiny(**OPTIONS)
    for name in ("empty", "empty_like"):  # new memory is often zero by chance: make it NaN, so that nothing hides
        empty = getattr(torch, name)
        poisoned = lambda *args, empty=empty, **kwargs: empty(*args, **kwargs).fill_(float("nan"))  # noqa: E731
        monkeypatch.setattr(torch, name, poisoned)
    materialize(model, torch.device("cpu"), seed=0)
    assert [name for name, p in model.named_parameters() if not p.isfinite().all()] == []


def test_weights_depend_on_the_seed_and_the_name_alone():
    whole, sharded, other = filled(sharded=False), filled(), filled(seed=1)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(sharded)[name], value, rtol=0, atol=0)
    changed = [n for n, v in weights(other).items() if not torch.equal(v, weights(whole)[n])]
    assert "vision_encoder.blocks.0.attention.qkv.weight" in changed
    first, second = (whole.vision_encoder.blocks[i].attention.qkv.weight for i in (0, 1))
    assert not torch.equal(first, second)


def test_weights_are_drawn_from_the_distributions_that_building_without_meta_draws_from():
    torch.manual_seed(0)
    for (name, ours), built in zip(filled(sharded=False).named_parameters(), grr_coca_tiny().parameters(), strict=True):
        if ours.numel() > 1000:
            assert ours.std().item() == pytest.approx(built.std().item(), rel=0.15), name


def test_tied_embeddings_stay_tied():
    for sharded in (False, True):
        model = filled(tied_embeddings=True, sharded=sharded)
        assert model.multimodal_decoder.head.weight is model.text_decoder.embedding.weight


def test_a_module_that_cannot_fill_itself_is_named():
    class Mystery(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    with torch.device("meta"):
        model = nn.Sequential(Mystery())
    with pytest.raises(ValueError, match=r"0 \(Mystery\); give them a reset_parameters\(\) method"):
        materialize(model, torch.device("cpu"), seed=0)


def test_a_sharded_model_is_the_same_function_and_so_it_is_while_unsharded():
    model, plain = filled().eval(), filled(sharded=False).eval()
    images, ids = torch.rand(2, 3, 32, 32), torch.tensor([[510, 7, 1, 511], [510, 8, 1, 511]])
    with torch.no_grad():
        expected = plain(images, ids)
        torch.testing.assert_close(model(images, ids).logits, expected.logits)
        with unsharded(model):
            torch.testing.assert_close(model.encode_image(images), expected.image_embeddings)
            context = model.image_context(images)
            caches = model.caches(context.shape[1], 4)
            logits = model.next_token_logits(ids, context, positions=torch.arange(4), caches=caches)
            torch.testing.assert_close(logits, expected.logits[:, -1])
    model(images, ids).logits.sum().backward()  # training goes on
    assert all(hasattr(p, "full_tensor") for p in model.parameters())


@pytest.mark.slow
def test_a_sharded_compiled_model_is_the_same_function():
    with torch.device("meta"):
        model = grr_coca_tiny()
    parallelize(model, torch.device("cpu"), compile=True)
    materialize(model, torch.device("cpu"), seed=0)
    images, ids = torch.rand(2, 3, 32, 32), torch.tensor([[510, 7, 1, 511], [510, 8, 1, 511]])
    torch.testing.assert_close(model(images, ids).logits, filled(sharded=False)(images, ids).logits)


def test_a_number_of_processes_that_replicas_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="must be a multiple of dp_replicate, got world=1, dp_replicate=2"):
        parallelize(grr_coca_tiny(), torch.device("cpu"), dp_replicate=2)


def test_gathering_in_one_process_is_the_identity_with_its_gradient():
    x = torch.randn(3, 4, requires_grad=True)
    gather(x).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())
    assert all_sum(1, 2.5) == [1, 2.5]


def test_seeds_are_mixed_well():
    seeds = {derive_seed(a, b) for a in range(30) for b in range(30)} | {derive_seed(0, "a"), derive_seed(0, "b")}
    assert len(seeds) == 902
    assert all(0 <= s < 2**63 for s in seeds)


def test_blocks_finds_all_three_towers():
    assert len(list(blocks(grr_coca_tiny()))) == 6
