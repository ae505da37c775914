"""Training whose large products are of numbers of 8 bits, by torchao: twice the rate of bfloat16 where a GPU has it."""

import torch
from torch import nn

from grr.parallel.shard import ORDER, blocks, preparations

SIDES = 16  # of which the sides of a matrix must be multiples for a GPU's float8 kernels
CAPABILITY = (8, 9)  # Ada, Hopper, Blackwell


def multiply_in_float8(model: nn.Module, device: torch.device, *, emulated: bool = False) -> None:
    """Let the linear layers of the blocks multiply in float8, forward and backward, in place. `parallelize` calls it.

    What is read, weights and gradients are rounded at each product, each tensor scaled by its largest number: e4m3
    forward, e5m2 for the gradient that comes back. Sums, biases and all that is between the products keep the model's
    own precision. Weights are the same parameters by the same names, so checkpoints and model folders do not know of
    it, and may be continued and used without. Layers with a side that is no multiple of 16 stay as they are: of the
    paper's GRR encoder the feed-forward networks, of width 2,073, where vision_ffn_multiplier=2.6875 would give 2,064.
    So do poolers and the head. Emulated, the same numbers are multiplied in float32, on any device: slower, to see what
    the rounding does.

    Source: Micikevicius et al. 2022, FP8 formats for deep learning. It is fast where blocks are compiled as well.
    Raises ImportError without torchao, ValueError if the device cannot do it, if no layer has such sides, or if the
    model was prepared before.
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
            f"multiply_in_float8: needs a CUDA GPU of compute capability 8.9 or more (Ada, Hopper, Blackwell), got "
            f"{what}; set parallel.float8=false, or parallel.float8=emulated for the rounding alone"
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
