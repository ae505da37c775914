"""Linear layers through oneDNN compute the same function, and are restored afterwards."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from grr.generation.cpu_linear import onednn_linears
from grr.models.builders import grr_coca_tiny
from grr.parallel.parallelize import parallelize

DTYPES = [torch.float32, torch.bfloat16]


def replaced(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and "forward" in m.__dict__]


@given(
    rows=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 70),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_it_equals_the_linear_layer_for_any_sizes(rows, inputs, outputs, bias, dtype, seed):
    torch.manual_seed(seed)
    linear = nn.Linear(inputs, outputs, bias=bias)
    x = torch.randn(*rows, inputs)
    exact = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    with torch.no_grad(), onednn_linears(linear.to(dtype)):
        y = linear(x.to(dtype))
    assert (y.dtype, y.shape) == (dtype, exact.shape)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_decoder_has_the_same_scores_and_its_layers_are_restored_after_an_error(dtype):
    model = grr_coca_tiny().to(dtype).eval()
    ids, images = torch.tensor([[510, 7, 1, 511]] * 3), torch.rand(3, 3, 32, 32)

    def scores() -> torch.Tensor:
        with torch.no_grad():
            context = model.image_context(images.to(dtype))
            caches = model.caches(context.shape[1], 4)
            return model.next_token_logits(ids, context, positions=torch.arange(4), caches=caches).float()

    expected = scores()
    with onednn_linears(model.text_decoder, model.multimodal_decoder):
        assert "multimodal_decoder.head" in replaced(model)
        assert not any(name.startswith("vision_encoder") for name in replaced(model))
        torch.testing.assert_close(scores(), expected, rtol=0.02, atol=1e-5 if dtype == torch.float32 else 0.05)
        with onednn_linears(model.text_decoder):  # within another one, nothing changes
            pass
        assert "text_decoder.blocks.0.attention.qkv" in replaced(model)
    assert replaced(model) == []
    with pytest.raises(ZeroDivisionError), onednn_linears(model):
        1 / 0  # noqa: B018
    assert replaced(model) == []


def test_layers_that_onednn_cannot_read_are_unchanged():
    compiled, double = grr_coca_tiny(), grr_coca_tiny().double()
    parallelize(compiled, torch.device("cpu"), compile=True)
    with onednn_linears(compiled, double):
        assert replaced(double) == []
        assert replaced(compiled) == [n for n in replaced(compiled) if ".blocks." not in n] != []


def test_quantised_layers_are_unchanged():
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed: the extra quantize")
    linear = nn.Sequential(nn.Linear(64, 64))
    quantization.quantize_(linear, quantization.Int8WeightOnlyConfig())
    with onednn_linears(linear):
        assert replaced(linear) == []
