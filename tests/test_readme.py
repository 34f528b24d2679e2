"""The README's Python runs as printed."""

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_python_blocks(saved_poly_encoder, sentence_transformer_folder):
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 5
    names: dict = {}
    for block in blocks:
        code = block.replace("org/poly-encoder", str(saved_poly_encoder))
        code = code.replace("sentence-transformers/all-MiniLM-L6-v2", sentence_transformer_folder)
        exec(compile(code, "README.md", "exec"), names)
    assert names["best"].indices.shape == (1, 2)
    assert names["scores"].shape == (1, 3)
    assert len(names["why"].tokens) == len(names["why"].token_weights)
    assert names["context"].shape == (1, 4, 32)


def test_what_it_names_is_there():
    root = Path(__file__).parent.parent
    for path in re.findall(r"(?:training|benchmarks|modeling|hub_cards)/[\w/.]+\.(?:py|yaml|md|png)", README):
        assert (root / path).is_file(), path
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"^make (\w+)", README, flags=re.MULTILINE)):
        assert f"\n{target}:" in makefile, target
