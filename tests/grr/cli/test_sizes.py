"""The command sizes: the paper's parameter counts, the variants of a sweep, and models that cannot be built."""

import itertools
import re
import sys
from pathlib import Path

import pytest

from grr.cli import main
from grr.models.builders import MODELS, list_models

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("config", ["sweep/scaling", "recipes/configs/sweep/scaling.yaml"])
def test_the_sizes_of_a_sweep_are_printed_before_it_runs(config, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["sizes", "--sweep", config]) == 0
    tables = capsys.readouterr().out.split("\n\n")
    sizes = (128, 256, 384, 512)
    for table in tables:
        numbers = {line.split()[0]: float(line.split()[1]) for line in table.splitlines()[2:]}
        assert list(numbers) == [f"{model}_{size}" for size in sizes for model in ("baseline", "grr")]
        for smaller, larger in itertools.pairwise(sizes):
            assert numbers[f"grr_{smaller}"] < numbers[f"grr_{larger}"]
        assert all(numbers[f"grr_{size}"] == pytest.approx(numbers[f"baseline_{size}"], rel=0.01) for size in sizes)


def test_sizes_of_the_papers_models_are_the_papers(capsys):
    assert main(["sizes", "grr_coca", "baseline_coca"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[1] for row in rows[2:4]] == ["394.5", "393.9"]


def test_a_shorter_caption_costs_fewer_operations_and_the_same_parameters(capsys):
    assert main(["sizes", "grr_coca_tiny"]) == 0
    counts, costs = capsys.readouterr().out.split("\n\n")
    assert main(["sizes", "grr_coca_tiny", "--text-length", "8"]) == 0
    same_counts, lower_costs = capsys.readouterr().out.split("\n\n")
    assert same_counts == counts
    assert float(lower_costs.splitlines()[2].split()[1]) < float(costs.splitlines()[2].split()[1])


OWN = """
from grr.builders import MODELS, coca

def own(*, vocab_size=512, context_length=32, image_size=32, layers=1):
    sizes = dict(vision_layers=layers, text_layers=1, multimodal_layers=1, dim=64, num_heads=2, patch_size=8)
    return coca(vocab_size=vocab_size, context_length=context_length, image_size=image_size, **sizes)

MODELS["own"] = own
"""


def test_a_builder_that_is_not_a_preset_of_coca_has_parameters_and_no_flops(tmp_path, monkeypatch, capsys):
    (tmp_path / "own_models.py").write_text(OWN)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("GRR_IMPORT", "")
    try:
        assert main(["--import", str(tmp_path / "own_models.py"), "sizes", "own layers=2", "grr_coca_tiny"]) == 0
    finally:
        sys.modules.pop("own_models", None)
        own = MODELS.pop("own", None)
    counts, costs, note = capsys.readouterr().out.split("\n\n")
    total = sum(p.numel() for p in own(layers=2).parameters()) / 1e6
    assert float(counts.splitlines()[2].split()[2]) == pytest.approx(total, rel=1e-3)
    assert costs.splitlines()[2].split() == ["own", "layers=2", *"-------"]
    assert "-" not in costs.splitlines()[3]
    assert note == "-: FLOPs are known for the presets of coca only.\n"


def test_every_model_that_has_a_name_has_a_size(capsys):
    assert main(["sizes"]) == 0
    counts, costs, _ = capsys.readouterr().out.split("\n\n")
    for table in (counts, costs):
        assert [line.split()[0] for line in table.splitlines()[2:]] == list_models()
    sizes = {line.split()[0]: line.split()[1] for line in counts.splitlines()[2:]}
    assert sizes["open_clip_coca_vit_b_32"] == "253.6"  # as its builder's docstring says


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("grr_cocoa", "a model must be one of grr_coca, .*, got grr_cocoa"),
        ("grr_coca dimm=64", "grr_coca dimm=64: .*'dimm'"),
        ("grr_coca dim=100", "dim must be a multiple of num_heads, got dim=100, num_heads=12"),
    ],
)
def test_a_model_that_cannot_be_built_is_named(model, message, capsys):
    assert main(["sizes", model]) == 1
    assert re.search(message, capsys.readouterr().err)
