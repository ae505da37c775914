"""The benchmark: the laws of the numbers that it writes, whatever their size, and the configs that it refuses."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from label_rows import label_rows
from programs import run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from grr import config
from grr.evaluation.flops import batch_flops
from grr.evaluation.timing import until_out_of_memory
from grr.models.builders import MODELS, grr_coca_tiny
from grr.parallel.initialize import initialize

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
CONFIGS = sorted((RECIPES / "configs/benchmark").glob("*.yaml"))
sys.path.insert(0, str(RECIPES))
from benchmark import SECTIONS, Run, some_batches  # noqa: E402


def load(file: Path, *overrides: str) -> config.Config:
    words = ["--config", str(file), *overrides]
    return config.load(SECTIONS, words)


# --- the work of a row ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [None, 5])
def test_the_cost_of_a_steps_batches_is_torchs_count(tokens):
    sizes = {"vocab_size": 60, "context_length": 16, "image_size": 16, "patch_size": 8, "dim": 16, "num_heads": 2}
    layers = {"vision_layers": 1, "text_layers": 2, "multimodal_layers": 1}
    cfg = load(CONFIGS[0], *(f"model.{key}={value}" for key, value in (sizes | layers).items()))
    with torch.device("meta"):
        model = cfg.build("model")
    initialize(model, torch.device("cpu"), seed=0)
    batches = some_batches(cfg, Run(batch_size=6, micro_batch_size=3), 2, torch.device("cpu"), tokens)
    assert [len(batch.ids) for batch in batches] == [3, 3]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        for batch in batches:
            model(batch.images, batch.ids, positions=batch.positions, labels=label_rows(batch))
    builder = MODELS[cfg.model["name"]]
    assert batch_flops(builder, batches, **cfg.arguments("model")).total == counter.get_total_flops()


# --- what it writes down -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[dict, str, Path]:
    """What a copy of the recipe, in another folder, says of the tiny model: benchmark.json, its output, its folder."""
    folder = tmp_path_factory.mktemp("benchmark")
    shutil.copytree(RECIPES, folder / "mine", ignore=shutil.ignore_patterns("__pycache__"))
    words = ["mine/benchmark.py", "--config", "mine/configs/benchmark/tiny.yaml", "run.folder=out"]
    few = ["run.iterations=2", "run.variants=[fp32, bf16, bf16 checkpoint]"]
    done = run([*words, *few], cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "out/benchmark.json").read_text()), done.stdout, folder / "out"


def rows(result: dict, what: str) -> list[dict]:
    return [row for row in result["rows"] if row["what"] == what]


@pytest.mark.slow
def test_every_row_obeys_the_laws_of_its_numbers(measured):
    result, _, _ = measured
    kinds = ["training step", "encode_image", "encode_text", "decoder, logits", "forward, logits", "captions"]
    assert list(dict.fromkeys(row["what"] for row in result["rows"])) == kinds
    for row in result["rows"]:
        first, seconds = rows(result, row["what"])[0], row["seconds"]
        rate = (
            result["rates"]["bytes_per_second"]
            if row["unit"] == "bytes"
            else (result["rates"]["flops_per_second"][row["variant"].split()[0]])
        )
        assert row["samples_per_second"] == pytest.approx(row["samples"] / seconds)
        assert row[f"{row['unit']}_per_second"] == pytest.approx(row["amount"] / seconds)
        assert row["limit_seconds"] == pytest.approx(row["amount"] / rate)
        assert row["utilisation"] == pytest.approx(row["limit_seconds"] / seconds)
        assert row["faster"] == pytest.approx(first["seconds"] / first["samples"] * row["samples"] / seconds)
        assert row["warmup_seconds"] > 0
        assert row["peak_bytes"] is None or row["memory"] == pytest.approx(row["peak_bytes"] / first["peak_bytes"])


@pytest.mark.slow
def test_the_same_work_is_counted_the_same_in_every_variant(measured):
    result, _, _ = measured
    steps = rows(result, "training step")
    assert [row["variant"] for row in steps] == ["fp32", "fp32", "bf16", "bf16", "bf16 checkpoint", "bf16 checkpoint"]
    long, short = steps[0::2], steps[1::2]
    assert {row["tokens"] for row in long} == {16}
    assert {row["caption_tokens"] for row in short} == {4}
    assert len({row["amount"] for row in long}) == len({row["amount"] for row in short}) == 1
    assert short[0]["amount"] < long[0]["amount"]
    towers = [rows(result, what)[0]["amount"] for what in ("encode_image", "encode_text", "decoder, logits")]
    assert sum(towers) == rows(result, "forward, logits")[0]["amount"]


@pytest.mark.slow
def test_captions_read_half_as_many_bytes_in_half_the_precision_however_many_there_are(measured):
    result, _, _ = measured
    without, *written = rows(result, "captions")
    assert (without["variant"], without["samples"], without["num_beams"]) == ("fp32 without cache", 1, 1)
    assert without["same_captions"]
    assert [(row["samples"], row["num_beams"]) for row in written] == [(1, 1), (1, 2), (8, 1), (8, 2)] * 2
    fp32, bf16 = ({row["amount"] for row in written if row["variant"] == word} for word in ("fp32", "bf16"))
    assert len(fp32) == 1
    assert fp32 == {2 * amount for amount in bf16}


@pytest.mark.slow
def test_counts_alone_are_written_with_the_lines_that_wait(tmp_path):
    words = [str(RECIPES / "benchmark.py"), "--config", str(RECIPES / "configs/benchmark/tiny.yaml")]
    done = run([*words, "run.parts=[counts]", "run.variants=[bf16]", "run.folder=out"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "out/benchmark.json").read_text())
    assert [row["waits"] for row in result["counts"]] == [{}, {}]
    assert all(row["operations"] > 0 for row in result["counts"])


@pytest.mark.slow
def test_the_machine_is_named_and_a_line_printed_for_each_row(measured):
    result, said, folder = measured
    machine = result["machine"]
    assert (machine["torch"], machine["threads"]) == (torch.__version__, 1)
    assert machine["cpu"]
    head, counts, table = said.split("\n\n")
    assert f"1 threads, torch {torch.__version__}" in head
    assert f"{result['parameters']:,} parameters" in head
    assert result["parameters"] == sum(p.numel() for p in grr_coca_tiny().parameters())
    assert len(counts.splitlines()) == len(result["counts"]) == 4
    for line, row in zip(counts.splitlines(), result["counts"], strict=True):
        asked = {None: "full length", 4: "4 tokens"}[row["caption_tokens"]]
        length = f"captions of {asked} padded to {row['tokens']}"
        assert line.startswith(f"{row['variant']}, {length}: {row['operations']:,} operations, 0 waits, ")
        assert row["waits"] == {}
        assert 1 <= row["flops"] / row["needed_flops"] < 1.05
    assert len(set(counts.splitlines())) == len(result["counts"])
    lines = table.splitlines()[1:]
    assert len(lines) == len(result["rows"])
    for line, row in zip(lines, result["rows"], strict=True):
        assert line.startswith(row["what"])
        asked = {None: "full length padded to ", 4: "4 tokens padded to "}.get(row.get("caption_tokens", 0), "")
        assert f"{row['variant']}, {asked}{row['tokens']}" in line
        assert f"{row['faster']:.2f}" in line
    again = load(folder / "config.yaml")
    assert again.run["written_tokens"] == 10


@pytest.mark.slow
def test_what_memory_does_not_suffice_for_is_a_row_and_the_next_variant_follows(tmp_path):
    tiny = str(RECIPES / "configs/benchmark/tiny.yaml")
    huge = 10**15  # pairs or images, more than a process has addresses for
    words = [
        "run.variants=[fp32, bf16]",
        f"run.batch_size={huge}",
        f"run.micro_batch_size={huge}",
        "run.iterations=1",
        f"run.images=[1,{huge}]",
        "run.num_beams=[1]",
        "run.folder=out",
    ]
    done = run([str(RECIPES / "benchmark.py"), "--config", tiny, *words], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "out/benchmark.json").read_text())
    lacking = [(row["what"], row["variant"]) for row in result["rows"] if "out_of_memory" in row]
    assert lacking == [(what, word) for what in ("training step", "towers", "captions") for word in ("fp32", "bf16")]
    for what, word in lacking:
        assert f"{what:<17}{word}: out of memory\n" in done.stdout
    measured = [row["variant"] for row in rows(result, "captions") if "seconds" in row]
    assert measured == ["fp32 without cache", "fp32", "bf16"]


def test_an_error_that_is_not_of_memory_ends_the_run():
    def rows():
        yield {"what": "captions"}
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        list(until_out_of_memory("captions", "fp32", rows()))


# --- what a config may say -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_is_valid_and_says_how_to_run_it(file):
    cfg = load(file)
    assert cfg.run["written_tokens"] <= cfg.model["context_length"] - 3
    assert cfg.run["batch_size"] % cfg.run["micro_batch_size"] == 0
    header = file.read_text().split("\nrun:")[0]
    assert f"recipes/benchmark.py --config recipes/configs/benchmark/{file.name}" in header


def test_what_cannot_be_measured_is_said_before_anything_starts(tmp_path):
    words = ["run.batch_size=9", "run.written_tokens=14", "run.caption_tokens=[0]"]
    tiny = str(RECIPES / "configs/benchmark/tiny.yaml")
    under_torchrun = {"RANK": "0", "WORLD_SIZE": "2"}
    done = run([str(RECIPES / "benchmark.py"), "--config", tiny, *words], cwd=tmp_path, **under_torchrun)
    assert done.returncode != 0
    for part in (
        "benchmark: one process is measured, got 2; start it without torchrun",
        "batch_size must be a multiple of micro_batch_size, got 9 and 8; micro_batch_size=3 fits",
        "room for captions of 1 to 13 tokens, got written_tokens=14",
        "caption_tokens must be null or a mean from 1 to 13, got [0]",
    ):
        assert part in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may multiply in float8")
def test_float8_is_refused_where_the_hardware_cannot(tmp_path):
    tiny = str(RECIPES / "configs/benchmark/tiny.yaml")
    words = ["run.variants=[bf16 float8]", "run.parts=[training]", "run.iterations=1"]
    done = run([str(RECIPES / "benchmark.py"), "--config", tiny, *words], cwd=tmp_path)
    assert done.returncode != 0
    assert "multiply_in_float8: " in done.stderr


def test_a_variant_is_one_of_the_known_ones():
    with pytest.raises(config.ConfigError, match=r"run.variants: Run wants list\['fp32' \| 'fp32 compile'"):
        load(CONFIGS[0], "run.variants=[fp16]")
