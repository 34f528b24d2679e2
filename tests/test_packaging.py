"""The distribution: what it holds, that it works where only it is."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import forks

ROOT = Path(__file__).parent.parent


def package_files():
    """The package's files as they lie once installed, through the links of a checkout."""
    for folder, _, names in os.walk(ROOT / "poly_encoders", followlinks=True):
        if "__pycache__" not in folder:
            yield from (Path(folder, name).relative_to(ROOT) for name in names)


def test_every_folder_is_packaged():
    with open(ROOT / "pyproject.toml", "rb") as file:
        packages = tomllib.load(file)["tool"]["setuptools"]["packages"]
    assert set(packages) == {str(file.parent).replace("/", ".") for file in package_files()}
    assert len(packages) == len(set(packages))


@pytest.fixture(scope="module")
def distribution(tmp_path_factory):
    """The source distribution, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("distribution")
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


@pytest.mark.slow
def test_each_file_is_there_once(distribution):
    with tarfile.open(distribution[0]) as source:
        links = [member.name for member in source if not member.isfile() and not member.isdir()]
        files = [member.name.partition("/")[2] for member in source if member.isfile()]
    assert not links
    expected = sorted(map(str, package_files()))
    linked = ("modeling/", "training/", "hub_cards/")
    found = [f"poly_encoders/{name}" if name.startswith(linked) else name for name in files]
    assert sorted(name for name in found if name.startswith("poly_encoders/")) == expected
    names = zipfile.ZipFile(distribution[1]).namelist()
    assert sorted(name for name in names if ".dist-info/" not in name) == expected


@pytest.mark.slow
def test_metadata(distribution):
    with zipfile.ZipFile(distribution[1]) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    required = {re.match(r"[\w-]+", line)[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert {"torch", "transformers", "sentence-transformers", "datasets", "accelerate"} <= required


ALONE = """
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


@pytest.mark.slow
def test_it_works_where_only_the_wheel_is(distribution, tmp_path, saved_poly_encoder):
    """From the wheel's own files, in a folder without the checkout; the dependencies are this environment's."""
    with zipfile.ZipFile(distribution[1]) as archive:
        archive.extractall(tmp_path / "site")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", ALONE, str(tmp_path / "site"), str(saved_poly_encoder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "True"
    assert (tmp_path / "again" / "README.md").is_file()


@pytest.mark.parametrize("command", [["training/train.py"], ["-m", "poly_encoders.training.train"]])
def test_training_runs_as_a_script_and_as_a_module(command):
    assert "--num_codes" in forks.run([*command, "--help"])
