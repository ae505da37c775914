"""Export of a trained model as three graphs, for use without this library: torch.export programs and ONNX files.

`image` embeds images, and returns the keys and values that captions attend to; `text` embeds texts; `step` reads one
token of a caption and scores the next. Inputs and outputs are plain tensors, the cache of a caption included. The
numbers of images, texts and tokens are free; the sizes of images and of the model are fixed.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from grr.components import Block, BlockCache, KeyValueCache
from grr.data.images import IMAGENET_MEAN, IMAGENET_STD, normalize
from grr.inference.pretrained import Pretrained
from grr.models.coca import CoCa, image_statistics
from grr.tokenizers import ClipTokenizer, Tokenizer

EXAMPLE = Path(__file__).with_name("run_onnx.py")  # copied into the folder of an export, to use it without torch
Pixels = Literal["uint8", "float32"]
Outputs = tuple[Tensor, ...]
Axes = dict[str, dict[int, str]]  # per input: axis of any length -> its name


class ImageGraph(nn.Module):
    """images -> image_embeddings [b, e], context_keys and context_values [l, b, h, n, k].

    These are the keys and values of the n image vectors in the l cross-attention blocks, in h heads of width k.
    images: [b, 3, h, w], bytes for pixels="uint8", or normalised as by `grr.data.images.normalize` for "float32".
    """

    outputs = ("image_embeddings", "context_keys", "context_values")
    free: ClassVar[Axes] = {"images": {0: "batch"}}

    def __init__(self, model: CoCa, image_size: int, pixels: Pixels = "uint8") -> None:
        super().__init__()
        self.model, self.image_size, self.pixels = model, image_size, pixels

    def forward(self, images: Tensor) -> Outputs:
        context = self.model.image_context(images)  # [b, n, d]
        query = context.new_zeros(context.shape[0], 1, self.model.dim)
        caches = [_TensorCache() for _ in _cross_attention_blocks(self.model)]
        for block, cache in zip(_cross_attention_blocks(self.model), caches, strict=True):
            block.cross_attention(query, context, cache=cache)  # type: ignore[misc]  # for its keys and values only
        return self.model._image_embeddings(context), *_stacked(caches)  # encode_image would encode the image again

    def example(self, batch: int, tokens: int) -> dict[str, Tensor]:
        images = _random_images(batch, self.image_size)
        mean, std = image_statistics(self.model.vision_encoder)
        return {"images": images if self.pixels == "uint8" else normalize(images, mean=mean, std=std)}


class TextGraph(nn.Module):
    """ids and positions [b, s] -> text_embeddings [b, e].

    A row is BOS t1 ... tn EOS CLS, then PAD to the length of the longest row; positions count from 0, except that
    CLS has context - 1; those of PAD have no effect.
    """

    outputs = ("text_embeddings",)
    free: ClassVar[Axes] = {"ids": {0: "batch", 1: "tokens"}, "positions": {0: "batch", 1: "tokens"}}

    def __init__(self, model: CoCa, context: int) -> None:
        super().__init__()
        self.model, self.context = model, context

    def forward(self, ids: Tensor, positions: Tensor) -> Outputs:
        return (self.model.encode_text(ids, positions=positions),)

    def example(self, batch: int, tokens: int) -> dict[str, Tensor]:
        positions = torch.arange(tokens).index_fill(0, torch.tensor([tokens - 1]), self.context - 1)
        ids = torch.randint(3, self.model.multimodal_decoder.head.out_features, (batch, tokens))
        return {"ids": ids, "positions": positions.repeat(batch, 1)}


class StepGraph(nn.Module):
    """One token of each caption and the cache of those before it -> logits of the next [b, v], and the longer cache.

    ids: [b, 1], BOS at first; position: [1], 0 at first; context_keys and context_values from `ImageGraph`; keys and
    values [m, b, h, t, k] of the t previous tokens, t = 0 at first -> logits, next_keys and next_values
    [m, b, h, t + 1, k].
    """

    outputs = ("logits", "next_keys", "next_values")
    free: ClassVar[Axes] = {
        "ids": {0: "batch"},
        "position": {},
        "context_keys": {1: "batch"},
        "context_values": {1: "batch"},
        "keys": {1: "batch", 3: "read"},
        "values": {1: "batch", 3: "read"},
    }

    def __init__(self, model: CoCa, image_size: int) -> None:
        super().__init__()
        self.model, self.image_size = model, image_size

    def forward(
        self, ids: Tensor, position: Tensor, context_keys: Tensor, context_values: Tensor, keys: Tensor, values: Tensor
    ) -> Outputs:
        tokens = [_TensorCache(*pair) for pair in zip(keys.unbind(), values.unbind(), strict=True)]
        images = [_TensorCache(*pair) for pair in zip(context_keys.unbind(), context_values.unbind(), strict=True)]
        next_tokens, next_images, none = iter(tokens), iter(images), KeyValueCache(0)
        caches = tuple(
            [
                BlockCache(
                    none if block.attention is None else next(next_tokens),
                    none if block.cross_attention is None else next(next_images),
                )
                for block in _blocks(decoder)
            ]
            for decoder in (self.model.text_decoder, self.model.multimodal_decoder)
        )
        context = context_keys[0]  # only its batch size is read; the caches hold the rest
        logits = self.model.next_token_logits(ids, context, positions=position, caches=(caches[0], caches[1]))
        return logits, *_stacked(tokens)

    @torch.no_grad()
    def example(self, batch: int, tokens: int) -> dict[str, Tensor]:
        model, places = self.model, torch.arange(tokens + 1)
        context = model.image_context(_random_images(batch, self.image_size))
        ids = torch.randint(3, model.multimodal_decoder.head.out_features, (batch, tokens + 1))
        caches = model.caches(context.shape[1], tokens)
        model.next_token_logits(ids[:, :-1], context, positions=places[:-1], caches=caches)
        both = [*caches[0], *caches[1]]
        keys, values = _stacked([cache.tokens for cache in both if cache.tokens.length])
        context_keys, context_values = _stacked([cache.context for cache in both if cache.context.length])
        return {
            "ids": ids[:, -1:],
            "position": places[-1:],
            "context_keys": context_keys,
            "context_values": context_values,
            "keys": keys,
            "values": values,
        }


Graph = ImageGraph | TextGraph | StepGraph


def graphs(model: CoCa, image_size: int, context: int, *, pixels: Pixels = "uint8") -> dict[str, Graph]:
    """Returns the graphs of a model in evaluation mode, by name: image, text and step.

    image_size and context: those of training. Raises ValueError if the model is quantised or not float32, or if pixels
    is unknown.
    """
    if pixels not in get_args(Pixels):
        raise ValueError(f"graphs: pixels must be one of {', '.join(get_args(Pixels))}, got {pixels!r}")
    kinds = {f"{type(p).__name__} of {p.dtype}" for p in model.state_dict().values()}
    if kinds != {"Tensor of torch.float32"}:
        raise ValueError(
            f"graphs: the model must be in float32 and not quantised, got {', '.join(sorted(kinds))}; open "
            "the trained model with load_pretrained"
        )
    return {
        "image": ImageGraph(model, image_size, pixels),
        "text": TextGraph(model, context),
        "step": StepGraph(model, image_size),
    }


def export_program(graph: Graph) -> ExportedProgram:
    """Trace a graph for any number of images, texts and tokens; the program holds only the weights that it uses.

    Save it with `torch.export.save`; `torch.export.load(file).module()` is a callable that `torch.compile` accepts.
    """
    dims = {name: Dim(name, min=0) for name in ("batch", "tokens", "read")}
    shapes = {name: {axis: dims[word] for axis, word in axes.items()} for name, axes in graph.free.items()}
    example = graph.example(batch=2, tokens=5)
    with torch.no_grad():
        program = torch.export.export(graph.eval(), tuple(example.values()), dynamic_shapes=shapes, strict=True)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # contains paths of this machine
    used = {*program.graph_signature.parameters, *program.graph_signature.buffers}
    for name in program.state_dict.keys() - used:
        del program.state_dict[name]
    return program


def save_onnx(graph: Graph, program: ExportedProgram, file: Path) -> None:
    """Write a program as ONNX, with the input and output names of the graph; weights above 1.5 GB go to a second file.

    Raises ImportError if onnx or onnxscript is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError('save_onnx: ONNX is not installed; pip install "grr-coca[export]"') from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch internals, and axes that share a name
        written = torch.onnx.export(
            program,
            input_names=list(graph.free),
            output_names=list(graph.outputs),
            dynamic_shapes=tuple(graph.free.values()),
            verbose=False,
        )
        assert written is not None
        written.save(file)


