"""A sharded model computes what the plain one does. Many processes: see test_step."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from grr.models.builders import grr_coca_tiny
from grr.parallel.initialize import initialize
from grr.parallel.parallelize import parallelize
from grr.parallel.shard import blocks, shard_over, unsharded
from grr.training.optim import clip_gradients

pytestmark = pytest.mark.usefixtures("process_group")


def initialized(*, seed: int = 0, sharded: bool = True, **options) -> nn.Module:
    with torch.device("meta"):
        model = grr_coca_tiny(**options)
    if sharded:
        shard_over(model, init_device_mesh("cpu", (1,)))
    initialize(model, torch.device("cpu"), seed=seed)
    return model


def test_a_process_that_keeps_the_whole_model_gathers_it_in_one_piece():
    assert [name for name, m in initialized().named_modules() if isinstance(m, FSDPModule)] == [""]


def test_a_process_alone_keeps_plain_parameters():
    model = grr_coca_tiny()
    parallelize(model, torch.device("cpu"))
    assert {type(p) for p in model.parameters()} == {nn.Parameter}
    assert not any(isinstance(module, FSDPModule) for module in model.modules())


def test_clipping_tells_the_norm_before_of_plain_and_of_sharded_parameters():
    images, ids = torch.rand(2, 3, 32, 32), torch.tensor([[510, 7, 1, 511], [510, 8, 1, 511]])
    for model in (initialized(), initialized(sharded=False)):
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


def test_a_sharded_model_is_the_same_function_and_so_it_is_while_unsharded():
    model, plain = initialized().eval(), initialized(sharded=False).eval()
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
    initialize(model, torch.device("cpu"), seed=0)
    images, ids = torch.rand(2, 3, 32, 32), torch.tensor([[510, 7, 1, 511], [510, 8, 1, 511]])
    torch.testing.assert_close(model(images, ids).logits, initialized(sharded=False)(images, ids).logits)


def test_a_number_of_processes_that_replicas_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="must be a multiple of dp_replicate, got world=1, dp_replicate=2"):
        parallelize(grr_coca_tiny(), torch.device("cpu"), dp_replicate=2)


def test_blocks_finds_all_three_towers():
    assert len(list(blocks(grr_coca_tiny()))) == 6
