"""Names of the libraries below that are private, or in no documentation, and that this package leans on all the same.

Each has the parameters that are relied on (`...`: any others) or `None`, and what it is for. The tests say which
one moved when upstream changes; pyproject.toml keeps to the versions that were looked at.
"""

_LOADING = "model_name_or_path ..."

PRIVATE: dict[str, tuple[str | None, str]] = {
    # Loading and saving of sentence-transformers' models
    "sentence_transformers.base.model:BaseModel._module_classes": (None, "our modules load without trust_remote_code"),
    "sentence_transformers.base.model:BaseModel._load_config_modules": (_LOADING, "a Bi-encoder from modules.json"),
    "sentence_transformers.base.model:BaseModel._load_converted_modules": (
        _LOADING + " model_type",
        "a model of another kind becomes ours",
    ),
    "sentence_transformers:SentenceTransformer._load_default_modules": (_LOADING, "a new model from a checkpoint"),
    "sentence_transformers:CrossEncoder._load_default_modules": (_LOADING, "a new model from a checkpoint"),
    "sentence_transformers:SentenceTransformer._parse_model_config": ("self model_config", "our options when loading"),
    "sentence_transformers:CrossEncoder._parse_model_config": ("self model_config", "our options when loading"),
    "sentence_transformers:SentenceTransformer._get_model_config": ("self", "our options when saving"),
    "sentence_transformers:CrossEncoder._get_model_config": ("self", "our options when saving"),
    "sentence_transformers:SentenceTransformer._inference": (
        "self inputs ...",
        "no texts: a full batch's dtype",
    ),
    "sentence_transformers.base.model:BaseModel._input_length": ("sample", "batches of texts with as many tokens"),
    "sentence_transformers:CrossEncoder._resolve_prompt": ("self prompt prompt_name", "a stranger's prompts"),
    # Training
    "sentence_transformers.base.data_collator:BaseDataCollator._get_task_for_column": (
        "self column_name column_position router_mapping",
        "the first column is the context's, whatever its name",
    ),
    "sentence_transformers.base.losses.gradcache:CachedLossMixin": (None, "trainers know a loss that caches gradients"),
    "sentence_transformers.base.losses.merged_forward:embed_columns": (
        "model features_list ...",
        "one pass for all",
    ),
    "sentence_transformers.base.trainer:BaseTrainer._load_from_checkpoint": (
        "self ...",
        "resuming, and the best",
    ),
    "transformers:Trainer._load_from_checkpoint": ("self resume_from_checkpoint model", "the same in pre-training"),
    "transformers:Trainer._save": ("self output_dir state_dict", "pre-training saves two encoders"),
    "transformers:Trainer._save_checkpoint": ("self model trial", "a full disk is told apart while saving"),
    "transformers:Trainer.save_model": ("self output_dir _internal_call", "a save of our own is no push"),
    "transformers:Trainer._hp_search_setup": ("self trial", "the codes' learning rate follows each trial's"),
    # Models, configurations, tokenizers and pipelines of transformers
    "transformers.configuration_utils:strict": ("cls ...", "checked configurations; huggingface_hub's"),
    "transformers.utils.generic:can_return_tuple": ("func", "return_dict=False"),
    "transformers.utils.generic:maybe_autocast": ("device_type ... enabled ...", "scores in float32 under autocast"),
    "transformers:PreTrainedConfig._attn_implementation": (None, "ready backbones keep their attention"),
    "transformers:PreTrainedModel._init_weights": ("self module", "new codes"),
    "transformers:PreTrainedModel._keys_to_ignore_on_load_unexpected": (None, "no warning about poolers nobody reads"),
    "transformers:PreTrainedModel._no_split_modules": (None, "what FSDP wraps"),
    **{
        f"transformers:PreTrainedModel._supports_{kind}": (None, "attention is the backbones' affair")
        for kind in ("sdpa", "flash_attn", "flex_attn", "attention_backend")
    },
    "transformers:PreTrainedModel._auto_class": (None, "set by register_for_auto_class: saved models carry their code"),
    "transformers.tokenization_utils_tokenizers:TokenizersBackend._encode_plus": (
        "self text ...",
        "how ParlAI cuts",
    ),
    "transformers:Pipeline._sanitize_parameters": ("self ...", "the pipeline's steps, as documented"),
    "transformers:Pipeline._forward": ("self ...", "the pipeline's steps, as documented"),
    **{
        f"transformers:Pipeline._load_{kind}": (None, "the pipeline needs a tokenizer and nothing else")
        for kind in ("tokenizer", "processor", "image_processor", "video_processor", "feature_extractor")
    },
}
