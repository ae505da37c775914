"""Quantization of a trained model's matrices to int8, float8 or int4, by torchao.

A quantized model is stored in a folder like every model. A quantized weight is stored as its component tensors
(`NAME.qdata`, `NAME.scale` and others) in model.safetensors; `config.json` names the scheme.

    scheme              runs on                                    multiplies in            a weight takes
    int8_weight_only    any device                                 the model's precision    8 bits
    int8_dynamic        any device                                 int8                     8 bits
    float8_weight_only  any device                                 the model's precision    8 bits
    int4_grouped        any device                                 the model's precision    4.5 bits, on disk alone
    int4_weight_only    a CUDA GPU, capability 8.0 or more         bfloat16                 4.25 bits
"""

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from grr.checkpoint.finite import check_finite_weights
from grr.files.damage import damage

Scheme = Literal["int8_weight_only", "int8_dynamic", "float8_weight_only", "int4_grouped", "int4_weight_only"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
GROUP = 32  # numbers of a row that share a scale in int4_grouped


def quantize(model: nn.Module, scheme: Scheme) -> None:
    """Quantize the weight of every linear layer in place, for inference only.

    int8_weight_only and float8_weight_only (e4m3) have a scale for each row of a matrix, and multiply in the model's
    precision. int8_dynamic also quantizes the inputs of a layer, each vector by its largest value, and multiplies
    integers. int4_grouped has a bfloat16 scale for each 32 values of a row, and stores two values in a byte on disk and
    one in a byte in memory; rows of another length are quantized as by int8_weight_only. int4_weight_only has a scale
    and a zero point for each 128 values. Biases, norms, token embeddings, positions and the patch embedding are not
    quantized; a head that shared its matrix with the embedding has its own afterwards. Raises ImportError without
    torchao, ValueError for an unknown scheme, one that the device of the weights or their dtype cannot serve, and for
    weights that are not finite.
    """
    check_finite_weights("quantize", model.state_dict(), "the model")
    weight = next(module.weight for module in model.modules() if isinstance(module, nn.Linear))
    check_scheme(scheme, weight.device, weight.dtype)
    from torchao.quantization import quantize_  # two seconds, for those who need it

    if scheme == "int4_grouped":
        quantize_(model, _torchao_config(scheme), filter_fn=_has_groups)
        scheme = "int8_weight_only"
    quantize_(model, _torchao_config(scheme), filter_fn=_is_plain_linear)
    model.requires_grad_(False)


def check_scheme(scheme: str, device: torch.device | str, dtype: torch.dtype) -> None:
    """Raise as `quantize` does, before any work is done, if a scheme cannot be used on a device or with a dtype.

    On the meta device every scheme can be used.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"quantize: scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    try:
        import torchao  # noqa: F401
    except ImportError as error:
        raise ImportError('quantize: torchao is not installed; pip install "grr-coca[quantize]"') from error
    if scheme == "int4_weight_only":
        kind = torch.device(device).type
        able = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
        if not able or kind not in ("cuda", "meta") or dtype != torch.bfloat16:
            raise ValueError(
                "quantize: int4_weight_only needs a model in bfloat16 on a CUDA GPU of compute capability 8.0 or more, "
                f"got {dtype} on {kind}; ask for bfloat16 on such a GPU, or take int4_grouped, which runs anywhere"
            )


def quantized_state(model: nn.Module) -> dict[str, Tensor]:
    """All weights as plain tensors; a quantised one is several, by its name and theirs: weight.qdata, weight.scale."""
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if is_traceable_wrapper_subclass(value):
            state |= {f"{name}.{part}": tensor for part, tensor in _parts(value).items()}
        else:
            state[name] = value
    return state


def load_quantized(folder: Path, model: nn.Module, scheme: Scheme, device: torch.device | str) -> None:
    """Load the quantized weights of a folder into a model on the meta device.

    Scales and tensors that are not quantized are cast according to the model's dtype. Raises ValueError if the file is
    damaged, and naming every tensor that is missing, unexpected or of another shape; and as `quantize` does.
    """
    check_scheme(scheme, device, next(model.parameters()).dtype)
    quantize(model, scheme)  # on the meta device nothing is computed: this makes the tensors that are filled below
    form = quantized_state(model)
    try:
        saved = load_file(folder / "model.safetensors", device=str(device))
    except SafetensorError as error:
        file = folder / "model.safetensors"
        raise ValueError(f"load_quantized: {file} cannot be read: {damage(file)}") from error
    wrong = [
        name
        for name in sorted(form.keys() | saved.keys())
        if name not in form or name not in saved or form[name].shape != saved[name].shape
    ]
    if wrong:
        raise ValueError(
            f"load_quantized: {folder / 'model.safetensors'} does not fit the model in {', '.join(wrong)}; quantise "
            "the model again, with the torchao that is installed"
        )
    check_finite_weights("load_quantized", saved, str(folder))
    parts = {name: saved[name].to(form[name].dtype) for name in form}
    state = {name: _filled(name, value, parts) for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.requires_grad_(False)


def _parts(weight: Any) -> dict[str, Tensor]:
    """The plain tensors that a quantised weight is stored as; numbers of 4 bits stand two in a byte, without zeros."""
    parts = {part: getattr(weight, part) for part in weight.__tensor_flatten__()[0]}
    if not _is_grouped(weight):
        return parts
    low, high = (parts["qdata"] + 8).byte().unflatten(-1, (-1, 2)).unbind(-1)  # [r, c/2] each, from 0 to 15
    return {"qdata": low | high << 4, "scale": parts["scale"]}


def _filled(name: str, form: Any, parts: dict[str, Tensor]) -> Tensor:
    """The tensor of this name, of the form given, out of plain ones."""
    if not is_traceable_wrapper_subclass(form):
        return parts[name]
    names, attributes = form.__tensor_flatten__()
    own = {part: parts[f"{name}.{part}"] for part in _parts(form)}
    if _is_grouped(form):
        both = own["qdata"]
        own["qdata"] = torch.stack((both & 15, both >> 4), dim=-1).flatten(-2).char() - 8  # [r, c]
        own["zero_point"] = torch.zeros_like(own["scale"], dtype=torch.int8)
    return type(form).__tensor_unflatten__({part: own[part] for part in names}, attributes, form.shape, form.stride())


def _is_grouped(weight: Any) -> bool:
    return getattr(weight, "target_dtype", None) == torch.int4  # type: ignore[attr-defined]


def _is_plain_linear(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and not is_traceable_wrapper_subclass(module.weight)


def _has_groups(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and module.in_features % GROUP == 0


def _torchao_config(scheme: Scheme) -> Any:
    from torchao import quantization
    from torchao.quantization.granularity import PerGroup

    if scheme == "int8_weight_only":
        return quantization.Int8WeightOnlyConfig(set_inductor_config=False, version=2)
    if scheme == "int8_dynamic":
        return quantization.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False, version=2)
    if scheme == "float8_weight_only":
        return quantization.Float8WeightOnlyConfig(set_inductor_config=False, version=2)
    if scheme == "int4_grouped":
        return quantization.IntxWeightOnlyConfig(
            weight_dtype=torch.int4,  # type: ignore[attr-defined]
            granularity=PerGroup(GROUP),
            scale_dtype=torch.bfloat16,
            version=2,
        )
    return quantization.Int4WeightOnlyConfig(  # the one layout that torch itself has kernels for
        group_size=128, int4_packing_format="tile_packed_to_4d", set_inductor_config=False, version=2
    )
