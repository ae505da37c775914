"""Float8 training: the linear layers of the blocks multiply in 8 bits, by torchao."""

import torch
from torch import nn

from grr.parallel.blocks import blocks
from grr.parallel.shard import ORDER, preparations

SIDES = 16  # a GPU's float8 kernels need matrices whose sides are multiples of it
CAPABILITY = (8, 9)  # Ada, Hopper, Blackwell


def multiply_in_float8(model: nn.Module, device: torch.device, *, emulated: bool = False) -> None:
    """Convert the linear layers of the blocks to multiply in float8, forward and backward, in place.

    Inputs, weights and gradients are rounded at each product, each tensor scaled by its largest absolute value: e4m3
    in the forward pass, e5m2 for the gradient of the output. Sums, biases and everything between the products keep the
    model's precision. Parameters keep their names and dtypes, so checkpoints and model folders do not depend on the
    conversion. Layers with a side that is not a multiple of 16 are not converted: in the paper's GRR encoder those of
    the feed-forward networks, whose width is 2,073 (vision_ffn_multiplier=2.6875 gives 2,064). Neither are poolers and
    the vocabulary head. Without compiled blocks the conversion is not fast.

    emulated: round as above but multiply in float32, on any device. It is slower, and serves tests; `parallelize` does
    not offer it. Source: Micikevicius et al. 2022, FP8 formats for deep learning.
    Raises ImportError without torchao, ValueError if the device cannot multiply in float8, if no layer has such sides,
    or if the model was prepared before.
    """
    if done := preparations(model):
        raise ValueError(f"multiply_in_float8: comes first, got a model that is {' and '.join(done)}; {ORDER}")
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        remedy = 'pip install "grr-coca[quantize]", or set parallel.float8=false'
        raise ImportError(f"multiply_in_float8: torchao is not installed; {remedy}") from error
    if not emulated and (device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY):
        what = (
            f"compute capability {torch.cuda.get_device_capability(device)}" if device.type == "cuda" else device.type
        )
        raise ValueError(
            "multiply_in_float8: needs a CUDA GPU of compute capability 8.9 or more (Ada, Hopper, Blackwell), got "
            f"{what}; set parallel.float8=false"
        )
    if not any(_fits(layer, name) for block in blocks(model) for name, layer in block.named_modules()):
        raise ValueError(
            f"multiply_in_float8: no linear layer of a block has sides that are multiples of {SIDES}; "
            "give the model other widths, or set parallel.float8=false"
        )
    config = Float8LinearConfig(emulate=emulated, pad_inner_dim=True)  # a batch's rows may be any number
    for block in blocks(model):
        convert_to_float8_training(block, module_filter_fn=_fits, config=config)


def _fits(layer: nn.Module, name: str) -> bool:
    return isinstance(layer, nn.Linear) and layer.in_features % SIDES == layer.out_features % SIDES == 0
