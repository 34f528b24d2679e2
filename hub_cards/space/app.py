"""A page to rank candidates for a dialogue with any of the three encoders, and to look into a Poly-encoder.

    python app.py [MODEL] [--host HOST] [--port PORT] [--device DEVICE]

MODEL is a folder or a Hub id; in a Space it is the variable MODEL_ID. Nothing is loaded from elsewhere than the model.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read on import: no telemetry, no look for new versions

import gradio as gr

import drawing
from dialogues import EXAMPLES
from poly_encoders import BiEncoder, CrossEncoder, PolyEncoder
from poly_encoders.explaining import Explanation
from poly_encoders.loading import load_model

DEFAULT_MODEL = "org/poly-encoder"  # the Space's own model: name it here or in the variable MODEL_ID
MAX_TURNS, MAX_CANDIDATES, MAX_CHARACTERS = 100, 100, 20_000

Model = PolyEncoder | BiEncoder | CrossEncoder

KINDS = {PolyEncoder: "Poly-encoder", BiEncoder: "Bi-encoder", CrossEncoder: "Cross-encoder"}
HOW = {
    PolyEncoder: "Each code looks at some tokens of the dialogue; each candidate decides which codes to listen to. "
    "Choose a candidate in the ranking to see both.",
    BiEncoder: "This is a Bi-encoder: one vector for the dialogue, one for the candidate, and their dot product is the "
    "score. Nothing in between tells which words decided, so there is no map to show.",
    CrossEncoder: "This is a Cross-encoder: it reads the dialogue and a candidate together in all its layers, without "
    "codes. No single place in it tells which words decided, so there is no map to show.",
}

# A click is told by the candidate's number, so that the ranking need not be drawn again and keeps the keyboard's focus.
CHOOSE = """
element.addEventListener('click', (event) => {
  const row = event.target.closest('[data-candidate]');
  if (!row) return;
  element.querySelectorAll('[data-candidate]').forEach((other) => other.setAttribute('aria-pressed', other === row));
  trigger('click', {candidate: Number(row.dataset.candidate)});
});
"""


@dataclass(frozen=True)
class Ranked:
    """What was ranked last: an explanation belongs to it, whatever has been typed since."""

    turns: list[str]
    candidates: list[str]
    chosen: int  # the candidate that is explained, its place in `candidates`


def lines(text: str | None) -> list[str]:
    """The lines of `text` that hold something."""
    return [line.strip() for line in (text or "").splitlines() if line.strip()]


def check(turns: Sequence[str], candidates: Sequence[str]) -> None:
    """Raise a ValueError that says what is missing or too much."""
    if not turns:
        raise ValueError("The dialogue is empty. Write at least one turn, then rank.")
    if not candidates:
        raise ValueError("There is no candidate. Write at least one, each on a line of its own.")
    for what, texts, limit in (("turns", turns, MAX_TURNS), ("candidates", candidates, MAX_CANDIDATES)):
        if len(texts) > limit:
            raise ValueError(f"There are {len(texts)} {what}; this page takes up to {limit}. Leave some out.")
        size = sum(map(len, texts))
        if size > MAX_CHARACTERS:
            raise ValueError(
                f"The {what} are {size:,} characters long; this page takes up to {MAX_CHARACTERS:,}. Shorten them."
            )


class Demo:
    """What the page does, for one model of any of the three kinds."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.kind = next(kind for kind in KINDS if isinstance(model, kind))
        self.explains = isinstance(model, PolyEncoder)

    def rank(self, dialogue: list[str], candidates: list[str]) -> list[dict[str, Any]]:
        """The ranking, with the texts.

        Raises:
            ValueError: nothing to rank, or more than the page takes.
        """
        check(dialogue, candidates)
        return [dict(entry) for entry in self.model.rank(dialogue, candidates, return_documents=True)]

    def answer(self, dialogue: list[str], candidates: list[str]) -> list[dict[str, Any]]:
        """Rank candidates for a dialogue, its turns oldest first; corpus_id, score and text of each, best first."""
        try:
            return self.rank(dialogue, candidates)
        except (TypeError, ValueError) as error:  # Gradio tells a client of its own errors only
            raise gr.Error(str(error), print_exception=False) from error

    def show_ranking(self, dialogue: str, candidates: str, all_codes: bool) -> tuple[str, str, Ranked | None]:
        """The bars, or what is to be mended; the explanation of the best candidate; and what was ranked."""
        turns, texts = lines(dialogue), lines(candidates)
        try:
            entries = self.rank(turns, texts)
        except ValueError as error:  # of ours, or of the model: a text without tokens
            return drawing.message(str(error)), "", None
        ranked = Ranked(turns, texts, entries[0]["corpus_id"])
        return drawing.ranking(entries, self.explains), self.show_explanation(ranked, all_codes), ranked

    def choose(
        self, ranked: Ranked | None, all_codes: bool, event: gr.EventData
    ) -> tuple[str | dict[str, Any], Ranked | None]:
        """The explanation of the candidate that was clicked on."""
        chosen = getattr(event, "candidate", None)
        if ranked is None or not isinstance(chosen, int) or not 0 <= chosen < len(ranked.candidates):
            return gr.skip(), ranked
        ranked = Ranked(ranked.turns, ranked.candidates, chosen)
        return self.show_explanation(ranked, all_codes), ranked

    def show_explanation(self, ranked: Ranked | None, all_codes: bool) -> str:
        """Why the chosen candidate got its score, or why that cannot be said of this model."""
        if ranked is None:
            return ""
        if not isinstance(self.model, PolyEncoder):
            return f'<p class="pe-hint">{drawing.shown(HOW[self.kind])}</p>'
        candidate = ranked.candidates[ranked.chosen]
        explanation = self.model.explain(ranked.turns, candidate)
        learnt = self.model[0].config.context_vectors == "learnt_codes"
        return self._draw(explanation, candidate, "code" if learnt else "vector", all_codes)

    def _draw(self, explanation: Explanation, candidate: str, name: str, all_codes: bool) -> str:
        number = len(explanation.final_attention)
        rows, listed = (number, number) if all_codes else (drawing.TOP_CODES, drawing.LISTED_CODES)

        def some(limit: int) -> str:
            return f"all {number}" if number <= limit else f"the {limit} of {number} that decided most"

        return f"""
<section class="pe-why" aria-label="Explanation">
<p class="pe-chosen">For <q>{drawing.shown(candidate)}</q> the score is <b>{explanation.score:.2f}</b>.</p>
<h3>Which words decided</h3>
<p class="pe-hint">How much each token weighs in the vector that this candidate was compared with.</p>
{drawing.coloured_text(explanation)}
{drawing.legend()}
<h3>Which {name}s decided</h3>
<p class="pe-hint">How much this candidate listened to each, {some(listed)}, and the tokens that each looks at most.</p>
{drawing.codes(explanation, name, listed)}
<h3>What each {name} looks at</h3>
<p class="pe-hint">A row for each {name}, {some(rows)}; a column for each token.</p>
{drawing.heat_map(explanation, name, rows, titles=not all_codes)}
{drawing.legend()}
</section>"""


