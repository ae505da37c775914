"""What a visitor meets first agrees with the code: README, CHANGELOG, citation, version, workflow and templates."""

import ast
import importlib.util
import inspect
import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from test_layers import LAYERS

import grr
from grr.config.renamed import REMOVED, RENAMED
from grr.evaluation.flops import forward_flops
from grr.models.builders import MODELS

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / ".github").rglob("*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
QUESTIONS = [
    ("where is the temperature", "grr/models", "coca.py", "class LogitScale"),
    ("where is an image resized", "grr/data", "images.py", ".resize("),
    ("how do I add a data format", "docs", "own_data.md", "DATASETS["),
    ("how do I change the optimizer", "grr/training", "optim.py", "def adamw("),
    ("what happens on SIGTERM", "grr/checkpoint", "stop_signal.py", "SIGTERM"),
]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub forms them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table_rows(text: str, first: str) -> list[list[str]]:
    """The cells of each row below the table whose first column has this title."""
    lines = text.partition(f"| {first} |")[2].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


# --- links ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_of_the_repository_that_a_page_names_exists(page):
    named = re.findall(r"(?<![\w./])((?:grr|recipes|components|tests)/[\w./]+\.(?:py|yaml))", page.read_text("utf-8"))
    assert [name for name in named if not (ROOT / name).is_file() and not (ROOT / "tests" / name).is_file()] == []


# --- README --------------------------------------------------------------------------------------------------------


def test_the_readmes_table_of_packages_is_the_library_in_the_order_of_its_layers():
    listed = [re.search(r"`(?:grr/)?(\w+)(?:/|\.py)`", row[0])[1] for row in table_rows(README, "package")]
    assert listed == list(LAYERS)


def test_the_readmes_table_of_recipes_names_every_recipe():
    listed = [name for row in table_rows(README, "recipe") for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(listed) == sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))


def test_the_readmes_table_of_models_is_computed():
    rows = table_rows(README, "`grr.create_model(name)`")
    computed = []
    for name, builder in MODELS.items():
        defaults = {key: p.default for key, p in inspect.signature(builder).parameters.items()}
        with torch.device("meta"):
            parameters = sum(p.numel() for p in builder().parameters())
        side, patch = defaults["image_size"], defaults["patch_size"]
        gflops = float(f"{forward_flops(builder).total / 1e9:.3g}")
        patches = (side // patch) ** 2
        computed.append(
            [f"`{name}`", f"{parameters:,}", str(side), str(patches), str(defaults["context_length"]), gflops]
        )
    assert [[*row[:5], float(row[5])] for row in rows] == computed


@pytest.mark.parametrize(("question", "folder", "file", "content"), QUESTIONS, ids=lambda value: str(value)[:30])
def test_a_newcomers_question_is_answered_two_hops_from_the_readme(question, folder, file, content):
    lines = [line for line in README.splitlines() if file in line and folder in line]
    assert lines, f"{question}: no line of the README names {folder} and {file}"
    assert content in (ROOT / folder / file).read_text(encoding="utf-8")


# --- versions, citation, changelog ---------------------------------------------------------------------------------


def test_the_version_is_written_once_and_equal_everywhere():
    from setuptools.config.pyprojecttoml import read_configuration

    assert read_configuration(ROOT / "pyproject.toml")["project"]["version"] == grr.__version__
    assert CITATION["version"] == grr.__version__
    assert re.search(r"^## \[?([\d.]+)", CHANGELOG, re.MULTILINE)[1] == grr.__version__


def test_the_version_is_a_literal_that_is_read_without_an_import():
    tree = ast.parse((ROOT / "grr/__init__.py").read_text(encoding="utf-8"))
    values = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    ]
    assert [ast.literal_eval(value) for value in values] == [grr.__version__]


def test_the_citation_has_the_keys_of_its_format_and_names_the_paper():
    assert CITATION["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "type", "license", "references"} <= set(CITATION)
    assert all({"type", "title", "authors"} <= set(reference) for reference in CITATION["references"])
    paper = CITATION["references"][0]
    assert paper["title"].startswith("GRR-CoCa: ")
    assert paper["url"] == "https://arxiv.org/abs/2507.18009"
    assert paper["url"] in README


def test_the_changelog_names_every_renamed_and_removed_key():
    rows = table_rows(CHANGELOG, "old key")
    assert {row[0].strip("`"): row[1].replace("`", "") for row in rows} == RENAMED
    removed = CHANGELOG.partition("### Removed")[2].partition("###")[0]
    assert [key for key in REMOVED if f"`{key}`" not in removed] == []


def test_the_changelogs_new_modules_exist_and_the_old_ones_do_not():
    rows = table_rows(CHANGELOG, "old module")
    assert len(rows) > 60
    for old, new in rows:
        assert all(importlib.util.find_spec(name) for name in re.findall(r"`(.+?)`", new)), new
        assert not (ROOT / (old.strip("`").replace(".", "/") + ".py")).exists(), old


# --- workflow and templates ----------------------------------------------------------------------------------------


def test_the_workflow_runs_what_contributors_run():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    assert os.access(ROOT / ".ci/run", os.X_OK)
    (python,) = [step["with"]["python-version"] for step in steps if "setup-python" in step.get("uses", "")]
    assert f">={python}" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["bug", "question"])
def test_an_issue_template_has_what_the_form_needs(name):
    form = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= set(form)
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids) > 0
    assert all(field["attributes"]["label"] for field in form["body"])
