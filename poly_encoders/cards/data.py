"""What goes into the three kinds of card: sentence-transformers' card data, with our metadata and texts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub.repocard_data import eval_results_to_model_index
from sentence_transformers.base.model_card import BaseModelCardData, format_duration
from sentence_transformers.cross_encoder.model_card import CrossEncoderModelCardData as UpstreamCrossEncoderCardData
from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData

from poly_encoders.cards.examples import widget_examples
from poly_encoders.cards.results import eval_results, evaluations, shown_options, training_table
from poly_encoders.cards.user_text import EDITS, TRAINING_TAGS, Card
from poly_encoders.evaluation import CandidateRankingEvaluator
from poly_encoders.lengths import token_limit

CURVE = "evaluation.png"  # the curve of a run's evaluations, as training writes it
PLACEHOLDER = "path/to/this/model"  # in the snippets of a card that knows no Hub id

_TEMPLATES = Path(str(files("poly_encoders.hub_cards")))
_TAGS = ["poly-encoder", "arxiv:1905.01969"]
_TASK = "ranking replies, passages or labels for a context"

# What the snippets of every card rank.
_TURNS = ["Hi! Have you been here before?", "No, it's my first time. Is the coffee any good?"]
_CANDIDATES = ["The best in town, try the espresso.", "My brother works as a plumber.", "It opens at nine on Sundays."]


@dataclass
class RankingCardData(BaseModelCardData):
    """What the three kinds of card data share; goes before upstream's class of the kind.

    Attributes:
        is_untrained: Whether weights that decide the score are new, so that the card warns of it.
        curve: The plot of the evaluations, a file to save beside the card; `None` where there is none.
        log_history: The trainer's log, of which the card makes its table.
        training_seconds: How long training took, once it is over.
        loaded_id: Hub id of the model that was loaded.
    """

    model_name: str | None = None  # upstream's field, declared for its type
    is_untrained: bool = field(default=False, init=False, repr=False)
    curve: Path | None = field(default=None, init=False, repr=False)
    log_history: list[dict[str, Any]] = field(default_factory=list, init=False, repr=False)
    training_seconds: float | None = field(default=None, init=False, repr=False)
    loaded_id: str | None = field(default=None, init=False, repr=False)
    _loaded: dict[str, Any] | None = field(default=None, init=False, repr=False)  # metadata of the card loaded

    # --- what the card is told -----------------------------------------------------------------------------------

    @classmethod
    def of_upstream(cls, data: Any) -> Any:
        """Card data of ours with what a user filled into upstream's; ours as they are."""
        if data is None or isinstance(data, cls):
            return data
        plain = type(data)()
        ours = cls(local_files_only=data.local_files_only)
        for item in fields(data):
            if item.init and hasattr(ours, item.name) and getattr(data, item.name) != getattr(plain, item.name):
                setattr(ours, item.name, getattr(data, item.name))
        ours.tags = list(dict.fromkeys([*cls().tags, *(tag for tag in data.tags if tag not in plain.tags)]))
        return ours

    def adopt(self, text: str | None, loaded_id: str | None, curve: Path | None) -> None:
        """Take over what is still true from the card that the model was loaded with.

        Args:
            text: The card, where there is one.
            loaded_id: Hub id of what was loaded; `None` for a folder.
            curve: Where the curve of its evaluations would be.
        """
        try:
            card = Card.parse(text or "")
        except ValueError:  # the user's own business; such a card stays as it is
            card = Card({}, "", {}, None)
        notes = card.record or {}
        self._loaded = card.metadata
        self.loaded_id = loaded_id or notes.get("id")
        self.curve = curve
        if notes.get("examples") is False:
            self.generate_widget_examples = False
        before = self._metadata_before()
        if not self.language:
            self.set_language(before["language"])
        if self.license is None:
            self.set_license(before["license"])
        self.add_tags(before["tags"])

    def _metadata_before(self) -> dict[str, Any]:
        """Language, license and tags as they were before the program said anything about them."""
        loaded = self._loaded or {}
        tags = [tag for tag in _texts(loaded.get("tags")) if not TRAINING_TAGS.fullmatch(tag)]
        return {
            "language": _texts(loaded.get("language")),
            "license": next(iter(_texts(loaded.get("license"))), None),
            "tags": list(dict.fromkeys([*type(self)().tags, *tags])),
        }

    def said(self) -> set[str]:
        """Keys of the metadata that the program set itself, by arguments or methods."""
        now = {"language": _texts(self.language), "license": self.license}
        now["tags"] = [tag for tag in self.tags if not TRAINING_TAGS.fullmatch(tag)]
        before = self._metadata_before()
        return {name for name, value in now.items() if value != before[name]}

    @property
    def trained(self) -> bool:
        """Whether the model was trained since it was loaded or made."""
        return "generated_from_trainer" in self.tags

    @property
    def shown_id(self) -> str:
        """What the snippets load."""
        return self.model_id or (None if self.trained else self.loaded_id) or PLACEHOLDER

    def set_examples(self, samples: Any, shared: Sequence[str] = ()) -> None:
        """Make the widget's examples of ranking sets, unless there are some or the user wants none."""
        if self.generate_widget_examples and not self.widget and self.pipeline_tag == "sentence-similarity":
            self.widget += widget_examples(samples, lambda context: self.model.context_texts([context])[0], shared)

    def set_widget_examples(self, dataset: Any) -> None:
        """Nothing: upstream would take training data too. Examples are of the evaluation's sets; see `set_examples`."""

    def set_evaluation_metrics(self, evaluator: Any, metrics: dict[str, Any], epoch: int = 0, step: int = 0) -> None:
        """As upstream's; the evaluator's ranking sets make the widget's examples."""
        super().set_evaluation_metrics(evaluator, metrics, epoch, step)
        if isinstance(evaluator, CandidateRankingEvaluator):  # upstream's have samples of other forms
            self.set_examples(evaluator.samples, evaluator.shared_candidates)

    def set_base_model(self, model_id: str, revision: Any = None) -> bool:
        """As upstream's, but a folder is never looked up on the Hub, whatever it is called."""
        return not Path(model_id).exists() and super().set_base_model(model_id, revision)

    def try_to_set_base_model(self) -> None:
        """Nothing: what the model was built from was set on loading, and upstream guesses ids from folders' names."""

    # --- what it makes of it ---------------------------------------------------------------------------------------

    def run_usage_snippet(self) -> None:
        """Rank the snippets' example, which is of no data set, so that the card shows what they print."""
        self.similarities = None  # should it fail, the snippets go without
        ranking = self.model.rank(_TURNS, _CANDIDATES, return_documents=True, show_progress_bar=False)
        self.similarities = "\n".join(f"# {entry['score']:.2f}  {entry['text']}" for entry in ranking)

    def generate_usage_snippet(self) -> str:
        """Nothing: the templates have the snippets."""
        return ""

    def get_default_model_name(self) -> str:
        kind = {"PolyEncoder": "Poly-encoder", "BiEncoder": "Bi-encoder", "CrossEncoder": "Cross-encoder"}
        name = kind.get(type(self.model).__name__, type(self.model).__name__)
        base = self._made_from()
        return f"{name} based on {base}" if isinstance(base, str) else name

    def _made_from(self) -> Any:
        """The Hub's id, or ids, of what this was made from. Upstream takes a loaded model to be based on itself."""
        if self._loaded is not None and not self.trained:
            return self._loaded.get("base_model")
        return self.base_model

    def format_eval_metrics(self) -> dict[str, Any]:
        """The evaluators' figures: for the card's tables, and as `metrics` and `model-index` of the metadata."""
        found = evaluations(self.eval_results_dict)
        results = eval_results(found, self.pipeline_tag)
        return {
            "evaluations": found,
            "metrics": list(dict.fromkeys(result.metric_type for result in results)),
            "model-index": eval_results_to_model_index(self.model_name or "", results) if results else None,
        }

    def format_training_logs(self) -> dict[str, Any]:
        return {}

    def get_training_duration_data(self) -> dict[str, Any]:
        return {}

    def to_dict(self) -> dict[str, Any]:
        """All that the templates and the metadata are made of."""
        name = self.model_name
        data = super().to_dict()
        self.model_name = name  # upstream would hold on to a default that training may change
        data.update(  # in place: upstream keeps the same dictionary to make YAML of
            base_model=self._made_from(),
            edits=EDITS,
            evaluations=data.get("evaluations", []),
            co2_eq_emissions=data.get("co2_eq_emissions"),
            snippet_id=self.shown_id,
            turns=_TURNS,
            candidates=_CANDIDATES,
            printed=self.similarities or "",
            trained=self.trained,
            is_untrained=self.is_untrained and not self.trained,
            curve=CURVE if self.trained and self.curve is not None and self.curve.is_file() else None,
            options=shown_options(data["all_hyperparameters"], data["non_default_hyperparameters"]),
            rows=training_table(self.log_history, self.best_model_step),
            duration=None if self.training_seconds is None else format_duration(self.training_seconds),
            versions={"poly-encoders": _own_version(), **data["version"]},
            literal=partial(json.dumps, ensure_ascii=False),
            cell=_cell,
        )
        data["shared"] = _render("shared.md", data)
        return data

    def get_model_specific_metadata(self) -> dict[str, Any]:
        """Facts about the model: its size, lengths and turns."""
        context, candidate = self.lengths()
        seen = {id(parameter): parameter.numel() for parameter in self.model.parameters()}
        return {
            "millions": sum(seen.values()) / 1e6,
            "context_tokens": context,
            "candidate_tokens": candidate,
            "candidate_end": "first",  # which of its tokens are kept of a candidate that is too long
            "turn_separator": self.model.turn_separator,
            "max_turns": self.model.max_turns,
            "parlai": "parlai" in self.tags,
        }

    def lengths(self) -> tuple[int, int]:
        """Tokens kept of a context and of a candidate."""
        raise NotImplementedError


