"""The public names of grr: found without torch, typed, described, and not changed unseen."""

import ast
import difflib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Literal

import pytest
from PIL import Image

import grr
import grr.builders
import grr.models.builders

ROOT = Path(__file__).resolve().parents[2]
RENEW = "python docs/make_api.py writes it anew"
Size = Literal["small", "large"]
LIMIT = 3


@pytest.fixture(scope="module")
def make_api() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs/make_api.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "code", ["import grr; dir(grr); grr.__version__", "from grr.cli import main; main(['--version'])"]
)
def test_torch_is_imported_when_a_name_needs_it_and_not_before(code):
    check = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=120, capture_output=True)


def test_the_list_of_names_the_modules_and_the_imports_for_type_checkers_agree():
    tree = ast.parse((ROOT / "grr/__init__.py").read_text())
    (typed,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imported = [alias.name for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(imported) == sorted([*grr._MODULES, *grr._PACKAGES])
    assert sorted(grr.__all__) == sorted([*grr._MODULES, "__version__"])
    assert dir(grr) == sorted([*grr.__all__, *grr._PACKAGES])


def test_every_package_is_an_attribute_without_an_import_of_its_own():
    folders = {file.parent.name for file in (ROOT / "grr").glob("*/__init__.py")} - {"cli"}
    assert set(grr._PACKAGES) == {"builders", *folders}
    code = "import sys, grr\nfor name in grr._PACKAGES: assert getattr(grr, name) is sys.modules[f'grr.{name}'], name"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True)


@pytest.mark.parametrize("name", sorted(grr._MODULES))
def test_a_public_name_is_that_of_its_module_and_described(name):
    value = getattr(grr, name)
    assert f"{value.__module__}.".startswith(f"{grr._MODULES[name]}.")  # a package may import it from a file of its own
    assert value is getattr(grr, name) is vars(sys.modules[grr._MODULES[name]])[name]
    assert value.__doc__
    assert not value.__doc__.startswith(f"{name}(")  # which Python writes for a data class without docstring


def test_another_name_is_refused():
    with pytest.raises(AttributeError, match=r"module 'grr' has no attribute 'lod'; dir\(grr\) lists"):
        grr.lod  # noqa: B018


def test_builders_are_those_of_grr_models_builders():
    assert set(grr.builders.__all__) == set(grr.models.builders.__all__)
    for name in grr.builders.__all__:
        assert getattr(grr.builders, name) is getattr(grr.models.builders, name)


@pytest.mark.parametrize("file", ["tests/grr/public_api.txt", "docs/api.md"])
def test_signatures_and_the_page_of_public_names_are_as_they_were_reviewed(make_api, file):
    """On purpose a signature was changed? Renew both files by python docs/make_api.py and commit them."""
    made = make_api.signatures() if file.endswith("txt") else make_api.page()
    reviewed = (ROOT / file).read_text(encoding="utf-8")
    difference = difflib.unified_diff(reviewed.splitlines(), made.splitlines(), file, "grr", lineterm="", n=2)
    assert made == reviewed, "\n".join([f"{file} is not what grr has now; {RENEW}", *difference])


def sample(a, /, b: int, *rest: str, size: Size = "small", limit: "float | None" = LIMIT, **others: int) -> list[str]:
    """A function with an argument of each kind."""


def test_a_rendered_signature_has_names_annotations_choices_and_values_of_defaults(make_api):
    assert make_api.signature(sample) == textwrap.dedent("""\
        def sample(
            a,
            /,
            b: int,
            *rest: str,
            size: Literal['small', 'large'] = 'small',
            limit: float | None = 3,
            **others: int,
        ) -> list[str]
        """)


def test_a_rendered_class_has_its_public_fields_and_methods(make_api):
    text = make_api.signature(grr.Captioner)
    assert text.startswith("class Captioner:\n    model: CoCa\n    tokenizer: Tokenizer\n")
    assert "    @property\n    def device(self) -> torch.device\n" in text
    assert "def caption(self, images: ImageInputs, **generation: Any) -> list[str]" in text
    assert "_batches" not in text


def test_the_quickstart_of_the_docstring_runs(colour_run, tmp_path, monkeypatch, capsys):
    shutil.copytree(colour_run, tmp_path / "runs/openmoji")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", grr.__doc__, re.MULTILINE)
    assert len(blocks) == 2
    dataset = [{"image": Image.new("RGB", (32, 32), (i, 9, 9)), "caption": f"number {i}"} for i in range(8)]
    variables: dict[str, object] = {"dataset": dataset}
    exec(textwrap.dedent(blocks[0]) + textwrap.dedent(blocks[1]), variables)
    assert variables["captioner"].caption("photo.jpg") == ["a red picture"]  # as the docstring says
    assert next(iter(variables["captioner"].classify("photo.jpg", ["red", "blue"])[0])) == "red"
    assert re.findall(r"^(\d) \d+\.\d+$", capsys.readouterr().out, re.MULTILINE) == ["0", "1", "2"]
    assert "RANK" not in os.environ
