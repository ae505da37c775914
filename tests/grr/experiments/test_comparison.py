"""A comparison gives the numbers of the logs, refuses what may not be compared, and claims no more than it knows."""

import csv
import itertools
import json
import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from grr.experiments.compare import PUBLISHED, DataSet, compare
from grr.experiments.runs import FREE, differences, read_models, read_run
from grr.reports.comparison import (
    as_markdown,
    as_text,
    figures,
    model_table,
    result_table,
    run_table,
    verdicts,
    write_comparison,
)
from grr.training.log import MetricsLog, write_manifest

SVG = "{http://www.w3.org/2000/svg}"
TAGS = ("svg", "style", "rect", "path", "text", "circle")
HOSTILE = """</title><script>alert(1)</script><img src=x onerror="alert(1)">' " &amp; |"""
CONFIG: dict[str, Any] = {
    "run": {"folder": "runs/x", "seed": 0, "epochs": 2, "max_steps": None, "micro_batch_size": 8, "max_grad_norm": 1.0},
    "model": {"name": "grr_coca_tiny", "dim": 64},
    "tokenizer": {"path": None, "vocab_size": 128, "context_length": 16},
    "data": {"name": "folder", "path": "photos"},
    "validation": {"name": "folder", "path": "photos"},
    "loader": {"workers": 2, "crop": "squash"},
    "loss": {"contrastive_weight": 2.0, "negatives": "global"},
    "optimizer": {"lr": 1e-3, "betas": [0.9, 0.999]},
    "schedule": {"warmup_steps": 0},
}
FACTS = {"data": "d1", "validation": "v1", "tokenizer": "t1", "batch_size": 16, "parameters": 1000}
JUDGED = {
    "model": {"precision": "float32"},
    "data": {"fingerprint": "e1", "images": 50},
    "generation": {"num_beams": 1},
    "results": {"retrieval": {"text_to_image_r1": 0.25, "num_eval_images": 50}, "captions": {"cider": 0.81}},
}


def make_run(
    folder: Path,
    seed: int = 0,
    losses: Sequence[float | None] = (3.0,),
    *,
    model: dict | None = None,
    config: dict | None = None,
    facts: dict | None = None,
    judged: dict | None = None,
    finished: bool = True,
    **values: float,
) -> Path:
    """The folder of a run, as a recipe leaves it, with a validation every ten steps."""
    folder.mkdir(parents=True)
    arguments = {**CONFIG["model"], **(model or {})}
    config = {key: {**CONFIG.get(key, {}), **(config or {}).get(key, {})} for key in {**CONFIG, **(config or {})}}
    config = {**config, "model": arguments, "run": {**config["run"], "folder": str(folder), "seed": seed}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    write_manifest(folder, **{**FACTS, "seed": seed, **(facts or {})})
    log = MetricsLog(folder)
    for i, loss in enumerate(losses, 1):
        log.write("train", 10 * i, loss=0.1)
        log.write("validation", 10 * i, loss=math.nan if loss is None else loss, **values)
    log.close()
    if finished:
        (folder / "model").mkdir()
        name = arguments.pop("name")
        arguments.pop("path", None)
        (folder / "model/config.json").write_text(json.dumps({"builder": name, "arguments": arguments}))
    if judged:
        (folder / "evaluation.json").write_text(json.dumps(judged))
    return folder


def two_models(folder: Path, base: list[float], other: list[float], **values: float) -> dict:
    for seed, loss in enumerate(base):
        make_run(folder / f"base-{seed}", seed, [loss], model={"vision_norm": "layernorm"}, **values)
    for seed, loss in enumerate(other):
        make_run(folder / f"grr-{seed}", seed, [loss], model={"vision_norm": "rmsnorm"}, **values)
    return read_models([f"Baseline: {folder}/base-*", f"GRR: {folder}/grr-*"])


def cell(table: list[list[str]], row: str, column: int) -> str:
    [found] = [line for line in table if line[0] == row]
    return found[column]


def numbers(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"[+-]?[\d.]+", text.replace("−", "-").replace(",", ""))]


loss = st.floats(0.1, 20)


