"""Which parts of a model are trained: in full, by low-rank adapters, or not at all."""

from collections.abc import Sequence

from torch import nn

from grr.components import LoRALinear
from grr.models.coca import MultimodalDecoder

# All linear layers of our attention and feed-forward networks, but for the gate that attention may have.
PROJECTIONS = ("qkv", "q", "kv", "out", "up", "down")


def tune_parts(
    model: nn.Module,
    *,
    frozen: tuple[str, ...] = (),
    lora: tuple[str, ...] = (),
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    projections: tuple[str, ...] = PROJECTIONS,
) -> None:
    """Choose for each child of the model whether it is trained in full, by low-rank adapters (LoRA), or not at all.

    frozen: names of children that keep their weights: vision_encoder, text_decoder ... lora: names of children whose
    weights are frozen too, and get adapters by `add_adapters`. The other children are trained in full. Call it before
    `parallelize` and `adamw`. Source: Hu et al. 2021 (LoRA), section 4.
    Raises ValueError for a part that is unknown or in both lists, a name in projections that no linear layer has,
    numbers out of their range, or if no parameter remains to be trained.
    """
    _check_parts("tune_parts", model, lora)
    if both := sorted(set(frozen) & set(lora)):
        raise ValueError(
            f"tune_parts: a part is either frozen or has adapters, got {', '.join(both)} in both lists; remove it from "
            "one of them"
        )
    known = {name.rpartition(".")[2] for name in linear_layers(model)}
    if lora and (unknown := [name for name in projections if name not in known]):
        of_parts = {name.rpartition(".")[2] for part in lora for name in linear_layers(model.get_submodule(part))}
        raise ValueError(
            f"tune_parts: projections must name linear layers, got {', '.join(unknown)}; those of {', '.join(lora)} "
            f"are {', '.join(sorted(of_parts)) or 'none'}"
        )
    for part in lora:
        add_adapters(model.get_submodule(part), rank=rank, alpha=alpha, dropout=dropout, projections=projections)
    freeze(model, frozen=frozen)


def freeze(model: nn.Module, *, frozen: tuple[str, ...] = ()) -> None:
    """Freeze the parameters of some children of the model, given by name; call it before `adamw`.

    Raises ValueError for an unknown name, or if no parameter remains to be trained.
    """
    _check_parts("freeze", model, frozen)
    for part in frozen:
        child = model.get_submodule(part).requires_grad_(False)
        child.train(child.training)  # a `Tower` that is frozen stays in evaluation mode
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"freeze: no parameter remains to be trained when {', '.join(frozen)} are frozen; remove one")


def add_adapters(
    part: nn.Module,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    projections: Sequence[str] = PROJECTIONS,
) -> None:
    """Freeze a module, and make its linear layers of these names `LoRALinear`s on the same parameters.

    The layers may be quantised, by a weight-only scheme. The matrices for queries, keys and values of a `SelfAttention`
    are one, qkv, with one adapter. Raises ValueError if there is no such layer, or as `LoRALinear` does.
    """
    linears = linear_layers(part)
    chosen = {name: layer for name, layer in linears.items() if name.rpartition(".")[2] in projections}
    if not chosen:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in linears})) or "none"
        raise ValueError(
            f"add_adapters: projections must name linear layers of {type(part).__name__}, got "
            f"{', '.join(projections)}; it has {known}"
        )
    part.requires_grad_(False)
    for name, layer in chosen.items():
        owner, _, key = name.rpartition(".")
        setattr(part.get_submodule(owner), key, LoRALinear.from_linear(layer, rank=rank, alpha=alpha, dropout=dropout))


def linear_layers(part: nn.Module) -> dict[str, nn.Linear]:
    """Returns the linear layers that can have an adapter, by name: not the vocabulary head, and no subclass.

    `token_losses` reads the matrix of the head itself, as torch's attention does that of its output.
    """
    heads = [module.head for module in part.modules() if isinstance(module, MultimodalDecoder)]
    return {
        name: layer
        for name, layer in part.named_modules()
        if type(layer) is nn.Linear and all(layer is not head for head in heads)
    }


def check_adapter_dropout(lora: Sequence[str], dropout: float, micro_batch_size: int | None) -> None:
    """Raise ValueError if the dropout of adapters would depend on the memory of a machine.

    It is drawn for a micro-batch at a time; all other dropout depends on the sample alone.
    """
    if lora and dropout > 0 and micro_batch_size is None:
        raise ValueError(
            "tune_parts: the dropout of adapters is drawn for a micro-batch at a time, so that its size must be set, "
            f"got {dropout=} with run.micro_batch_size=null; set run.micro_batch_size, or tuning.dropout=0"
        )


def _check_parts(who: str, model: nn.Module, parts: Sequence[str]) -> None:
    children = dict(model.named_children())
    if len(set(parts)) < len(parts):
        raise ValueError(f"{who}: each part must be named once, got {', '.join(parts)}; remove the repeated one")
    if unknown := [part for part in parts if part not in children]:
        raise ValueError(
            f"{who}: the model does not have the part {', '.join(unknown)}; its parts are {', '.join(children)}"
        )
