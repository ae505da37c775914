"""The identity of a run: the values that a resumed run must share with the run that wrote its checkpoints.

Everything in a config belongs to it, except what this file lists: options that do not change what is computed, and
sections whose content is compared by a fingerprint instead of by the path that leads to it.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from grr.config import Config
from grr.config.renamed import current_keys
from grr.data.order import ORDER

# How a run is computed: the numbers stay the same to rounding.
HOW_COMPUTED = frozenset(
    {
        "run.folder",
        "run.micro_batch_size",
        "parallel.compile",
        "parallel.activation_checkpointing",
        "run.in_memory",
        "parallel.dp_replicate",
        "parallel.keep_gathered",
        "run.log_every",
        "saving.every",
        "saving.minutes",
        "saving.keep",
        "run.loggers",
        "loader.workers",
        "loader.prefetch",
    }
)
# Where a pre-trained vision encoder is: its weights are compared by their SHA-256, its architecture by vision_config.
PLACE_OF_TOWER = frozenset({"model.vision_encoder", "model.vision_revision"})
# How long a run lasts, what it reports, and which weights it leaves: the steps that were taken stay true.
MAY_CHANGE = HOW_COMPUTED | {
    *PLACE_OF_TOWER,
    "run.epochs",
    "run.max_steps",
    "run.patience",
    "run.validate_every",
    "run.num_eval_images",
    "run.wise_ft_alpha",
    "run.merge_adapters",
    "run.keep_model",
    "saving.accept_changes",
    "loader.max_bad_fraction",
    "model.path",
}
BY_FINGERPRINT = ("data", "validation", "tokenizer")  # sections
CONTENT = " (names, captions or, of generated data, options have changed)"
REASONS = {
    **dict.fromkeys(BY_FINGERPRINT, CONTENT),
    "tower": " (SHA-256 of its weights)",
    "order": " (version of the order of samples; the version of grr that began the run reads them in its order)",
}
FIRST_ORDER = 1  # of checkpoints that do not record one
OF_TRAINED_VOCABULARY = ("tokenizer.vocab_size", "tokenizer.context_length")  # checkpoints of 0.1 do not record them
OF_TRAINING = (  # of a model whose weights stay as they are
    "model.dropout",
    "model.patch_dropout",
    "model.temperature",
    "tuning.dropout",
)
SHOWN = 10  # keys in a message


def run_identity(cfg: Config, **fingerprints: str | None) -> dict[str, Any]:
    """Returns what defines the numbers of a run, as JSON values by `section.key`.

    fingerprints: of the data, the validation data, the tokenizer and, of a fine-tuning, the weights it starts from.
    The size of a micro-batch belongs to it only where micro-batches are contrasted each in itself, or the dropout of
    adapters is drawn for each. If the run reads data, so does the version of their order, which a seed selects in
    another way in another version.
    """
    sections = vars(cfg)
    local = sections.get("loss", {}).get("negatives") == "local"
    drawn = sections.get("tuning", {}).get("lora") and sections["tuning"]["dropout"] > 0
    free = MAY_CHANGE - {"run.micro_batch_size"} if local or drawn else MAY_CHANGE
    values = {
        f"{section}.{key}": value
        for section, arguments in sections.items()
        if section not in BY_FINGERPRINT and not section.startswith("_")
        for key, value in arguments.items()
        if f"{section}.{key}" not in free
    }
    if sections.get("tokenizer", {"path": ""})["path"] is None:  # the vocabulary was trained for this run
        values |= {key: cfg.tokenizer[key.partition(".")[2]] for key in OF_TRAINED_VOCABULARY}
    if "loader" in sections:
        values["order"] = ORDER
    plain: dict[str, Any] = json.loads(json.dumps(values | fingerprints, default=str))
    return plain


def check_identity(
    folder: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any], *, accepted: Collection[str] = ()
) -> dict[str, list[Any]]:
    """Returns the accepted changes, each as [value in the checkpoint, value in the config].

    saved, wanted: `run_identity` of the run that wrote the checkpoint, under the keys of its time, and of this one.
    Raises ValueError naming every other change with both values, and for a name in `accepted` that the identity does
    not have or that makes another model, whose weights no checkpoint holds.
    """
    saved = {key: wanted[key] for key in OF_TRAINED_VOCABULARY if key in wanted} | current_keys(saved, wanted)
    saved = {"order": FIRST_ORDER} | saved if "order" in wanted else saved
    saved = {key: value for key, value in saved.items() if key not in PLACE_OF_TOWER}  # of checkpoints that record it
    known = saved.keys() | wanted.keys()
    wrong = [key for key in accepted if key not in known or not _acceptable(key, wanted)]
    if wrong:
        names = ", ".join(sorted(key for key in known if _acceptable(key, wanted)))
        raise ValueError(f"check_identity: saving.accept_changes can name {names}, got {', '.join(wrong)}")
    changes = {
        key: [saved.get(key, "not recorded"), wanted.get(key, "not there")]
        for key in sorted(known)
        if saved.get(key, "not recorded") != wanted.get(key, "not there")
    }
    if refused := {key: values for key, values in changes.items() if key not in accepted}:
        lines = [
            f"{key} is {old} in the checkpoint and {new} in the config{REASONS.get(key, '')}"
            for key, (old, new) in refused.items()
        ]
        if len(lines) > SHOWN:  # the folder of another recipe differs in nearly all keys
            lines = [*lines[:SHOWN], f"and {len(lines) - SHOWN} other keys differ"]
        remedy = "Set run.folder to a new folder, or go back to the config.yaml in that folder"
        if all(_acceptable(key, wanted) for key in refused):
            names = ", ".join(refused)
            remedy += f", or change the run on purpose with 'saving.accept_changes=[{names}]', which its log records"
        raise ValueError(
            f"check_identity: the checkpoints in {folder} were written by a different run: {'; '.join(lines)}. {remedy}"
        )
    return changes


def _acceptable(key: str, wanted: Mapping[str, Any]) -> bool:
    """Whether a run can go on with another value: not with another model, nor with another base of its adapters."""
    if key == "tower":  # the weights of the checkpoint would be used all the same
        return False
    if key == "start" and wanted.get("tuning.lora"):
        return False
    return not key.startswith(("model.", "head.", "tokenizer.", "tuning.")) or key in OF_TRAINING
