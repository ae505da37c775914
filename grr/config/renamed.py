"""Keys of configs that have another name now, so that an old config is refused with the new one."""

RENAMED = {
    "run.clip": "run.max_grad_norm",
    "run.average": "run.ema_decay",
    "run.interpolate": "run.wise_ft_alpha",
    "run.candidates": "run.num_eval_images",
    "run.beams": "run.num_beams",
    "run.bf16": "parallel.bf16",
    "run.float8": "parallel.float8",
    "run.compile": "parallel.compile",
    "run.checkpoint_activations": "parallel.activation_checkpointing",
    "run.replicas": "parallel.dp_replicate",
    "run.save_every": "saving.every",
    "run.save_minutes": "saving.minutes",
    "run.keep": "saving.keep",
    "run.accept_changes": "saving.accept_changes",
    "model.context": "model.context_length (tokens of the longest caption) or model.num_queries (of the pooler)",
    "tokenizer.context": "tokenizer.context_length",
    "generation.beams": "generation.num_beams",
    "generation.max_tokens": "generation.max_new_tokens",
    "generation.min_tokens": "generation.min_new_tokens",
    "generation.no_repeat_ngram": "generation.no_repeat_ngram_size",
}