@settings(max_examples=15)
@given(base=st.lists(loss, min_size=2, max_size=4), other=st.lists(loss, min_size=2, max_size=4))
def test_the_table_holds_means_deviations_changes_and_paired_differences(tmp_path_factory, base, other):
    models = two_models(tmp_path_factory.mktemp("runs"), base, other)
    table = result_table(compare(models))
    shown = [numbers(cell(table, "CoCa loss ↓", i)) for i in range(1, 5)]
    assert shown[0] == pytest.approx([np.mean(base), np.std(base, ddof=1)], abs=6e-5)
    assert shown[1] == pytest.approx([np.mean(other), np.std(other, ddof=1)], abs=6e-5)
    assert shown[2] == pytest.approx([100 * (np.mean(other) / np.mean(base) - 1)], abs=6e-3)
    n = min(len(base), len(other))
    paired = np.subtract(other[:n], base[:n])
    assert shown[3] == pytest.approx([paired.mean(), paired.std(ddof=1) / math.sqrt(n)], abs=6e-5)


@given(losses=st.lists(st.none() | loss, min_size=1, max_size=6).filter(any))
def test_a_run_is_represented_by_its_lowest_finite_loss_and_its_step(tmp_path_factory, losses):
    run = read_run(make_run(tmp_path_factory.mktemp("runs") / "a", losses=losses))
    lowest = min(x for x in losses if x is not None)
    assert run.best["loss"] == lowest
    assert run.best_step == 10 * (losses.index(lowest) + 1)
    header, row = run_table({"a": [run]})
    told = dict(zip(header, row, strict=True))
    assert (told["at step"], told["of"]) == (str(run.best_step), str(10 * len(losses)))
    assert told["CoCa loss"] == f"{lowest:.4f}"


def test_the_other_metrics_are_of_the_same_validation(tmp_path):
    folder = make_run(tmp_path / "a", losses=[4.0, 3.0, 3.5])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line, perplexity in zip([x for x in lines if x["split"] == "validation"], [50.0, 20.0, 9.0], strict=True):
        line["perplexity"] = perplexity
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_run(folder).best["perplexity"] == 20.0


def test_a_classifier_is_represented_by_its_highest_accuracy(tmp_path):
    """As the recipe keeps them: the first of equals, whatever their losses."""
    for name, accuracies in (("base", [0.5, 0.75, 0.75]), ("grr", [0.875, 0.5, 0.25])):
        log = MetricsLog(make_run(tmp_path / name, losses=[]))
        for i, (loss, accuracy) in enumerate(zip([1.0, 1.5, 1.2], accuracies, strict=True), 1):
            log.write("validation", 10 * i, loss=loss, accuracy=accuracy)
        log.close()
    models = read_models([f"Baseline: {tmp_path}/base", f"GRR: {tmp_path}/grr"])
    assert [(run.best["loss"], run.best_step) for [run] in models.values()] == [(1.5, 20), (1.0, 10)]
    table = result_table(compare(models))
    assert [numbers(cell(table, "accuracy, % ↑", i)) for i in (1, 2, 4)] == [[75.0], [87.5], [12.5]]


def test_a_fine_tuning_is_represented_by_the_model_that_it_saved(tmp_path):
    folder = make_run(tmp_path / "a", losses=[4.0, 3.0, 3.5])
    log = MetricsLog(folder, step=30)
    log.write("final", 30, best_step=20, loss=2.9)
    log.close()
    run = read_run(folder)
    assert (run.best["loss"], run.best_step) == (2.9, 20)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"facts": {"data": "d2"}}, r'data is "d2", in \S+/base-0 it is "d1"'),
        ({"facts": {"validation": "v2"}}, r'validation is "v2", in \S+/base-0 it is "v1"'),
        ({"facts": {"tokenizer": "t2"}}, r'tokenizer is "t2", in \S+/base-0 it is "t1"'),
        ({"facts": {"batch_size": 32}}, r"batch_size is 32, in \S+/base-0 it is 16"),
        ({"config": {"loss": {"contrastive_weight": 1.0}}}, r"loss.contrastive_weight is 1.0, in \S+/base-0 it is 2.0"),
        ({"config": {"loss": {"negatives": "local"}}}, r'loss.negatives is "local", in \S+/base-0 it is "global"'),
        ({"config": {"optimizer": {"lr": 2e-3}}}, r"optimizer.lr is 0.002, in \S+/base-0 it is 0.001"),
        ({"config": {"optimizer": {"betas": [0.9, 0.95]}}}, r"optimizer.betas is \[0.9, 0.95\], in \S+/base-0 it"),
        ({"config": {"schedule": {"warmup_steps": 5}}}, r"schedule.warmup_steps is 5, in \S+/base-0 it is 0"),
        ({"config": {"run": {"epochs": 3}}}, r"run.epochs is 3, in \S+/base-0 it is 2"),
        ({"config": {"run": {"max_steps": 7}}}, r"run.max_steps is 7, in \S+/base-0 it is null"),
        ({"config": {"loader": {"crop": "center"}}}, r'loader.crop is "center", in \S+/base-0 it is "squash"'),
        ({"config": {"tokenizer": {"context_length": 32}}}, r"tokenizer.context_length is 32, in \S+/base-0 it is 16"),
        ({"config": {"extra": {"option": 1}}}, r"extra.option is 1, in \S+/base-0 it is not set"),
        ({"finished": False}, r"is not finished, because it does not have model/"),
        ({"judged": JUDGED}, r'evaluation.json is "there", in \S+/base-0 it is "missing"'),
    ],
)
def test_runs_under_unequal_conditions_are_refused_with_every_difference(tmp_path, change, says):
    make_run(tmp_path / "base-0")
    make_run(tmp_path / "grr-0", **change)
    models = read_models([f"Baseline: {tmp_path}/base-*", f"GRR: {tmp_path}/grr-*"])
    with pytest.raises(ValueError, match=rf"compare: the runs differ in more than their models[\s\S]*grr-0: {says}"):
        compare(models)
    comparison = compare(models, allow_differences=True)
    # with local negatives the size of a micro-batch is a condition as well
    assert len(comparison.unequal) == (2 if "negatives" in says else 1)
    for shown in (as_text(comparison), as_markdown(comparison)):
        assert re.search(f"The runs differ in more than their models:[\\s\\S]*{says}", shown)
    page = write_comparison(tmp_path / "out", comparison).read_text()
    assert "The runs differ in more than their models" in page


