"""open_clip's descriptions of contrastive captioners, its model_configs, as arguments of `open_clip_coca`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Keys of a config, by section, that become arguments of open_clip_coca; with open_clip's defaults.
READ: dict[str, dict[str, Any]] = {
    "vision_cfg": {
        "layers": 12,
        "width": 768,
        "head_width": 64,
        "patch_size": 16,
        "image_size": 224,
        "attn_pooler_queries": 256,
        "attn_pooler_heads": 8,
    },
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
    "multimodal_cfg": {"width": 512, "heads": 8, "layers": 12},
}
_PLAIN_BLOCK = {
    "ls_init_value": None,
    "act_kwargs": None,
    "norm_kwargs": None,
    "block_type": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
}
# Keys whose values are those of open_clip_coca, of which the first is open_clip's default but for the keys in GIVEN.
FIXED: dict[str, dict[str, Any]] = {
    "": {"quick_gelu": False, "init_logit_bias": None, "pad_id": 0},
    "vision_cfg": {
        "attentional_pool": (True, "cascade"),
        "output_tokens": True,
        "mlp_ratio": 4.0,
        "no_ln_pre": False,
        "pos_embed_type": "learnable",
        "pool_type": "tok",
        "timm_model_name": None,
        **_PLAIN_BLOCK,
    },
    "text_cfg": {
        "text_arch": ("clip", "modern"),
        "embed_cls": True,
        "output_tokens": True,
        "correct_cls_mask": (False, True),
        "mlp_ratio": 4.0,
        "pad_id": 0,
        "no_causal_mask": False,
        "proj_type": "linear",
        "proj_bias": False,
        "hf_model_name": None,
        "hf_tokenizer_name": None,
        "tokenizer_kwargs": None,
        **_PLAIN_BLOCK,
    },
    "multimodal_cfg": {"text_arch": ("clip", "modern"), "ls_init_value": None},
}
GIVEN = {"vision_cfg": ("attentional_pool", "output_tokens"), "text_cfg": ("embed_cls",)}
# Keys that open_clip does not read for such a model, or only in training.
IGNORED: dict[str, set[str]] = {
    "": {"embed_dim", "custom_text", "init_logit_scale", "nonscalar_logit_scale", *READ},
    "vision_cfg": {"patch_dropout", "final_ln_after_pool", "timm_model_pretrained", "timm_pool", "timm_proj"},
    "text_cfg": {
        "pool_type",
        "eos_id",
        "bos_id",
        "use_pad_mask",
        "final_ln_after_pool",
        "tokenizer_mode",
        "hf_model_pretrained",
        "hf_proj_type",
    },
    "multimodal_cfg": {"context_length", "vocab_size", "attn_pooler_heads", "n_queries", "dim_head", "mlp_ratio"},
}
# The same for text decoders of text_arch "modern".
_MODERN_BLOCK = {
    "text_arch": "modern",
    "ls_init_value": None,
    "mlp_ratio": 4.0,
    "pos_embed": "rope",
    "rope_temperature": 10000.0,
    "mlp_type": "swiglu",
    "norm_type": ("rmsnorm", None),
    "norm_eps": 1e-6,
    "norm_placement": "pre",
    "attn_gated": True,
    "qk_norm": False,
    "value_residual": False,
    "attention_bias": None,
    "mlp_bias": None,
    "gate_bias": None,
}
MODERN_FIXED: dict[str, dict[str, Any]] = {
    **FIXED,
    "text_cfg": {
        "output_tokens": True,
        "attention_mode": "causal",
        "pool_type": ("eos", "argmax"),  # two names for the same
        "pre_norm": False,
        "reg_tokens": 0,
        "pad_id": 0,
        "proj_type": "linear",
        "proj_bias": False,
        "hf_model_name": None,
        "hf_tokenizer_name": None,
        "tokenizer_kwargs": None,
        **_MODERN_BLOCK,
    },
    "multimodal_cfg": {"cross_attn_ratio": 1, **_MODERN_BLOCK},
}
MODERN_GIVEN = {
    **GIVEN,
    "text_cfg": ("text_arch", "attn_gated", "output_tokens"),
    "multimodal_cfg": ("text_arch", "attn_gated"),
}
_OF_TRAINING = {"freeze_pad_embed", "zero_init_residual", "variable_text"}
MODERN_IGNORED = {
    **IGNORED,
    "text_cfg": {"eos_id", "bos_id", "embed_cls", "correct_cls_mask", "use_pad_mask", "tokenizer_mode", *_OF_TRAINING},
    "multimodal_cfg": {"context_length", "vocab_size", "attn_pooler_heads", "n_queries", "dim_head", *_OF_TRAINING},
}


def model_arguments(file: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `open_clip_coca` for open_clip's description of an architecture.

    Raises ValueError that lists the keys that are missing, unknown, or have values that `open_clip_coca` does not.
    """
    if not isinstance(config, Mapping) or not isinstance(config.get("multimodal_cfg"), Mapping):
        raise ValueError(
            f"open_clip_files: {file} must describe a CoCa, with a multimodal_cfg, got the keys "
            f"{', '.join(config)[:200]}: it is another model; give the repository of a CoCa"
        )
    sections = {key: config[key] if isinstance(config.get(key), Mapping) else {} for key in READ}
    modern = any(sections[key].get("text_arch") == "modern" for key in ("text_cfg", "multimodal_cfg"))
    faults = [fault for key, section in {"": config, **sections}.items() for fault in _faults(key, section, modern)]
    vision, text, multimodal = ({**READ[key], **sections[key]} for key in READ)
    dim, size = config.get("embed_dim"), vision["image_size"]
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    numbers = {f"{key}.{name}": {**READ[key], **sections[key]}[name] for key in READ for name in READ[key]}
    numbers |= {"embed_dim": dim, "vision_cfg.image_size": size}
    faults += [f"{key} must be a whole number, got {n!r}" for key, n in numbers.items() if type(n) is not int]
    if not (dim == text["width"] == multimodal["width"]) or text["heads"] != multimodal["heads"]:
        faults.append(
            "embed_dim and the width and heads of text_cfg and multimodal_cfg must agree, got "
            f"{dim}, {text['width']} and {multimodal['width']}, {text['heads']} and {multimodal['heads']}"
        )
    end, size_of_vocabulary = text.get("eos_id"), text["vocab_size"]
    if modern and type(size_of_vocabulary) is int and end != size_of_vocabulary - 1:
        faults.append(f"text_cfg.eos_id must be {size_of_vocabulary - 1}, EOS of CLIP's vocabulary, got {end!r}")
    if faults:
        raise ValueError(
            "\n  ".join([f"open_clip_files: {file} must describe an architecture that this library has:", *faults])
            + "\nopen it with open_clip"
        )
    return {
        "vocab_size": text["vocab_size"] + 1,  # with CLS
        "context_length": text["context_length"] + 1,
        "image_size": size,
        "patch_size": vision["patch_size"],
        "vision_dim": vision["width"],
        "vision_heads": vision["width"] // max(1, vision["head_width"]),
        "vision_layers": vision["layers"],
        "num_queries": vision["attn_pooler_queries"],
        "pooler_heads": vision["attn_pooler_heads"],
        "dim": dim,
        "num_heads": text["heads"],
        "text_layers": text["layers"],
        "multimodal_layers": multimodal["layers"],
        "correct_cls_mask": bool(text.get("correct_cls_mask")),
        "cascade_pooler": vision["attentional_pool"] == "cascade",
        "text_arch": "modern" if modern else "clip",
    }


def _faults(key: str, section: Mapping[str, Any], modern: bool) -> list[str]:
    """Returns what a section of a config has that `open_clip_coca` does not."""
    fixed, ignored, given = (MODERN_FIXED, MODERN_IGNORED, MODERN_GIVEN) if modern else (FIXED, IGNORED, GIVEN)
    values = {name: x if isinstance(x, tuple) else (x,) for name, x in fixed[key].items()}
    rules = {name: f"{key}.{name}".lstrip(".") + f" must be {' or '.join(map(repr, x))}" for name, x in values.items()}
    faults = [f"{rules[name]}, got nothing" for name in given.get(key, ()) if name not in section]
    for name, value in section.items():
        if name in values:
            if value not in values[name] and (value or all(values[name])):  # false, null and {} are all off
                faults.append(f"{rules[name]}, got {value!r}")
        elif name not in READ.get(key, {}) and name not in ignored[key]:
            faults.append(f"{key}.{name}".lstrip(".") + f" is not known, got {str(value)[:60]}")
    return faults