def _render(template: str, data: Mapping[str, Any]) -> str:
    text = (_TEMPLATES / template).read_text(encoding="utf-8")
    return jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(text).render(data)


@cache
def _own_version() -> str:
    try:
        return version("poly-encoders")
    except PackageNotFoundError:  # a copy of the sources that was never installed
        return "(not installed)"


def _texts(value: Any) -> list[str]:
    """A text or a list of them, as YAML may have either, as a list."""
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str)]


def _cell(value: Any) -> str:
    """A value for a cell of a Markdown table."""
    return str(value).replace("|", "\\|").replace("\n", " ")


@dataclass
class PolyEncoderModelCardData(RankingCardData, SentenceTransformerModelCardData):
    """Card data of a `PolyEncoder`; parameters as for `SentenceTransformerModelCardData`.

    The library is transformers, so that the Hub shows a snippet of `AutoModel` and `AutoTokenizer`: that is how a
    Poly-encoder loads where nothing of ours is installed, and plain sentence-transformers cannot score with it.
    """

    task_name: str = _TASK
    tags: list[str] = field(default_factory=lambda: [*_TAGS, "retrieval", "reranking"])
    library_name: str = field(default="transformers", init=False)
    template_path: Path = field(default=_TEMPLATES / "poly_encoder.md", init=False, repr=False)

    def lengths(self) -> tuple[int, int]:
        module = self.model[0]
        candidate_encoder, wanted = module.model.candidate_encoder, module.config.max_candidate_length
        return module.max_seq_length, token_limit(module.tokenizer, candidate_encoder, wanted)

    def get_model_specific_metadata(self) -> dict[str, Any]:
        config = self.model[0].config
        backbone = type(self.model[0].model.context_encoder).__name__
        # As encode_query and encode_document choose them; transformers' pipeline does not read them from the folder.
        prompts = {"context": self._prompt("query"), "candidate": self._prompt("document", "passage", "corpus")}
        return super().get_model_specific_metadata() | {"config": config, "backbone": backbone, "prompts": prompts}

    def _prompt(self, *names: str) -> str:
        prompts = self.model.prompts
        name = next((name for name in names if prompts.get(name) is not None), self.model.default_prompt_name)
        return prompts.get(name) or ""


