"""Late interaction on the same backbone, by sentence-transformers: a vector for every token of both sides, MaxSim."""

from typing import Any

from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.multi_vector_encoder import (
    MultiVectorEncoder,
    MultiVectorEncoderTrainer,
    MultiVectorEncoderTrainingArguments,
)
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from torch import Tensor

from poly_encoders.modeling.text_poly_encoder import context_texts
from poly_encoders.training.data.sources import text_columns
from poly_encoders.training.runs.preparing import freeze_word_embeddings, set_dropout

# Of the recipe, what upstream's options have too.
SHARED = ("output_dir", "max_steps", "per_device_train_batch_size", "learning_rate", "warmup_steps", "weight_decay")
SHARED += ("save_strategy", "logging_steps", "report_to", "seed", "bf16", "use_cpu", "dataloader_num_workers")


class LateInteraction(MultiVectorEncoder):
    """Upstream's model, which scores pairs of texts as the evaluator asks for it."""

    turn_separator: str

    def context_texts(self, contexts: list[Any]) -> list[str]:
        return [str(text) for text in context_texts(contexts, self.turn_separator)]

    def predict(self, pairs: list[tuple[str, str]], batch_size: int, **_: Any) -> Tensor:
        """MaxSim of each context and candidate, `(pairs,)`; a text of several pairs is encoded once."""
        vectors = []
        sides = zip(*pairs, strict=True)
        for encode, texts in zip((self.encode_query, self.encode_document), sides, strict=True):
            own = list(dict.fromkeys(texts))
            found = dict(zip(own, encode(own, batch_size=batch_size), strict=True))
            vectors.append([found[text] for text in texts])
        return self.similarity_pairwise(*vectors)


def build_model(options: Any) -> LateInteraction:
    """Upstream's modules but for the new projection to 128 dimensions: nothing here is random."""
    lengths = {"query_length": options.max_context_length, "document_length": options.max_candidate_length}
    encoder = Transformer(options.model_name_or_path, **lengths)
    encoder.tokenizer.truncation_side = "left"  # as of every encoder here that reads both sides
    model = LateInteraction(modules=[encoder, MultiVectorMask(), Normalize(module_input_name="token_embeddings")])
    model.turn_separator = options.turn_separator
    return model


def build_trainer(options: Any) -> MultiVectorEncoderTrainer:
    """Upstream's trainer with its own loss, on the examples and with the recipe of the others."""
    model = build_model(options.model)
    freeze_word_embeddings(model)
    set_dropout(model, options.training.dropout)
    data = options.data.train_source(options.training.seed).examples()
    context, *candidates = text_columns(data)
    texts = model.context_texts(data[context])
    data = data.remove_columns(context).add_column(context, texts).select_columns([context, *candidates])
    given = {name: getattr(options.training, name) for name in SHARED}
    args = MultiVectorEncoderTrainingArguments(**given, batch_sampler="no_duplicates")
    return MultiVectorEncoderTrainer(model=model, args=args, train_dataset=data)
