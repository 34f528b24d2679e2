"""A page to rank candidates for a dialogue with any of the three encoders, and to look into a Poly-encoder.

`poly-encoders demo` serves it, and so does the Space in hub_cards/space/. Nothing but the model comes from elsewhere.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from poly_encoders import PolyEncoder
from poly_encoders.demo import drawing
from poly_encoders.demo.dialogues import EXAMPLES
from poly_encoders.demo.wording import Model, wording

MAX_TURNS, MAX_CANDIDATES, MAX_CHARACTERS = 100, 100, 20_000

# A click is told by the candidate's number, so that the ranking need not be drawn again and keeps the keyboard's focus.
CHOOSE = """
element.addEventListener('click', (event) => {
  const row = event.target.closest('[data-candidate]');
  if (!row) return;
  element.querySelectorAll('[data-candidate]').forEach((other) => other.setAttribute('aria-pressed', other === row));
  trigger('click', {candidate: Number(row.dataset.candidate)});
});
"""


# Fonts that are on the reader's machine: Gradio's own come from another host. The colours are in style.css.
THEME = gr.themes.Base(
    primary_hue="blue",
    neutral_hue="slate",
    font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"],
    font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
)
_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


class Ranked(NamedTuple):
    """What was ranked last: an explanation belongs to it, whatever has been typed since."""

    turns: list[str]
    candidates: list[str]
    chosen: int  # the candidate that is explained, its place in `candidates`


class Demo:
    """What the page does, for one model of any of the three kinds."""

    def __init__(self, model: Model) -> None:
        self.model, self.words = model, wording(model)

    def rank(self, dialogue: list[str], candidates: list[str]) -> list[dict[str, Any]]:
        """Rank candidates for a dialogue, its turns oldest first; corpus_id, score and text of each, best first."""
        try:
            check(dialogue, candidates)
            return [dict(entry) for entry in self.model.rank(dialogue, candidates, return_documents=True)]
        except (TypeError, ValueError) as error:  # Gradio tells a client of its own errors only
            raise gr.Error(str(error), print_exception=False) from error

    def show_ranking(self, dialogue: str, candidates: str, all_vectors: bool) -> tuple[str, str, Ranked | None]:
        """The bars, or what is to be mended; the explanation of the best candidate; and what was ranked."""
        turns, texts = lines(dialogue), lines(candidates)
        try:
            entries = self.rank(turns, texts)
        except gr.Error as error:
            return drawing.draw("message", error.message), "", None
        ranked = Ranked(turns, texts, entries[0]["corpus_id"])
        scale = drawing.COSINE_SCALE if getattr(self.model, "scores_are_cosines", False) else 1
        bars = drawing.ranking(entries, isinstance(self.model, PolyEncoder), scale)
        return bars, self.show_explanation(ranked, all_vectors), ranked

    def choose(
        self, ranked: Ranked | None, all_vectors: bool, event: gr.EventData
    ) -> tuple[str | dict[str, Any], Ranked | None]:
        """The explanation of the candidate that was clicked on."""
        chosen = getattr(event, "candidate", None)
        if ranked is None or not isinstance(chosen, int) or not 0 <= chosen < len(ranked.candidates):
            return gr.skip(), ranked
        ranked = ranked._replace(chosen=chosen)
        return self.show_explanation(ranked, all_vectors), ranked

    def show_explanation(self, ranked: Ranked | None, all_vectors: bool) -> str:
        """Why the chosen candidate got its score, or why that cannot be said of this model."""
        if ranked is None:
            return ""
        if not isinstance(self.model, PolyEncoder):
            return f'<p class="pe-hint">{drawing.shown(self.words.how)}</p>'
        candidate = ranked.candidates[ranked.chosen]
        why = self.model.explain(ranked.turns, candidate)
        return drawing.explanation(why, candidate, self.words.vector, all_vectors)


def lines(text: str | None) -> list[str]:
    """The lines of `text` that hold something."""
    return [line.strip() for line in (text or "").splitlines() if line.strip()]


def check(turns: Sequence[str], candidates: Sequence[str]) -> None:
    """Raise a ValueError that says what is missing or too much."""
    for what, texts, limit in (("turn", turns, MAX_TURNS), ("candidate", candidates, MAX_CANDIDATES)):
        if not texts:
            raise ValueError(f"There is no {what}. Write at least one, then rank.")
        size = sum(map(len, texts))
        if len(texts) > limit or size > MAX_CHARACTERS:
            found, most = f"{len(texts)} {what}s of {size:,} characters", f"{limit} of {MAX_CHARACTERS:,} in all"
            raise ValueError(f"There are {found}; this page takes up to {most}. Leave some out.")


def add_turn(dialogue: str, turn: str) -> tuple[str, str]:
    """The dialogue with one more turn (one for each line), and an empty box for the next."""
    return "\n".join([*lines(dialogue), *lines(turn)]), ""


def remove_turn(dialogue: str) -> str:
    """The dialogue without its last turn."""
    return "\n".join(lines(dialogue)[:-1])


def build(model: Model, name: str) -> gr.Blocks:
    """The page for one model, called `name`."""
    demo, explains = Demo(model), isinstance(model, PolyEncoder)
    turns, texts = next(iter(EXAMPLES.values()))
    with gr.Blocks(title=f"{name} · poly-encoders", analytics_enabled=False) as page:
        ranked = gr.State()
        _html(
            f'<header class="pe-header"><h1>What comes next?</h1><p>{demo.words.kind} '
            f"<code>{drawing.shown(name)}</code> ranks what could be said next in a dialogue.</p></header>"
        )
        with gr.Row(elem_classes="pe-buttons"):
            examples = [gr.Button(title, size="sm", min_width=110) for title in EXAMPLES]
        with gr.Row(elem_classes="pe-columns"):
            with gr.Column(min_width=300):
                _html('<h2 class="pe-title">Dialogue</h2>')
                bubbles = _html(drawing.draw("dialogue", lines(turns)), elem_id="bubbles")
                turn = gr.Textbox(label="Next turn", placeholder="What is said next?", lines=1, elem_id="turn")
                with gr.Row(elem_classes="pe-buttons"):
                    add = gr.Button("Add turn", size="sm", min_width=90, elem_id="add")
                    undo = gr.Button("Remove last", size="sm", min_width=90, elem_id="undo")
                    clear = gr.Button("Clear", size="sm", min_width=60, elem_id="clear")
                with gr.Accordion("Edit all turns as text", open=False):
                    dialogue = gr.Textbox(turns, label="One turn per line, two speakers in turn", lines=4, max_lines=12)
                candidates = gr.Textbox(
                    texts, label="Candidates, one per line", lines=6, max_lines=14, elem_id="candidates"
                )
                button = gr.Button("Rank", variant="primary", elem_id="rank")
            with gr.Column(min_width=300):
                _html('<h2 class="pe-title">Ranking</h2>')
                bars = _html(elem_id="bars", js_on_load=CHOOSE)
        with gr.Column(visible=explains):
            _html(f'<h2 class="pe-title">Why?</h2><p class="pe-hint">{drawing.shown(demo.words.how)}</p>')
            all_vectors = gr.Checkbox(label="Show all of them, not only those that decided most", elem_id="all-vectors")
        why = _html(elem_id="why")

        dialogue.change(lambda text: drawing.draw("dialogue", lines(text)), dialogue, bubbles, **_QUIET)
        gr.on([add.click, turn.submit], add_turn, [dialogue, turn], [dialogue, turn], **_QUIET)
        undo.click(remove_turn, dialogue, dialogue, **_QUIET)
        clear.click(lambda: "", None, dialogue, **_QUIET)
        rank = (demo.show_ranking, [dialogue, candidates, all_vectors], [bars, why, ranked])
        gr.on([page.load, button.click], *rank, api_visibility="private")
        for example, filled in zip(examples, EXAMPLES.values(), strict=True):
            fill = example.click(lambda filled=filled: filled, None, [dialogue, candidates], **_QUIET)
            fill.then(*rank, api_visibility="private")
        bars.click(demo.choose, [ranked, all_vectors], [why, ranked], api_visibility="private")
        all_vectors.change(demo.show_explanation, [ranked, all_vectors], why, api_visibility="private")
        gr.api(demo.rank, api_name="rank")
    return page


def _html(value: str = "", **options: Any) -> gr.HTML:
    return gr.HTML(value, apply_default_css=False, **options)


def serve(model: Model, name: str, host: str | None = None, port: int | None = None) -> None:
    """Serve the page until it is stopped; of a folder's path the last part is shown."""
    build(model, Path(name).name if Path(name).is_dir() else name).queue(max_size=64).launch(
        server_name=host,
        server_port=port,
        share=False,
        ssr_mode=False,
        footer_links=["api", "gradio"],
        theme=THEME,
        css_paths=Path(__file__).with_name("style.css"),
    )