def onnx_outputs(file: Path, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Compute the outputs of an ONNX file with onnxruntime. Raises ImportError if it is not installed."""
    try:
        from onnxruntime import InferenceSession
    except ImportError as error:
        raise ImportError('onnx_outputs: onnxruntime is not installed; pip install "grr-coca[export]"') from error
    session = InferenceSession(file, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(x) for x in session.run(None, {name: value.numpy() for name, value in inputs.items()})]


@torch.no_grad()
def largest_difference(graph: Graph, inputs: dict[str, Tensor], outputs: Sequence[Tensor]) -> float:
    """Returns the largest difference between `outputs`, from another runtime, and those of the graph in torch.

    Logits of minus infinity, of tokens that are never generated, are left out.
    """
    gaps = [(a - b).abs()[b.isfinite()].max() for a, b in zip(outputs, graph(**inputs), strict=True)]
    return torch.stack(gaps).max().item()


def description(source: Pretrained, tokenizer: Tokenizer, pixels: Pixels) -> dict[str, Any]:
    """Returns the description of the graphs for use without this library, as JSON values for config.json."""
    tower = source.arguments.get("vision_config") or {}
    return {
        "builder": source.builder,
        "arguments": source.arguments,
        "image_size": source.arguments["image_size"],
        "crop": source.crop,
        "pixels": pixels,
        "mean": tower.get("mean", IMAGENET_MEAN),
        "std": tower.get("std", IMAGENET_STD),  # of RGB in [0, 1]: float32 pixels are (x - mean) / std
        "vocabulary": "clip" if isinstance(tokenizer, ClipTokenizer) else "sentencepiece",
        "vocab_size": tokenizer.vocab_size,
        "context_length": tokenizer.context_length,
        "max_new_tokens": tokenizer.context_length - 3,
        "pad_id": tokenizer.pad_id,
        "eos_id": tokenizer.eos_id,
        "bos_id": tokenizer.bos_id,
        "cls_id": tokenizer.cls_id,
    }


class _TensorCache(KeyValueCache):
    """Cache of tensors that enter and leave a graph; append returns longer tensors instead of writing in place."""

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        super().__init__(0)
        if keys is not None and values is not None:
            self.keys, self.values, self.length = keys, values, 1  # nonzero; the tensors have the actual length

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.length:
            keys, values = torch.cat((self.keys, keys), dim=2), torch.cat((self.values, values), dim=2)
        self.keys, self.values = keys, values
        return keys, values

    def filled(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values


def _stacked(caches: Sequence[KeyValueCache]) -> tuple[Tensor, Tensor]:
    keys, values = zip(*(cache.filled() for cache in caches), strict=True)
    return torch.stack(keys), torch.stack(values)


def _blocks(decoder: nn.Module) -> list[Block]:
    return [module for module in decoder.modules() if isinstance(module, Block)]


def _cross_attention_blocks(model: CoCa) -> list[Block]:
    return [block for block in _blocks(model.multimodal_decoder) if block.cross_attention is not None]


def _random_images(count: int, size: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