@dataclass
class BiEncoderModelCardData(RankingCardData, SentenceTransformerModelCardData):
    """Card data of a `BiEncoder`; parameters as for `SentenceTransformerModelCardData`."""

    task_name: str = _TASK
    tags: list[str] = field(
        default_factory=lambda: [
            *_TAGS,
            "bi-encoder",
            "sentence-transformers",
            "sentence-similarity",
            "feature-extraction",
            "dense",
        ]
    )
    template_path: Path = field(default=_TEMPLATES / "bi_encoder.md", init=False, repr=False)

    def lengths(self) -> tuple[int, int]:
        return self.model.length_limit("query"), self.model.length_limit("document")

    def get_model_specific_metadata(self) -> dict[str, Any]:
        return super().get_model_specific_metadata() | {
            "reduction": {"reduction": None, "m": None} | self.model.reduction_options(),
            "share_encoders": self.model.share_encoders,
            "candidate_end": "last" if self.model.share_encoders else "first",  # one tokenizer cuts on one side
            "width": self.model.get_embedding_dimension(),
        }


@dataclass
class CrossEncoderModelCardData(RankingCardData, UpstreamCrossEncoderCardData):
    """Card data of a `CrossEncoder`; parameters as for upstream's class of this name. It has no widget examples.

    The Hub has no widget for `text-ranking`.
    """

    task_name: str | None = _TASK
    tags: list[str] = field(default_factory=lambda: [*_TAGS, "cross-encoder", "reranker", "sentence-transformers"])
    pipeline_tag: str = field(default="text-ranking", init=False)
    template_path: Path = field(default=_TEMPLATES / "cross_encoder.md", init=False, repr=False)

    def lengths(self) -> tuple[int, int]:
        return self.model.length_limits()

    def get_model_specific_metadata(self) -> dict[str, Any]:
        return super().get_model_specific_metadata() | {"backbone": type(self.model[0].model).__name__}