def add_turn(dialogue: str, turn: str) -> tuple[str, str]:
    """The dialogue with one more turn (one for each line), and an empty box for the next."""
    return "\n".join([*lines(dialogue), *lines(turn)]), ""


def remove_turn(dialogue: str) -> str:
    """The dialogue without its last turn."""
    return "\n".join(lines(dialogue)[:-1])


def build(model: Model, name: str) -> gr.Blocks:
    """The page for one model, called `name`."""
    demo = Demo(model)
    turns, texts = next(iter(EXAMPLES.values()))
    with gr.Blocks(title=f"{name} · poly-encoders", analytics_enabled=False) as page:
        ranked = gr.State()
        _html(
            f'<header class="pe-header"><h1>What comes next?</h1><p>{KINDS[demo.kind]} '
            f"<code>{drawing.shown(name)}</code> ranks what could be said next in a dialogue.</p></header>"
        )
        with gr.Row(elem_classes="pe-buttons"):
            examples = [gr.Button(title, size="sm", min_width=110) for title in EXAMPLES]
        with gr.Row(elem_classes="pe-columns"):
            with gr.Column(min_width=300):
                _html('<h2 class="pe-title">Dialogue</h2>')
                bubbles = _html(drawing.dialogue(turns), elem_id="bubbles")
                turn = gr.Textbox(label="Next turn", placeholder="What is said next?", lines=1, elem_id="turn")
                with gr.Row(elem_classes="pe-buttons"):
                    add = gr.Button("Add turn", size="sm", min_width=90, elem_id="add")
                    undo = gr.Button("Remove last", size="sm", min_width=90, elem_id="undo")
                    clear = gr.Button("Clear", size="sm", min_width=60, elem_id="clear")
                with gr.Accordion("Edit all turns as text", open=False):
                    dialogue = gr.Textbox(
                        "\n".join(turns), label="One turn per line, two speakers in turn", lines=4, max_lines=12
                    )
                candidates = gr.Textbox(
                    "\n".join(texts), label="Candidates, one per line", lines=6, max_lines=14, elem_id="candidates"
                )
                button = gr.Button("Rank", variant="primary", elem_id="rank")
            with gr.Column(min_width=300):
                _html('<h2 class="pe-title">Ranking</h2>')
                bars = _html(elem_id="bars", js_on_load=CHOOSE)
        with gr.Column(visible=demo.explains):
            _html(f'<h2 class="pe-title">Why?</h2><p class="pe-hint">{drawing.shown(HOW[demo.kind])}</p>')
            all_codes = gr.Checkbox(label="Show all of them, not only those that decided most", elem_id="all-codes")
        why = _html(elem_id="why")

        dialogue.change(lambda text: drawing.dialogue(lines(text)), dialogue, bubbles, **_QUIET)
        gr.on([add.click, turn.submit], add_turn, [dialogue, turn], [dialogue, turn], **_QUIET)
        undo.click(remove_turn, dialogue, dialogue, **_QUIET)
        clear.click(lambda: "", None, dialogue, **_QUIET)
        inputs, outputs = [dialogue, candidates, all_codes], [bars, why, ranked]
        gr.on([page.load, button.click], demo.show_ranking, inputs, outputs, api_visibility="private")
        for example, (turns, texts) in zip(examples, EXAMPLES.values(), strict=True):
            filled = ("\n".join(turns), "\n".join(texts))
            example.click(lambda filled=filled: filled, None, [dialogue, candidates], **_QUIET).then(
                demo.show_ranking, inputs, outputs, api_visibility="private"
            )
        bars.click(demo.choose, [ranked, all_codes], [why, ranked], api_visibility="private")
        all_codes.change(demo.show_explanation, [ranked, all_codes], why, api_visibility="private")
        gr.api(demo.answer, api_name="rank")
    return page