def test_all_differences_are_named_at_once(tmp_path):
    make_run(tmp_path / "base-0")
    make_run(tmp_path / "grr-0", config={"optimizer": {"lr": 1.0}}, facts={"data": "d2"})
    make_run(tmp_path / "grr-1", 1, finished=False)
    lines = differences(read_models([f"Baseline: {tmp_path}/base-*", f"GRR: {tmp_path}/grr-*"]))
    assert [(Path(line.split(":")[0]).name, line.split()[1]) for line in lines] == [
        ("grr-0", "data"),
        ("grr-0", "optimizer.lr"),
        ("grr-1", "is"),
    ]


@pytest.mark.parametrize("key", sorted(FREE - {"run.folder", "run.seed"}))
def test_how_a_run_is_computed_may_differ(tmp_path, key):
    section, name = key.split(".")
    make_run(tmp_path / "base-0")
    make_run(tmp_path / "grr-0", config={section: {name: 12345}})
    assert differences(read_models([f"Baseline: {tmp_path}/base-*", f"GRR: {tmp_path}/grr-*"])) == []


def test_the_micro_batch_size_may_not_differ_with_local_negatives(tmp_path):
    make_run(tmp_path / "base-0", config={"loss": {"negatives": "local"}})
    make_run(tmp_path / "grr-0", config={"loss": {"negatives": "local"}, "run": {"micro_batch_size": 4}})
    with pytest.raises(ValueError, match=r"run.micro_batch_size is 4, in \S+/base-0 it is 8"):
        compare(read_models([f"Baseline: {tmp_path}/base-*", f"GRR: {tmp_path}/grr-*"]))


def test_models_may_differ_but_not_the_runs_of_one(tmp_path):
    make_run(tmp_path / "base-0", model={"dim": 32})
    make_run(tmp_path / "grr-0", model={"dim": 64})
    models = [f"Baseline: {tmp_path}/base-*", f"GRR: {tmp_path}/grr-*"]
    assert model_table(read_models(models)) == [["", "Baseline", "GRR"], ["dim", "32", "64"]]
    compare(read_models(models))
    make_run(tmp_path / "grr-1", 1, model={"dim": 96})
    with pytest.raises(ValueError, match=r"grr-1: model.dim is 96, in \S+/grr-0 it is 64"):
        compare(read_models(models))


def test_a_fine_tuned_model_is_described_by_its_saved_builder(tmp_path):
    for name in ("base-0", "grr-0"):
        folder = make_run(tmp_path / name)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config["model"] = {"path": f"runs/pretrain/{name}"}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    models = read_models([f"Baseline: {tmp_path}/base-*", f"GRR: {tmp_path}/grr-*"])
    assert models["GRR"][0].model == CONFIG["model"]
    assert differences(models) == []


