"""A real wheel: what it holds, and that it works where only it is."""

import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SPACE = ["app.py", "dialogues.py", "drawing.py", "style.css", "requirements.txt", "README.md"]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (file,) = folder.glob("*.whl")
    return file


def test_contents(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        "poly_encoders/py.typed",
        "poly_encoders/poly_encoder.py",
        "poly_encoders/modeling/modeling_poly_encoder.py",
        "poly_encoders/modeling/configuration_poly_encoder.py",
        "poly_encoders/training/train.py",
        "poly_encoders/training/configs/chitchat_quickstart.yaml",
        "poly_encoders/hub_cards/poly_encoder.md",
        *(f"poly_encoders/hub_cards/space/{name}" for name in SPACE),
    }
    assert expected <= names
    templates = {f"poly_encoders/hub_cards/{file.name}" for file in (ROOT / "hub_cards").glob("*.md")}
    assert templates <= names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"poly_encoders"}
    sources = {str(file.relative_to(ROOT)) for file in (ROOT / "poly_encoders").rglob("*.py")}
    for folder in ("modeling", "training"):
        sources |= {f"poly_encoders/{folder}/{file.name}" for file in (ROOT / folder).glob("*.py")}
    assert sources <= names


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    required = [line.split(">=")[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert {"torch", "transformers", "sentence-transformers", "datasets", "accelerate"} <= set(required)


def test_it_works_where_only_the_wheel_is(wheel, tmp_path, saved_poly_encoder):
    """From the wheel's own files, in a folder without the checkout; the dependencies are this environment's."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = """
import sys
site, model = sys.argv[1:]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.path.insert(0, site)
import poly_encoders
assert poly_encoders.__file__.startswith(site), poly_encoders.__file__
import poly_encoders.training.train
try:
    import modeling
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("a top-level modeling is installed")
encoder = poly_encoders.PolyEncoder(model, device="cpu")
print(encoder.rank("hello", ["yes", "no"])[0]["corpus_id"] in (0, 1))
encoder.save_pretrained("again")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "site"), str(saved_poly_encoder)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "True"
    assert (tmp_path / "again" / "README.md").is_file()


def test_training_runs_as_a_script_and_as_a_module():
    for command in (["training/train.py"], ["-m", "poly_encoders.training.train"]):
        done = subprocess.run(
            [sys.executable, *command, "--help"], capture_output=True, text=True, check=False, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert "--num_codes" in done.stdout


def test_imports_run_one_way():
    """modeling <- poly_encoders <- training."""
    for folder, forbidden in (
        ("modeling", ["poly_encoders", "training"]),
        ("poly_encoders", ["poly_encoders.training"]),
    ):
        for file in (ROOT / folder).rglob("*.py"):
            for line in file.read_text(encoding="utf-8").splitlines():
                words = line.split()
                if words[:1] in (["from"], ["import"]):
                    assert not any(words[1].startswith(name) for name in forbidden), f"{file.name}: {line}"