def _html(value: str = "", **options: Any) -> gr.HTML:
    return gr.HTML(value, apply_default_css=False, **options)


_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


def theme() -> gr.themes.Base:
    """Gradio's look with fonts that are on the reader's machine: its own come from another host."""
    look = gr.themes.Base(
        primary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
    )
    blue = {"button_primary_background_fill": "#0072b2", "button_primary_background_fill_hover": "#005a8f"}
    return look.set(
        **blue,
        **{f"{name}_dark": colour for name, colour in blue.items()},
        input_placeholder_color="#566378",
        input_placeholder_color_dark="#a3b1c6",
    )


def serve(model: Model, name: str, host: str | None = None, port: int | None = None) -> None:
    """Serve the page until it is stopped; of a folder's path the last part is shown."""
    build(model, Path(name).name if Path(name).is_dir() else name).queue(max_size=64).launch(
        server_name=host,
        server_port=port,
        share=False,
        ssr_mode=False,
        footer_links=["api", "gradio"],
        theme=theme(),
        css_paths=Path(__file__).with_name("style.css"),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Load the model and serve the page until it is stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=os.environ.get("MODEL_ID", DEFAULT_MODEL))
    parser.add_argument("--host", help="address to listen on; this machine alone unless told")
    parser.add_argument("--port", type=int, help="the first free one from 7860 unless told")
    parser.add_argument("--device", help="where the model runs, such as cpu or cuda:0")
    options = parser.parse_args(argv)
    try:
        model = load_model(options.model, device=options.device)
    except (OSError, ValueError) as error:
        sys.exit(f"Error: {error}\nName the model as the argument or in the variable MODEL_ID.")
    serve(model, options.model, options.host, options.port)


if __name__ == "__main__":
    main()