@pytest.mark.parametrize("inside", ["", "model", "checkpoints/step_10"])
def test_fine_tunings_may_not_start_from_unequal_pre_trainings(tmp_path, inside):
    for name, lr in (("base-0", 1e-3), ("grr-0", 2e-3)):
        make_run(tmp_path / "pretrain" / name, config={"optimizer": {"lr": lr}})
        make_run(tmp_path / "finetune" / name, model={"path": str(tmp_path / "pretrain" / name / inside)})
    models = [f"Baseline: {tmp_path}/finetune/base-*", f"GRR: {tmp_path}/finetune/grr-*"]
    with pytest.raises(
        ValueError, match=r"finetune/grr-0: pre-training.optimizer.lr is 0.002, in \S+/base-0 it is 0.001"
    ):
        compare(read_models(models))


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("runs/baseline-*", 'each model must be "name: folders" with a unique name, got '),
        ("GRR:", "with a unique name, got 'GRR:'"),
        ("Baseline: {0}/base-*", "with a unique name, got 'Baseline: "),
        ("GRR: {0}/grrr-*", r"no folder matches \S+/grrr-\* \(GRR\)"),
        ("GRR: {0}/empty", "the folder of a run must hold config.yaml, got .*empty"),
        ("GRR: {0}/unlogged", "manifest.json is missing or damaged"),
        ("GRR: {0}/begun", "must have a validation to be compared, got .*begun"),
        ("GRR: {0}/damaged", r"evaluation.json is damaged \("),
        ("GRR: {0}/*-0", r"base-0 and \S+/twin-0 \(GRR\) both have the seed 0"),
    ],
)
def test_folders_without_a_run_are_named(tmp_path, entry, says):
    make_run(tmp_path / "base-0")
    make_run(tmp_path / "twin-0")
    (tmp_path / "empty").mkdir()
    (make_run(tmp_path / "unlogged") / "manifest.json").unlink()
    make_run(tmp_path / "begun", losses=[])
    (make_run(tmp_path / "damaged") / "evaluation.json").write_text("{")
    with pytest.raises(ValueError, match=says):
        read_models([f"Baseline: {tmp_path}/base-*", entry.format(tmp_path)])


def test_a_comparison_needs_two_models(tmp_path):
    make_run(tmp_path / "base-0")
    with pytest.raises(ValueError, match="there must be at least two models, got Baseline"):
        compare(read_models([f"Baseline: {tmp_path}/base-*"]))


def test_the_numbers_of_an_evaluation_are_further_rows(tmp_path):
    for name in ("base-0", "grr-0"):
        make_run(tmp_path / name, judged=JUDGED)
    table = result_table(compare(read_models([f"Baseline: {tmp_path}/base-*", f"GRR: {tmp_path}/grr-*"])))
    assert cell(table, "evaluation: R@1 text to image, % ↑", 1) == "25.00"
    assert cell(table, "evaluation: CIDEr-D ↑", 2) == "0.8100"


@pytest.mark.parametrize(
    ("cider", "recall", "changes"),
    [(4.9e-5, 4.9e-5, ["–", "–"]), (5.1e-5, 5.1e-5, ["−50.00 %", "−50.00 %"]), (0.0, 0.5, ["–", "−50.00 %"])],
)
def test_a_change_is_shown_if_its_base_is_not_zero_in_the_table(tmp_path, cider, recall, changes):
    """Relative to "0.0000" a change of -50 % would say nothing."""
    for name, factor in (("base-0", 1), ("grr-0", 0.5)):
        results = {"captions": {"cider": factor * cider}, "retrieval": {"text_to_image_r1": factor * recall}}
        make_run(tmp_path / name, judged={**JUDGED, "results": results})
    table = result_table(compare(read_models([f"Baseline: {tmp_path}/base-*", f"GRR: {tmp_path}/grr-*"])))
    rows = "evaluation: CIDEr-D ↑", "evaluation: R@1 text to image, % ↑"
    assert [cell(table, row, 3) for row in rows] == changes


def test_parameters_and_cost_stand_above_the_results(tmp_path):
    make_run(tmp_path / "base-0", facts={"parameters": 1000}, model={"vocab_size": 100})
    make_run(tmp_path / "grr-0", facts={"parameters": 1100}, model={"vocab_size": 200})
    table = result_table(compare(read_models([f"Baseline: {tmp_path}/base-*", f"GRR: {tmp_path}/grr-*"])))
    assert [cell(table, "parameters", i) for i in (1, 2, 3)] == ["1,000", "1,100", "+10.00 %"]
    base, grr = (numbers(cell(table, "GFLOPs a pair, forward", i))[0] for i in (1, 2))
    assert grr - base == pytest.approx(2 * 16 * 64 * 100 / 1e9, abs=1e-5)  # the head, on 16 tokens


