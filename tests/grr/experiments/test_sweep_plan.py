"""A plan holds every variant with every seed once, and says all that is wrong with it before anything runs."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grr.experiments import catalog as installed
from grr.experiments.sweep import plan

names = st.lists(st.from_regex(r"[a-z_]{1,6}", fullmatch=True), min_size=1, max_size=4, unique=True)
seeds = st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True)
PRETRAIN = "pretrain: recipes/pretrain.py --config tiny.yaml model.dim=64"
FINETUNE = "finetune: --nproc 2 finetune/photos model.path={pretrain}"


@given(stages=names, variants=names, seeds=seeds)
def test_each_variant_has_each_seed_in_each_stage_in_a_separate_folder(stages, variants, seeds):
    jobs = plan(Path("runs"), [f"{s}: x.py" for s in stages], [f"{v}: a={v}" for v in variants], seeds)
    every = set(itertools.product(stages, variants, seeds))
    assert {(job.stage, job.variant, job.seed) for job in jobs} == every
    assert len({job.folder for job in jobs}) == len(jobs) == len(every)
    for job in jobs:
        assert f"run.folder={job.folder}" in job.words
        assert f"run.seed={job.seed}" in job.words
        assert (f"a={job.variant}" in job.words) == (job.stage == stages[0])
        if job.after is None:
            assert job.stage == stages[0]
        else:
            assert (job.after.variant, job.after.seed) == (job.variant, job.seed)
            assert jobs.index(job.after) < jobs.index(job)
            assert stages.index(job.after.stage) == stages.index(job.stage) - 1


@given(variants=names, seeds=seeds)
def test_all_variants_have_their_first_seed_before_any_has_its_second(variants, seeds):
    jobs = plan(Path("runs"), [PRETRAIN, FINETUNE], [f"{v}:" for v in variants], seeds)
    order = [job.seed for job in jobs]
    assert order == sorted(order, key=seeds.index)


@given(variants=names)
def test_a_pattern_of_one_variant_matches_no_other(variants):
    jobs = plan(Path("runs"), [PRETRAIN], [f"{v}:" for v in variants], [0, 1])
    for variant in variants:
        matched = {job.variant for job in jobs if job.folder.match(f"runs/pretrain/{variant}-*")}
        assert matched == {variant}


def test_a_command_is_what_a_user_would_type():
    jobs = plan(
        Path("runs/x"),
        [PRETRAIN, FINETUNE],
        ["grr: model.name=grr_coca data.shards='my data/*.tar'"],
        [3],
        ["finetune: run.epochs=1 optimizer.betas='[0, 1]'"],
    )
    assert [job.words for job in jobs] == [
        [
            "recipes/pretrain.py",
            "--config",
            "tiny.yaml",
            "model.dim=64",
            "model.name=grr_coca",
            "data.shards=my data/*.tar",
            "run.folder=runs/x/pretrain/grr-3",
            "run.seed=3",
        ],
        [
            "--nproc",
            "2",
            "finetune/photos",
            "model.path=runs/x/pretrain/grr-3",
            "run.epochs=1",
            "optimizer.betas=[0, 1]",
            "run.folder=runs/x/finetune/grr-3",
            "run.seed=3",
        ],
    ]


@pytest.mark.parametrize(
    ("stages", "variants", "seeds", "overrides", "says"),
    [
        ([], ["a:"], [0], [], "stages: there must be at least one"),
        ([PRETRAIN], [], [0], [], "variants: there must be at least one"),
        ([PRETRAIN], ["a:"], [], [], "seeds: there must be at least one"),
        ([PRETRAIN], ["a:"], [0, 1, 0], [], "seeds: 0 occurs twice"),
        ([PRETRAIN], ["a:", "a: b=1"], [0], [], "variants: a occurs twice"),
        ([PRETRAIN], ["2-d: b=1"], [0], [], 'variants: must be "name: words", the name of letters, digits and _, got '),
        ([PRETRAIN], ["model.name=grr_coca"], [0], [], 'variants: must be "name: words"'),
        ([PRETRAIN], ["a: b='1"], [0], [], r"variants: a cannot be split into words \(No closing quotation\)"),
        (["pretrain:"], ["a:"], [0], [], "stages: pretrain must have a recipe after the colon"),
        ([FINETUNE, PRETRAIN], ["a:"], [0], [], "{pretrain} in finetune must be an earlier stage, one of none"),
        (
            [PRETRAIN, "finetune: x.py path={pretrian}"],
            ["a:"],
            [0],
            [],
            "{pretrian} in finetune must be an earlier stage, one of pretrain",
        ),
        ([PRETRAIN], ["a:"], [0], ["finetune: run.epochs=1"], "overrides: finetune must be a stage, one of pretrain"),
    ],
)
def test_each_fault_is_named(stages, variants, seeds, overrides, says):
    with pytest.raises(ValueError, match=says):
        plan(Path("runs"), stages, variants, seeds, overrides)


def test_all_faults_are_named_at_once():
    with pytest.raises(ValueError, match=r"sweep:\n.*variants: .*\n.*seeds: 1 occurs twice\n.*\{nothing\}"):
        plan(Path("runs"), ["pretrain: x.py a={nothing}"], ["b-c: d=1"], [1, 1])


def started(*words: str) -> list[str]:
    return plan(Path("runs"), [f"a: {' '.join(words)}"], ["b:"], [0])[0].command()


def test_a_stage_starts_an_installed_recipe_or_a_file_below_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos = installed.find("pretrain/photos")
    own = ["run.folder=runs/a/b-0", "run.seed=0"]
    assert started("pretrain/photos") == [str(installed.RECIPES / "pretrain.py"), "--config", str(photos.path), *own]
    assert started("--nproc", "2", "pretrain", "--config", "pretrain/photos") == [
        "-m",
        "grr.cli.launch",
        "--nproc_per_node=2",
        *started("pretrain/photos"),
    ]
    with pytest.raises(ValueError, match="--nproc must be at least 1, got 0"):
        started("--nproc", "0", "pretrain/photos")
    Path("deep").mkdir()
    Path("deep/mine.py").touch()
    assert started("deep/mine.py", "x=1") == ["deep/mine.py", "x=1", *own]


@pytest.mark.parametrize("word", ["/bin/sh", "touch", "torchrun", "../outside.py", "{outside}", "link.py"])
def test_a_stage_cannot_start_another_program(word, tmp_path, monkeypatch):
    (tmp_path / "outside.py").touch()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("link.py").symlink_to("../outside.py")
    with pytest.raises(
        ValueError, match=r"there is no recipe or config|a stage must start an installed recipe, or one"
    ):
        started(word.format(outside=tmp_path / "outside.py"))


@pytest.mark.parametrize("recipe", ["evaluate/openmoji", "--nproc 2 evaluate/openmoji", "recipes/evaluate.py"])
def test_an_evaluation_reads_and_writes_the_folder_of_the_stage_that_it_follows(recipe, tmp_path):
    stages = [PRETRAIN, f"score: {recipe} run.images=5"]
    train, score = plan(tmp_path, stages, ["a: model.dim=2"], [3], ["score: run.bf16=true"])
    assert score.after is train
    assert score.folder == train.folder == tmp_path / "pretrain/a-3"
    given = [f"model.path={train.folder}", f"run.folder={train.folder}"]
    assert score.words == [*recipe.split(), "run.images=5", "run.bf16=true", *given]
    train.folder.mkdir(parents=True)
    assert not train.finished
    (train.folder / "model").mkdir()
    assert (train.finished, score.finished) == (True, False)
    (train.folder / "evaluation.json").touch()
    assert score.finished
