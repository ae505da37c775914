"""open_clip's weights give open_clip's numbers: those of its formulas, written out here, and its own if installed.

pip install open_clip_torch==3.3.0 transformers==4.56.2    # beside a torchvision that fits torch
"""

import copy
import inspect
import os
from collections import OrderedDict

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numbered import BOS, CLS, EOS, PAD, ROOM, Spelled, captions, layout, rows, some_images
from safetensors.torch import save_file
from torch import Tensor, nn

from grr.data.collate import collate_captions, right_pad
from grr.generation.generate import generate
from grr.inference.convert import CLIP_MEAN, CLIP_STD, convert_open_clip, read_open_clip
from grr.models.coca import CoCa
from grr.models.open_clip import OPEN_CLIP_MODELS, open_clip_coca, open_clip_coca_vit_b_32, open_clip_coca_vit_l_14
from grr.parallel.initialize import initialize
from grr.training.loss import contrastive_loss

# As open_clip's model_configs have them; `tiny` is ours.
CONFIGS = {
    "tiny": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 24, "layers": 2, "width": 48, "head_width": 16, "patch_size": 8,
                       "attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 6,
                       "output_tokens": True},
        "text_cfg": {"context_length": 10, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2, "embed_cls": True,
                     "output_tokens": True},
        "multimodal_cfg": {"context_length": 10, "vocab_size": 50, "width": 32, "heads": 2, "layers": 3,
                           "attn_pooler_heads": 4},
    },
    "coca_ViT-B-32": {
        "embed_dim": 512,
        "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32, "attentional_pool": True,
                       "attn_pooler_heads": 8, "output_tokens": True},
        "text_cfg": {"context_length": 76, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12,
                     "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 76, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12,
                           "attn_pooler_heads": 8},
    },
    "coca_ViT-L-14": {
        "embed_dim": 768,
        "vision_cfg": {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14, "attentional_pool": True,
                       "attn_pooler_heads": 8, "output_tokens": True},
        "text_cfg": {"context_length": 76, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 12,
                     "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 76, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 12,
                           "attn_pooler_heads": 12},
    },
}  # fmt: skip
BUILDERS = {"coca_ViT-B-32": open_clip_coca_vit_b_32, "coca_ViT-L-14": open_clip_coca_vit_l_14}
TINY = {
    "vocab_size": 51,
    "context_length": 11,
    "image_size": 24,
    "patch_size": 8,
    "vision_dim": 48,
    "vision_heads": 3,
    "vision_layers": 2,
    "num_queries": 6,
    "pooler_heads": 4,
    "dim": 32,
    "num_heads": 2,
    "text_layers": 2,
    "multimodal_layers": 3,
}


# --- open_clip's formulas once more, in torch's own modules and under open_clip's names ----------------------------


class ResidualBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); attention to a context if that has a norm."""

    def __init__(self, width: int, heads: int, *, cross: bool = False) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        if cross:
            self.ln_1_kv = nn.LayerNorm(width)
        layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": nn.GELU(), "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor, *, hidden: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        read = self.ln_1(x) if context is None else self.ln_1_kv(context)
        if hidden is not None:
            hidden = hidden.repeat_interleave(self.attn.num_heads, 0)  # [b h, s, s], True where not seen
        x = x + self.attn(self.ln_1(x), read, read, attn_mask=hidden, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualBlock(width, heads) for _ in range(layers))


class Pooler(nn.Module):
    def __init__(self, width: int, context: int, heads: int, queries: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(queries, width))
        self.attn = nn.MultiheadAttention(width, heads, kdim=context, vdim=context, batch_first=True)
        self.ln_q, self.ln_k = nn.LayerNorm(width), nn.LayerNorm(context)

    def forward(self, x: Tensor) -> Tensor:
        q, x = self.ln_q(self.query).expand(len(x), -1, -1), self.ln_k(x)
        return self.attn(q, x, x, need_weights=False)[0]


class Visual(nn.Module):
    def __init__(
        self,
        embed: int,
        *,
        image_size: int,
        layers: int,
        width: int,
        patch_size: int,
        attn_pooler_heads: int,
        head_width: int = 64,
        attn_pooler_queries: int = 256,
        **_: object,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty((image_size // patch_size) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, width // head_width, layers)
        self.attn_pool = Pooler(embed, width, attn_pooler_heads, attn_pooler_queries)
        self.ln_post = nn.LayerNorm(embed)
        self.proj = nn.Parameter(torch.empty(embed, embed))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv1(pixels).flatten(2).mT
        x = torch.cat((self.class_embedding.expand(len(x), 1, -1), x), dim=1) + self.positional_embedding
        x = self.ln_pre(x)
        for block in self.transformer.resblocks:
            x = block(x)
        x = self.ln_post(self.attn_pool(x))
        return x[:, 0] @ self.proj, x[:, 1:]


class Text(nn.Module):
    correct_cls_mask = False

    def __init__(
        self, embed: int, *, context_length: int, vocab_size: int, width: int, heads: int, layers: int, **_: object
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.cls_emb = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(context_length + 1, width))
        self.transformer = Transformer(width, heads, layers)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, embed))

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        b, s = text.shape
        x = torch.cat((self.token_embedding(text), self.cls_emb.expand(b, 1, -1)), dim=1)
        x = x + self.positional_embedding[: s + 1]
        hidden = torch.zeros(b, s + 1, s + 1, dtype=torch.bool)
        for row in range(b):
            for key in range(s + 1):
                hidden[row, :key, key] = True  # what comes later
                place = key if self.correct_cls_mask else key - 1  # the fault: one place too far
                if 0 <= place < s and text[row, place] == PAD:
                    hidden[row, :, key] = True
        for block in self.transformer.resblocks:
            x = block(x, hidden=hidden)
        return self.ln_final(x[:, -1]) @ self.text_projection, x[:, :-1]


class Decoder(nn.Module):
    def __init__(self, *, vocab_size: int, width: int, heads: int, layers: int, **_: object) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualBlock(width, heads) for _ in range(layers))
        self.cross_attn = nn.ModuleList(ResidualBlock(width, heads, cross=True) for _ in range(layers))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, vocab_size))

    def forward(self, context: Tensor, x: Tensor) -> Tensor:
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1).expand(len(x), -1, -1)
        for text, image in zip(self.resblocks, self.cross_attn, strict=True):
            x = image(text(x, hidden=later), context=context)
        return self.ln_final(x) @ self.text_projection


class Reference(nn.Module):
    def __init__(self, embed_dim: int, vision_cfg: dict, text_cfg: dict, multimodal_cfg: dict) -> None:
        super().__init__()
        self.visual, self.text = Visual(embed_dim, **vision_cfg), Text(embed_dim, **text_cfg)
        self.text_decoder = Decoder(**multimodal_cfg)
        self.logit_scale = nn.Parameter(torch.tensor(2.6593))

    def forward(self, pixels: Tensor, text: Tensor, *, output_labels: bool = False) -> dict[str, Tensor]:
        (image, context), (cls, tokens) = self.visual(pixels), self.text(text)
        return {
            "image_features": nn.functional.normalize(image, dim=-1),
            "logits": self.text_decoder(context, tokens),
            "text_features": nn.functional.normalize(cls, dim=-1),
            "logit_scale": self.logit_scale.exp(),
        }


def installed() -> type[nn.Module]:
    """open_clip's own class."""
    try:
        return pytest.importorskip("open_clip.coca_model", reason="pip install open_clip_torch==3.3.0").CoCa
    except RuntimeError as error:
        pytest.skip(f"the torchvision that open_clip needs does not fit this torch: {error}")