def test_the_published_changes_are_those_of_the_published_values():
    assert set(PUBLISHED) == set(get_args(DataSet))
    for metrics in PUBLISHED.values():
        for baseline, grr, change in metrics.values():
            assert 100 * (grr / baseline - 1) == pytest.approx(change, abs=0.02)
    loss, perplexity, contrastive = (PUBLISHED["CC12M"][key][0] for key in ("loss", "perplexity", "contrastive_loss"))
    assert loss == pytest.approx(2 * contrastive + math.log(perplexity), abs=1e-3)  # SPEC: its own check


def test_published_numbers_stand_beside_ours(tmp_path):
    comparison = compare(two_models(tmp_path, [5.5], [5.1]), published="Flickr30k")
    table = result_table(comparison)
    assert table[0][-3:] == ["Flickr30k, paper: baseline", "GRR", "change"]
    assert [cell(table, "CoCa loss ↓", i) for i in (-3, -2, -1)] == ["5.4383", "5.0111", "−7.86 %"]
    assert "its own data" in as_text(comparison)


@pytest.mark.parametrize(
    ("base", "other", "mark", "said"),
    [
        ([5.4, 5.5, 5.6], [5.0, 5.1, 5.2], " *", r"over 3 seeds in pairs: better beyond the spread in everything\."),
        ([5.0, 5.1, 5.2], [5.41, 5.49, 5.6], " *", r"over 3 seeds in pairs: worse beyond the spread in everything\."),
        (
            [5.0, 5.2, 5.4],
            [5.3, 5.1, 5.2],
            "",
            "over 3 seeds in pairs: within the spread of the seeds in everything[.]",
        ),
        ([5.4], [5.0], " ?", r"by a single seed: of unknown spread in everything\."),
    ],
)
def test_the_verdict_depends_on_the_number_of_seeds(tmp_path, base, other, mark, said):
    comparison = compare(two_models(tmp_path, base, other))
    assert re.search(rf"(?<=\d){re.escape(mark)}$", cell(result_table(comparison), "CoCa loss ↓", 4))
    [sentence] = verdicts(comparison)
    assert re.fullmatch(f"GRR against Baseline, {said}", sentence)


def test_higher_is_better_for_recall(tmp_path):
    for seed in range(3):
        make_run(tmp_path / f"base-{seed}", seed, [5 + seed / 10], text_to_image_r1=0.1 + seed / 100)
        make_run(tmp_path / f"grr-{seed}", seed, [6 + seed / 10], text_to_image_r1=0.2 + seed / 100)
    [sentence] = verdicts(compare(read_models([f"Baseline: {tmp_path}/base-*", f"GRR: {tmp_path}/grr-*"])))
    assert "better beyond the spread in R@1 text to image; worse beyond the spread in CoCa loss." in sentence


def test_many_models_have_a_row_each(tmp_path):
    for i in range(4):
        make_run(tmp_path / f"m{i}-0", losses=[5.0 - i])
    table = result_table(compare(read_models([f"m{i}: {tmp_path}/m{i}-*" for i in range(4)])))
    assert [row[0] for row in table][1:4] == ["m0 (n = 1)", "m1 (n = 1)", "change"]
    place = table[0].index("CoCa loss ↓")
    assert [row[place] for row in table if row[0].startswith("m")] == ["5.0000", "4.0000", "3.0000", "2.0000"]
    assert len({len(row) for row in table}) == 1


class Page(HTMLParser):
    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_draws_a_thin_line_a_seed_and_a_thick_one_a_model(tmp_path):
    for name, seeds in (("base", 3), ("grr", 2)):
        for seed in range(seeds):
            make_run(tmp_path / f"{name}-{seed}", seed, [6.0 - seed / 10, 5.0 - seed / 10, 4.0 + seed])
    models = read_models([f"Baseline: {tmp_path}/base-*", f"GRR: {tmp_path}/grr-*"])
    page = write_comparison(tmp_path / "out", compare(models)).read_text()
    figure = next(part for part in page.split("<figure ") if "<h3>CoCa loss<" in part).split("</figure>")[0]
    curves = re.findall(r'<path class="(thin|line) (\w)" d="M([^"]*)"', figure)
    assert [kind + color for kind, color, _ in curves] == ["thina"] * 3 + ["thinb"] * 2 + ["linea", "lineb"]
    drawn = {kind + color: [] for kind, color, _ in curves}
    for kind, color, path in curves:
        drawn[kind + color].append([float(pair.split()[1]) for pair in path.split("L")])
    for color in "ab":  # the axis is linear, so the mean of the drawn lines is the line of the mean
        np.testing.assert_allclose(np.mean(drawn["thin" + color], axis=0), drawn["line" + color][0], atol=0.011)
    assert re.findall(r"<span class=\w>(\w+) <output>", figure) == ["Baseline", "GRR"]


def test_the_mean_is_drawn_where_all_seeds_were_validated(tmp_path):
    make_run(tmp_path / "base-0", 0, [3.0, 2.0, 1.0])
    make_run(tmp_path / "base-1", 1, [3.0, 2.0])
    make_run(tmp_path / "grr-0", 0, [3.0])
    models = read_models([f"Baseline: {tmp_path}/base-*", f"GRR: {tmp_path}/grr-*"])
    page = write_comparison(tmp_path / "out", compare(models)).read_text()
    figure = next(part for part in page.split("<figure ") if "<h3>CoCa loss<" in part)
    assert [path.count("L") + 1 for path in re.findall(r'class="line \w" d="(M[^"]*)"', figure)] == [2, 1]


def test_nothing_that_a_name_says_becomes_part_of_the_page_and_nothing_is_loaded(tmp_path):
    two_models(tmp_path, [3.0, 3.1], [2.0, 2.1])
    hostile, plain = (
        write_comparison(tmp_path / out, compare(read_models([f"{name}: {tmp_path}/base-*", f"GRR: {tmp_path}/grr-*"])))
        for out, name in (("hostile", HOSTILE), ("plain", "plain"))
    )
    page = Page(hostile.read_text())
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in Page(plain.read_text()).tags]
    assert HOSTILE in "".join(page.words)
    assert all(name != "src" and not name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "default-src 'none'" in hostile.read_text()


def test_a_comparison_of_unequal_seeds_says_which_of_its_numbers_are_of_which(tmp_path):
    note = "differences of those that both have"
    assert note not in as_text(compare(two_models(tmp_path / "equal", [3.0, 3.2], [2.0, 2.1])))
    unequal = compare(two_models(tmp_path / "unequal", [3.0, 3.2, 9.0], [2.0, 2.1]))
    assert note in as_text(unequal)
    table = result_table(unequal)
    assert numbers(cell(table, "CoCa loss ↓", 3)) == [pytest.approx(100 * (2.05 / (15.2 / 3) - 1), abs=6e-3)]
    assert numbers(cell(table, "CoCa loss ↓", 4))[0] == pytest.approx(-1.05)


def test_markdown_and_terminal_say_the_same(tmp_path):
    comparison = compare(two_models(tmp_path, [3.0, 3.2], [2.0, 2.1]))
    text, marked = as_text(comparison), as_markdown(comparison)
    words = [word for word in text.split() if set(word) != {"-"}]
    assert words == [word for word in marked.replace("|", " ").split() if not set(word) <= {"-", ":"}]
    write_comparison(tmp_path / "out", comparison)
    assert (tmp_path / "out/comparison.md").read_text() == marked


ENDPOINTS: dict[str, Any] = {
    "primary": "captioning_loss",
    "secondary": ["contrastive_loss", "captions.cider", "retrieval.text_to_image_r1"],
}


def judged(cider: float, recall: float) -> dict[str, Any]:
    return {**JUDGED, "results": {"captions": {"cider": cider}, "retrieval": {"text_to_image_r1": recall}}}


def with_endpoints(folder: Path, names: Sequence[str], values: np.ndarray) -> dict:
    """Runs with values [model, seed, endpoint] in the order of ENDPOINTS, the losses falling to them from 10."""
    for name, of_model in zip(names, values, strict=True):
        for seed, (caption, contrast, cider, recall) in enumerate(of_model.tolist()):
            run = make_run(
                folder / f"{name}-{seed}", seed, losses=[], model={"vision_norm": name}, judged=judged(cider, recall)
            )
            log = MetricsLog(run)
            for step, part in ((10, 0.0), (20, 0.5), (30, 1.0)):
                losses = {
                    "captioning_loss": 10 + part * (caption - 10),
                    "contrastive_loss": contrast,
                    "loss": 30 - step,
                }
                log.write("validation", step, **losses)
            log.close()
    return read_models([f"{name}: {folder}/{name}-*" for name in names])


@settings(max_examples=10)
@given(seed=st.integers(0, 99), runs=st.integers(2, 7))
def test_endpoints_have_the_tests_of_scipy_and_secondary_ones_are_corrected_for_their_number(
    tmp_path_factory, seed, runs
):
    scipy_stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(seed).uniform(0.1, 5, (3, runs, 4))
    models = with_endpoints(tmp_path_factory.mktemp("runs"), ["base", "one", "two"], values)
    comparison = compare(models, **ENDPOINTS)
    assert [(e.model, e.metric.name) for e in comparison.endpoints] == [
        (model, name) for model in ("one", "two") for name in (ENDPOINTS["primary"], *ENDPOINTS["secondary"])
    ]
    for m, of_model in ((1, comparison.endpoints[:4]), (2, comparison.endpoints[4:])):
        ps = [scipy_stats.ttest_rel(values[m, :, k], values[0, :, k]).pvalue for k in range(4)]
        assert [e.difference.p for e in of_model] == pytest.approx(ps)
        assert [e.primary for e in of_model] == [True, False, False, False]
        assert of_model[0].holm_p is None
        assert min(e.holm_p for e in of_model[1:]) == pytest.approx(min(1, 3 * min(ps[1:])))
        assert max(e.holm_p for e in of_model[1:]) >= max(ps[1:]) * (1 - 1e-9)
        assert all((e.difference.sign_flip_p is not None) == (runs >= 6) for e in of_model)
        for i, found in enumerate(comparison.reached[["one", "two"][m - 1]]):
            ours, theirs = values[m, i, 0], values[0, i, 0]
            if ours > theirs:
                assert found is None
            else:
                assert found == pytest.approx(10 + 20 * (10 - theirs) / (10 - ours))


def test_the_page_and_the_texts_show_the_endpoints_and_figures_are_files_beside_them(tmp_path):
    values = np.random.default_rng(0).uniform(1, 2, (2, 6, 4)) * [1, 9, 0.1, 4]
    comparison = compare(with_endpoints(tmp_path / "runs", ["base", "grr"], values), **ENDPOINTS)
    page = write_comparison(tmp_path / "out", comparison).read_text()
    mean = values[1, :, 0].mean() - values[0, :, 0].mean()
    for text in (page, as_text(comparison), as_markdown(comparison)):
        assert "captioning loss (primary)" in text
        assert "evaluation: CIDEr-D (secondary)" in text
        assert f"{mean:+.4f}".replace("-", "−") in text
    curves, differences = (
        ElementTree.parse(tmp_path / "out" / f"comparison_{name}.svg").getroot() for name in ("curves", "differences")
    )
    kinds = [path.get("class") for path in curves.iter(f"{SVG}path")]
    assert (kinds.count("thin c0"), kinds.count("thin c1")) == (6, 6)
    dots = [float(dot.get("cx")) for dot in differences.iter(f"{SVG}circle")]
    percent = [100 * e.difference.mean / values[0, :, k].mean() for k, e in enumerate(comparison.endpoints)]
    slope, zero = np.polyfit(percent, dots, 1)
    np.testing.assert_allclose(dots, slope * np.array(percent) + zero, atol=0.1)  # one axis for all rows
    lines = [path.get("d") for path in differences.iter(f"{SVG}path") if path.get("class") == "thick c0"]
    ends = [[float(x) for x in re.findall(r"M([\d.]+) [\d.]+H([\d.]+)", line)[0]] for line in lines]
    intervals = [
        [slope * 100 * bound / values[0, :, k].mean() + zero for bound in e.difference.interval]
        for k, e in enumerate(comparison.endpoints)
    ]
    np.testing.assert_allclose(ends, intervals, atol=0.2)
    assert 300 <= np.min(ends) < np.max(ends) <= 704  # inside the axis
    assert page.count("<svg xmlns") == 2
    for rules in re.findall(r"<style>(.*?)</style>", page)[-2:]:  # a rule of a figure is for that figure
        selectors = re.findall(r"(?:^|[{}])([^{}]+)\{", rules.replace("@media (prefers-color-scheme:dark){", "}"))
        assert selectors
        assert all(selector.startswith(".figure ") for selector in selectors)
    primary = {"primary": "captions.cider"}
    assert compare(comparison.models, **primary).reached == {}
    assert "comparison_curves.svg" not in {p.name for p in write_plain(tmp_path, comparison.models).iterdir()}


def write_plain(folder: Path, models: dict) -> Path:
    """The folder of a comparison without endpoints."""
    return write_comparison(folder / "plain", compare(models)).parent


def test_the_csv_has_every_metric_of_every_run_in_full_precision(tmp_path):
    values = np.random.default_rng(0).uniform(1, 2, (2, 3, 4))
    comparison = compare(with_endpoints(tmp_path / "runs", ["base", "grr"], values), **ENDPOINTS)
    write_comparison(tmp_path / "out", comparison)
    rows = list(csv.DictReader((tmp_path / "out/comparison.csv").open(newline="")))
    assert [(row["model"], row["seed"], row["step"]) for row in rows] == [
        (name, str(seed), "30") for name in ("base", "grr") for seed in range(3)
    ]
    names = (ENDPOINTS["primary"], *ENDPOINTS["secondary"])
    found = np.array([[float(row[name]) for name in names] for row in rows])
    np.testing.assert_allclose(found, values.reshape(6, 4), rtol=1e-15)


def test_names_in_figures_are_text_and_a_complete_design_has_its_effects(tmp_path):
    values = np.random.default_rng(0).uniform(1, 2, (2, 3, 4))
    models = with_endpoints(tmp_path, ["base", "grr"], values)
    hostile = dict(zip([HOSTILE, "GRR"], models.values(), strict=True))
    for figure in figures(compare(hostile, **ENDPOINTS)).values():
        root = ElementTree.fromstring(figure)
        assert {element.tag for element in root.iter()} <= {f"{SVG}{tag}" for tag in TAGS}
    assert HOSTILE in "".join(
        ElementTree.fromstring(figures(compare(hostile, **ENDPOINTS))["comparison_curves.svg"]).itertext()
    )

    for norm, position in itertools.product(("layernorm", "rmsnorm"), ("sinusoidal", "rope")):
        for seed in range(2):
            arguments = {"vision_norm": norm, "vision_position": position}
            changed = (norm == "rmsnorm") + 2 * (position == "rope")
            make_run(
                tmp_path / "design" / f"{norm}_{position}-{seed}", seed, [9.0 - changed - 0.1 * seed], model=arguments
            )
    patterns = [
        f"{n}_{p}: {tmp_path}/design/{n}_{p}-*" for n in ("layernorm", "rmsnorm") for p in ("sinusoidal", "rope")
    ]
    comparison = compare(read_models(patterns), primary="loss")
    [(_, found)] = comparison.factorial
    assert [e.difference.mean for e in found] == pytest.approx([-1, -2, 0])
    for text in (as_text(comparison), as_markdown(comparison)):
        assert re.search(r"rope instead of sinusoidal\W+−2.0000", text)
        assert re.search(r"rmsnorm × rope\W+\+?0.0000|rmsnorm × rope\W+−0.0000", text)
    assert figures(comparison)["comparison_differences.svg"].count("<circle") == 3


def test_conditions_that_belong_to_a_model_may_differ_between_models_and_not_within_one(tmp_path):
    make_run(tmp_path / "base-0", config={"optimizer": {"lr": 1e-3}})
    make_run(tmp_path / "grr-0", config={"optimizer": {"lr": 2e-3}})
    patterns = [f"Baseline: {tmp_path}/base-*", f"GRR: {tmp_path}/grr-*"]
    compare(read_models(patterns), differ=["optimizer.lr"])
    with pytest.raises(ValueError, match=r"optimizer.lr is 0.002"):
        compare(read_models(patterns), differ=["schedule.warmup_steps"])
    make_run(tmp_path / "grr-1", 1, config={"optimizer": {"lr": 4e-3}})
    with pytest.raises(ValueError, match=r"grr-1: optimizer.lr is 0.004, in \S+/grr-0 it is 0.002"):
        compare(read_models(patterns), differ=["optimizer.lr"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"primary": "captoining_loss"}, r"one of loss, .*, got 'captoining_loss' \(did you mean captioning_loss\?\)"),
        ({"primary": "loss", "secondary": ["loss"]}, r"an endpoint once, got loss, loss; remove the repeated one"),
        ({"differ": ["optimizer.lrr"]}, r"conditions of the runs, got optimizer.lrr \(did you mean optimizer.lr\?\)"),
        ({"secondary": ["loss"]}, r"secondary metrics need a primary one, got loss; set run.primary"),
    ],
)
def test_metrics_that_do_not_exist_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        compare(two_models(tmp_path, [1.0], [1.0]), **options)


def test_evaluations_with_other_contrastive_batches_are_not_compared(tmp_path):
    for name, batch in (("base-0", 500), ("grr-0", 250)):
        results = {"losses": {"contrastive_batch": batch, "contrastive_loss": 1.0}}
        make_run(tmp_path / name, judged={**JUDGED, "results": results})
    with pytest.raises(ValueError, match=r"evaluation.losses.contrastive_batch is 250, in \S+/base-0 it is 500"):
        compare(read_models([f"Baseline: {tmp_path}/base-*", f"GRR: {tmp_path}/grr-*"]))