def randomised(peer: nn.Module, seed: int = 0) -> nn.Module:
    """Biases and norms that are neither 0 nor 1, and no parameter as the code left it: open_clip leaves one unset."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in peer.named_parameters():
        if p.ndim:
            scale = p.shape[0 if "proj" in name and p.ndim == 2 else -1] ** -0.5 if p.ndim > 1 else 0.3
            p.data = torch.randn(p.shape, generator=generator) * scale + (p.ndim == 1 and name.endswith("weight"))
    return peer.eval()


@pytest.fixture(scope="module", params=["reference", "open_clip"])
def kind(request) -> type[nn.Module]:
    return Reference if request.param == "reference" else installed()


@pytest.fixture(scope="module")
def peer(kind) -> nn.Module:
    return randomised(kind(**CONFIGS["tiny"]))


def ours(peer: nn.Module, **arguments) -> CoCa:
    model = open_clip_coca(**TINY | arguments)
    model.load_state_dict(convert_open_clip(peer.state_dict(), model))
    return model.eval()


@pytest.fixture(scope="module")
def model() -> CoCa:
    return ours(randomised(Reference(**CONFIGS["tiny"])))


def as_clip_has_them(images: Tensor) -> Tensor:
    return (images / 255 - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)


exactly = {"atol": 1e-5, "rtol": 1e-5}


# --- laws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("correct_cls_mask", [False, True])
@given(captions=captions)
def test_a_trimmed_packed_batch_is_the_same_function_as_the_padded_one(correct_cls_mask, captions):
    model = ours(randomised(Reference(**CONFIGS["tiny"])), correct_cls_mask=correct_cls_mask)
    whole, images = rows(captions), some_images(len(captions))
    ids, positions, _, label_places, labels, n = collate_captions([layout(caption) for caption in captions])
    with torch.no_grad():
        packed, padded = model(images, ids, positions=positions), model(images, whole[:, :-1])
        losses = model(images, ids, positions=positions, labels=labels, label_places=label_places).token_losses
    torch.testing.assert_close(packed.text_embeddings, padded.text_embeddings, **exactly)
    following = whole[:, 1:].clone()
    following[(following == PAD) | (following == CLS)] = -100
    expected = nn.functional.cross_entropy(padded.logits.flatten(0, 1), following.flatten())
    torch.testing.assert_close(losses.sum() / n, expected, **exactly)


@given(captions=captions, column=st.integers(1, ROOM), token=st.integers(1, 47))
def test_no_logit_depends_on_a_later_token_and_cls_is_never_predicted(model, captions, column, token):
    ids, images = rows(captions)[:, :-1], some_images(len(captions))
    changed = ids.clone()
    changed[:, column] = token
    with torch.no_grad():
        before, after = model(images, ids).logits, model(images, changed).logits
    torch.testing.assert_close(before[:, :column], after[:, :column], **exactly)
    assert torch.equal(before[..., CLS], torch.full(before.shape[:2], -torch.inf))
    assert before[..., :CLS].isfinite().all()


@pytest.mark.parametrize(("length", "reaches"), [(0, True), (3, True), (ROOM - 1, True), (ROOM, False)])
def test_padding_reaches_cls_with_the_released_mask_and_not_with_the_correct_one(length, reaches):
    peer = randomised(Reference(**CONFIGS["tiny"]))
    changed = copy.deepcopy(peer)
    changed.text.token_embedding.weight.data[PAD] += 1
    ids = rows([list(range(1, length + 1))])[:, :-1]
    embed = [[ours(p, correct_cls_mask=right).encode_text(ids) for p in (peer, changed)] for right in (False, True)]
    assert torch.equal(*embed[0]) != reaches
    assert torch.equal(*embed[1])
    assert (embed[0][0] - embed[1][0]).abs().max() > 1e-3 or not reaches


def test_embeddings_and_captions_read_different_image_vectors(model):
    context = model.image_context(some_images(2))
    changed = context.clone()
    changed[:, 0] += torch.randn(32)
    ids = rows([[3, 4], [5]])[:, :-1]
    before, after = (model.from_context(c, ids) for c in (context, changed))
    assert torch.equal(before.logits, after.logits)
    assert (before.image_embeddings - after.image_embeddings).abs().max() > 1e-2


# --- agreement -----------------------------------------------------------------------------------------------------


@given(captions=captions)
@example(captions=[[], [5] * (ROOM - 1), list(range(1, ROOM + 1)), [7]])
@example(captions=[[3, PAD, 4, 5], [PAD], [6, 7, PAD]])  # the id of PAD within a caption: "!" before another sign
@pytest.mark.parametrize("correct_cls_mask", [False, True])
def test_embeddings_and_logits_equal_the_peers(peer, correct_cls_mask, captions):
    peer.text.correct_cls_mask = correct_cls_mask
    model, ids, images = (
        ours(peer, correct_cls_mask=correct_cls_mask),
        rows(captions)[:, :-1],
        some_images(len(captions)),
    )
    with torch.no_grad():
        theirs = peer(as_clip_has_them(images), ids[:, :-1], output_labels=False)
        output, packed = model(images, ids), model.encode_text(*right_pad(ids)[:1], positions=right_pad(ids)[1])
    torch.testing.assert_close(output.image_embeddings, theirs["image_features"], **exactly)
    torch.testing.assert_close(model.encode_image(images), theirs["image_features"], **exactly)
    torch.testing.assert_close(output.scale.squeeze(), theirs["logit_scale"])
    read = torch.ones_like(ids[:, :-1], dtype=torch.bool)  # logits to compare
    if correct_cls_mask:  # what is computed at PAD and behind it differs, and nothing reads it
        read = (ids[:, :-1] != PAD).cummin(1).values
    torch.testing.assert_close(output.logits[:, :-1, :CLS][read], theirs["logits"][read], **exactly)
    torch.testing.assert_close(output.text_embeddings, theirs["text_features"], **exactly)
    torch.testing.assert_close(packed, theirs["text_features"], **exactly)


def test_gradients_equal_the_peers(peer):
    """So fine-tuning is the same: what is converted are gradients, by the same table as weights."""
    peer.text.correct_cls_mask = False
    model, ids, images = ours(peer), rows([[3, 4, 5], [6], list(range(1, ROOM + 1))]), some_images(3)
    peer.zero_grad()
    theirs, output = peer(as_clip_has_them(images), ids[:, :-2], output_labels=False), model(images, ids[:, :-1])
    for image, text, scale, logits in (
        (theirs["image_features"], theirs["text_features"], theirs["logit_scale"], theirs["logits"]),
        (output.image_embeddings, output.text_embeddings, output.scale, output.logits[:, :-1]),
    ):
        captioning = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:-2].flatten(), ignore_index=PAD)
        (contrastive_loss(image, text, 1 / scale) + captioning).backward()
    expected = convert_open_clip({name: p.grad for name, p in peer.named_parameters()}, model)
    for name, parameter in model.named_parameters():
        if name.startswith("vision_encoder.patches") or name == "logit_scale.bias":
            continue  # scaled, and no part of theirs
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("name", BUILDERS)
def test_the_published_sizes_have_the_published_parameters(name):
    with torch.device("meta"):
        reference, model = Reference(**CONFIGS[name]), BUILDERS[name]()
    theirs, own = (sum(p.numel() for p in m.parameters()) for m in (reference, model))
    assert theirs == {"coca_ViT-B-32": 253_560_065, "coca_ViT-L-14": 638_450_177}[name]
    assert round(theirs / 1e6, 2) == {"coca_ViT-B-32": 253.56, "coca_ViT-L-14": 638.45}[name]  # open_clip's table
    assert own == theirs + CONFIGS[name]["vision_cfg"]["width"] + 1  # biases of patches and of similarities


@pytest.mark.parametrize("name", CONFIGS)
def test_the_reference_has_open_clips_names_and_shapes(name):
    with torch.device("meta"):
        theirs, reference = installed()(**CONFIGS[name]), Reference(**CONFIGS[name])
    assert {n: p.shape for n, p in reference.state_dict().items()} == {
        n: p.shape for n, p in theirs.state_dict().items()
    }


@pytest.mark.slow
def test_full_size_models_equal_the_peer(kind):
    peer = randomised(kind(**CONFIGS["coca_ViT-B-32"]))
    with torch.device("meta"):
        model = open_clip_coca_vit_b_32()
    model.load_state_dict(convert_open_clip(peer.state_dict(), model), assign=True)
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    ids = torch.zeros(2, 77, dtype=torch.long)
    ids[0, :7] = torch.tensor([49406, 320, 1125, 539, 320, 2368, 49407])
    ids[1] = torch.arange(500, 577)
    ids[:, -1] = 49408
    with torch.no_grad():
        theirs = peer(as_clip_has_them(images), ids[:, :-1], output_labels=False)
        output = model.eval()(images, ids)
    torch.testing.assert_close(output.image_embeddings, theirs["image_features"], **exactly)
    torch.testing.assert_close(output.text_embeddings, theirs["text_features"], **exactly)
    torch.testing.assert_close(output.logits[:, :-1, :-1], theirs["logits"], **exactly)


# --- captions ------------------------------------------------------------------------------------------------------


def forbid_what_is_never_written(peer: nn.Module) -> None:
    """The other side may write PAD and BOS; with a constant in the final norm, their logits are very low."""
    peer.text_decoder.ln_final.bias.data[0] = 10
    peer.text_decoder.ln_final.weight.data[0] = 0
    peer.text_decoder.text_projection.data[0] = 0
    peer.text_decoder.text_projection.data[0, [PAD, BOS]] = -100


def greedy(peer: nn.Module, images: Tensor, tokens: int) -> list[list[int]]:
    """The most likely token, `tokens` times, from the whole beginning each time."""
    text = torch.full((len(images), 1), BOS)
    for _ in range(tokens):
        logits = peer(as_clip_has_them(images), text, output_labels=False)["logits"][:, -1]
        text = torch.cat((text, logits.argmax(-1, keepdim=True)), dim=1)
    return [Spelled().decode(row) for row in text[:, 1:].tolist()]


def test_greedy_captions_are_those_of_a_plain_loop(peer):
    peer = copy.deepcopy(peer)
    forbid_what_is_never_written(peer)
    images = some_images(8)
    with torch.no_grad():
        written = generate(ours(peer), images, Spelled())
        assert written == greedy(peer, images, ROOM)
    assert len({tuple(caption) for caption in written}) > 1


def test_greedy_captions_are_those_of_open_clips_generate():
    peer = randomised(installed()(**CONFIGS["tiny"]))
    pytest.importorskip("transformers", reason="pip install transformers==4.56.2")
    forbid_what_is_never_written(peer)
    images = some_images(8)
    rows = peer.generate(
        as_clip_has_them(images),
        generation_type="top_k",
        top_k=1,
        sot_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        seq_len=ROOM + 2,
        min_seq_len=3,
        max_seq_len=10,
    ).tolist()
    expected = [Spelled().decode(row[1:-1]) for row in rows]  # without BOS, and the EOS at the end that it forces
    assert generate(ours(peer), images, Spelled(), min_new_tokens=2) == expected


def test_beam_search_and_sampling_work(model):
    for options in ({"num_beams": 3}, {"temperature": 1.0, "top_p": 0.9}):
        written = generate(model, some_images(2), Spelled(), **options)
        assert all(token not in (PAD, BOS, CLS) for caption in written for token in caption)


# --- use -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPEN_CLIP_MODELS)
def test_every_argument_is_a_keyword_and_every_size_says_what_it_is(name):
    builder = OPEN_CLIP_MODELS[name]
    parameters = inspect.signature(builder).parameters.values()
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in parameters)
    assert "open_clip" in builder.__doc__


def test_a_model_can_be_trained_from_scratch():
    with torch.device("meta"):
        model = open_clip_coca(**TINY)
    for parameter in model.parameters():
        assert parameter.is_meta
    initialize(model, torch.device("cpu"), seed=0)
    output = model(some_images(2), rows([[3, 4], [5]])[:, :-1])
    assert output.image_embeddings.isfinite().all()
    assert output.text_embeddings.isfinite().all()
    assert output.logits[..., :CLS].isfinite().all()


def test_dropout_acts_in_training_only():
    peer = randomised(Reference(**CONFIGS["tiny"]))
    model, images = ours(peer, dropout=0.5), some_images(2)
    assert torch.equal(model.encode_image(images), ours(peer).encode_image(images))
    assert (model.train().encode_image(images) - model.encode_image(images)).abs().max() > 1e-3


@pytest.mark.parametrize("wrapped", ["plain", "training", "safetensors"])
def test_checkpoints_of_all_kinds_are_read(tmp_path, wrapped):
    weights = randomised(Reference(**CONFIGS["tiny"])).state_dict()
    if wrapped == "safetensors":
        save_file(weights, tmp_path / "weights.safetensors")
    elif wrapped == "plain":
        torch.save(weights, tmp_path / "weights.bin")
    else:
        several = {f"module.{name}": value for name, value in weights.items()}
        torch.save(
            {"epoch": 3, "name": "coca", "state_dict": several, "optimizer": {"state": {}}}, tmp_path / "weights.pt"
        )
    read = read_open_clip(next(tmp_path.iterdir()))
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], value) for name, value in weights.items())


class Harmful:
    def __reduce__(self):
        return print, ("this was run",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda file: torch.save({"state_dict": Harmful()}, file), "or holds more than weights, which is not run"),
        (lambda file: file.write_bytes(b"\x80\x02garbage"), "is damaged, or holds more than weights, which is not run"),
        (lambda file: file.write_bytes(b""), "cannot be read: it is empty; download or copy it again"),
        (
            lambda file: file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4\nsize 9\n"),
            "it is a Git LFS pointer of 63 bytes, not the weights; run `git lfs pull`",
        ),
        (lambda file: file.write_bytes(b"\n<!DOCTYPE html><html>Sign in</html>"), "it is a web page, not the weights"),
        (lambda file: save_file({"a": torch.ones(9)}, file), "it is a safetensors file; name it .safetensors"),
        (
            lambda file: (torch.save({"a": torch.ones(9999)}, file), os.truncate(file, 9999)),
            "it is truncated, at 9,999 bytes",
        ),
        (lambda file: torch.save({"state_dict": {3: torch.ones(2)}}, file), "must hold weights by name, got none"),
        (
            lambda file: torch.save({"module.visual.proj": torch.ones(2), "visual.proj": torch.ones(2)}, file),
            "has two weights for visual.proj: module.visual.proj and visual.proj",
        ),
        (
            lambda file: torch.save([torch.ones(2)], file),
            "must hold weights by name, got none; use a",
        ),
        (
            lambda file: torch.save({"epoch": 3}, file),
            "must hold weights by name, got none; use a",
        ),
        (lambda file: None, "read_open_clip: the file .*weights.pt does not exist; CoCas of open_clip are"),
    ],
)
def test_a_file_that_is_not_a_checkpoint_is_refused_and_not_run(tmp_path, capsys, content, message):
    content(tmp_path / "weights.pt")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_open_clip(tmp_path / "weights.pt")
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda file: file.write_bytes(b"garbage" * 9), "it is truncated or damaged, at 63 bytes"),
        (
            lambda file: (save_file({"a": torch.ones(99)}, file), os.truncate(file, 40)),
            r"it is truncated: its header has \d+ bytes and the file 40",
        ),
        (
            lambda file: (save_file({"a": torch.ones(99)}, file), os.truncate(file, 200)),
            "it is truncated or damaged, at",
        ),
        (lambda file: torch.save({"a": torch.ones(2)}, file), "it was written by torch.save; name it .pt"),
        (
            lambda file: file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
            "it is a Git LFS pointer of 43",
        ),
    ],
)
def test_damaged_safetensors_are_refused_with_the_likely_cause(tmp_path, content, message):
    content(tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=rf"read_open_clip: .*weights.safetensors cannot be read: {message}"):
        read_open_clip(tmp_path / "weights.safetensors")


@given(
    prefix=st.lists(
        st.sampled_from(
            ["module", "_orig_mod", "model", "state_dict", "coca", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]
        ),
        max_size=4,
    ),
    inside=st.booleans(),
    keys=st.lists(st.sampled_from(["state_dict", "model", "module"]), max_size=3),
)
def test_any_chain_of_prefixes_and_containers_is_removed(tmp_path_factory, prefix, inside, keys):
    weights = {
        "visual.conv1.weight": torch.ones(2),
        "text_decoder.cross_attn.0.ln_1.weight": torch.ones(3),
        "text.cls_emb": torch.ones(4),
        "logit_scale": torch.ones(()),
    }
    named = {
        ".".join([*prefix, name.replace("visual.", "visual._orig_mod." if inside else "visual.")]): value
        for name, value in weights.items()
    }
    for key in keys:
        named = {key: named, "epoch": 3, "optimizer": {"state": {}}}
    file = tmp_path_factory.mktemp("prefixes") / "weights.pt"
    torch.save(named, file)
    read = read_open_clip(file)
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], value) for name, value in weights.items())


def test_weights_that_do_not_fit_are_listed(model):
    weights = dict(randomised(Reference(**CONFIGS["tiny"])).state_dict())
    del weights["text.cls_emb"]
    weights |= {
        "visual.head.weight": torch.ones(2),
        "text.ln_final.bias": torch.ones(7),
        "visual.attn_pool.attn.v_proj_weight": torch.ones(32, 40),
        "text.attn_mask": torch.ones(2),
    }
    with pytest.raises(ValueError, match="does not fit the model: some weights are missing, unknown or of") as refused:
        convert_open_clip(weights, model)
    lines = str(refused.value).splitlines()
    assert lines[1:] == [
        "  text.cls_emb: not in the checkpoint",
        "  visual.head.weight: not in the model",
        "  visual.attn_pool.attn.k_proj_weight [32, 48] + visual.attn_pool.attn.v_proj_weight [32, 40]: do not become "
        "generative_pooler.0.attention.kv.weight [64, 48]",
        "  text.ln_final.bias [7]: do not become text_projection.0.bias [32]",
    ]


@pytest.mark.parametrize(
    ("weights", "cause"),
    [
        (
            {"a": torch.ones(1)},
            "none of its 1 names, a ..., is of open_clip's CoCa: it is a model of another architecture",
        ),
        ({"visual.proj": torch.ones(1)}, "it has no text_decoder, which writes captions: it is a CLIP"),
        (
            {"text_decoder.ln_final.bias": torch.ones(1), "visual.conv1.weight": torch.ones(1024, 3, 14, 14)},
            r"it is of another size, with patches \[1024, 3, 14, 14\] where .*; set model.name=open_clip_coca_vit_l_14",
        ),
    ],
)
def test_weights_of_another_model_are_refused_with_the_likely_cause(model, weights, cause):
    with pytest.raises(ValueError, match=f"does not fit the model: {cause}") as refused:
        convert_open_clip(weights, model)
    assert len(str(refused.value).splitlines()) == 7  # five names, and how many more


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_not_converted(model, value):
    weights = dict(randomised(Reference(**CONFIGS["tiny"])).state_dict())
    weights["text.ln_final.bias"] = weights["text.ln_final.bias"].clone()
    weights["text.ln_final.bias"][2] = value
    with pytest.raises(
        ValueError,
        match=r"convert_open_clip: every weight must be a finite number, .* in 1 of \d+ "
        r"tensors of the checkpoint: text.ln_final.bias; ",
    ):
        convert_open_clip(weights, model)


def test_an_image_size_that_is_not_a_multiple_of_patches_is_refused():
    with pytest.raises(
        ValueError, match="open_clip_coca: image_size must be a multiple of patch_size, got image_size=225"
    ):
        open_clip_coca(image_size=225)
