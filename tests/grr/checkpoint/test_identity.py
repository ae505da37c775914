"""What a resumed run must share with the run that wrote its checkpoints."""

import inspect
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grr import config
from grr.checkpoint.identity import BY_FINGERPRINT, MAY_CHANGE, check_identity, run_identity
from grr.config.renamed import ADDED

RECIPES = Path(__file__).resolve().parents[3] / "recipes"
KEYS = ["model.dim", "model.dropout", "optimizer.lr", "run.seed", "loss.negatives"]
values = st.fixed_dictionaries({key: st.integers(0, 3) for key in KEYS})


@given(saved=values, wanted=values, accepted=st.sets(st.sampled_from(KEYS[1:4])))
def test_exactly_the_changes_that_are_not_accepted_are_refused_with_both_values(saved, wanted, accepted):
    missing = object()
    changed = {key for key in saved | wanted if saved.get(key, missing) != wanted.get(key, missing)}
    if changed <= accepted:
        assert set(check_identity(Path("run"), saved, wanted, accepted=accepted)) == changed
        return
    with pytest.raises(ValueError, match="written by a different run") as error:
        check_identity(Path("run"), saved, wanted, accepted=accepted)
    for key in saved | wanted:
        named = f"{key} is {saved.get(key, 'not recorded')} in the checkpoint and {wanted.get(key, 'not there')} in"
        assert (named in str(error.value)) == (key in changed - accepted)
    assert ("saving.accept_changes=[" in str(error.value)) == (
        "model.dim" not in changed
    )  # another model is another run


@pytest.mark.parametrize("name", ["model.dim", "run.bf61"])
def test_what_no_run_can_accept_is_not_taken_in_silence(name):
    saved = {"model.dim": 32, "parallel.bf16": False}
    with pytest.raises(ValueError, match=rf"saving.accept_changes can name parallel.bf16, got {name}"):
        check_identity(Path("run"), saved, saved, accepted=[name])


def test_adapters_do_not_continue_on_another_base():
    """Their best weights so far were chosen by losses on the first one."""
    for lora, accepts in ((["text_decoder"], False), ([], True)):
        saved = {"start": "a", "tuning.lora": lora}
        wanted = {"start": "b", "tuning.lora": lora}
        with pytest.raises(ValueError, match="start is a in the checkpoint and b in") as refused:
            check_identity(Path("run"), saved, wanted)
        assert ("saving.accept_changes=[start]" in str(refused.value)) == accepts
        if accepts:
            assert check_identity(Path("run"), saved, wanted, accepted=["start"]) == {"start": ["a", "b"]}
        else:
            with pytest.raises(ValueError, match=r"saving.accept_changes can name"):
                check_identity(Path("run"), saved, wanted, accepted=["start"])


def test_a_tower_is_compared_by_its_weights_and_not_by_where_they_are():
    """Checkpoints of older versions record where they were."""
    saved = {"tower": "a", "model.vision_encoder": "hf/tower", "model.vision_revision": None, "model.dim": 8}
    assert check_identity(Path("run"), saved, {"tower": "a", "model.dim": 8}) == {}
    with pytest.raises(ValueError, match=r"tower is a in the checkpoint and b in the config \(SHA-256") as refused:
        check_identity(Path("run"), saved, {"tower": "b", "model.dim": 8})
    assert "saving.accept_changes" not in str(refused.value)


def sections(recipe: str) -> dict[str, set[str]]:
    """The keys of every section that a recipe's config may hold."""
    sys.path.insert(0, str(RECIPES))
    recipe_sections = __import__(recipe).SECTIONS
    found: dict[str, set[str]] = {}
    for section, function in recipe_sections.items():
        functions = function.values() if isinstance(function, dict) else [function]
        found[section] = {key for each in functions for key in inspect.signature(each).parameters}
    return found


@pytest.mark.parametrize("recipe", ["pretrain", "finetune", "finetune_classifier"])
def test_a_recipe_compares_every_key_that_is_not_listed_as_free(recipe):
    keys = {section: names for section, names in sections(recipe).items() if section not in BY_FINGERPRINT}
    cfg = config.Config({}, {section: dict.fromkeys(names, 0) for section, names in keys.items()})
    compared = set(run_identity(cfg, data="a", validation="b", tokenizer="c"))
    compared -= {"data", "validation", "tokenizer", "order"}
    assert compared == {f"{s}.{key}" for s, names in keys.items() for key in names} - MAY_CHANGE
    for key in (
        "run.seed",
        "run.batch_size",
        "run.max_grad_norm",
        "parallel.bf16",
        "optimizer.lr",
        "optimizer.weight_decay",
        "schedule.min_lr",
        "loader.crop",
    ):
        assert key in compared


def test_every_key_that_may_change_is_one_of_a_recipe():
    known = {
        f"{s}.{key}"
        for r in ("pretrain", "finetune", "finetune_classifier")
        for s, keys in sections(r).items()
        for key in keys
    }
    assert known >= MAY_CHANGE


def test_the_micro_batch_belongs_to_the_identity_where_it_is_contrasted_in_itself():
    for negatives, compared in (("global", False), ("local", True)):
        cfg = config.Config({}, {"run": {"micro_batch_size": 8}, "loss": {"negatives": negatives}})
        assert ("run.micro_batch_size" in run_identity(cfg)) == compared


def test_the_micro_batch_belongs_to_the_identity_where_the_dropout_of_adapters_is_drawn_for_each():
    for lora, dropout, compared in (([], 0.1, False), (["text_decoder"], 0.0, False), (["text_decoder"], 0.1, True)):
        cfg = config.Config({}, {"run": {"micro_batch_size": 8}, "tuning": {"lora": lora, "dropout": dropout}})
        assert ("run.micro_batch_size" in run_identity(cfg)) == compared


def test_parts_that_were_frozen_under_the_old_key_are_the_same_run():
    wanted = {"tuning.frozen": ["vision_encoder"], "tuning.lora": [], "tuning.rank": 8}
    assert check_identity(Path("run"), {"run.freeze": ["vision_encoder"]}, wanted) == {}
    with pytest.raises(ValueError, match=r"tuning.frozen is \[\] in the checkpoint and \['vision_encoder'\] in the"):
        check_identity(Path("run"), {"run.freeze": []}, wanted)


def test_an_identity_is_the_same_after_it_was_saved_as_json():
    cfg = config.Config({}, {"optimizer": {"betas": (0.9, 0.999)}, "run": {"freeze": ["a"], "path": Path("x")}})
    assert run_identity(cfg) == {"optimizer.betas": [0.9, 0.999], "run.freeze": ["a"], "run.path": "x"}


def test_a_run_that_an_older_version_began_is_compared_by_todays_keys():
    saved = {"run.clip": 1.0, "run.bf16": True, "model.context": 64, "optimizer.moments": "fp32", "optimizer.lr": 0.1}
    wanted = {
        "run.max_grad_norm": 1.0,
        "parallel.bf16": True,
        "model.context_length": 64,
        "model.num_queries": 64,
        "optimizer.lr": 0.1,
    }
    assert check_identity(Path("run"), saved, wanted) == {}
    with pytest.raises(ValueError, match=r"parallel\.bf16 is False in the checkpoint and True in the config"):
        check_identity(Path("run"), saved | {"run.bf16": False}, wanted)
    with pytest.raises(ValueError, match=r"optimizer\.moments is 8bit in the checkpoint and not there in the config"):
        check_identity(Path("run"), saved | {"optimizer.moments": "8bit"}, wanted)


def test_a_builder_that_still_takes_an_old_name_keeps_it():
    assert check_identity(Path("run"), {"model.context": 64}, {"model.context": 64}) == {}


def test_another_size_of_a_trained_vocabulary_is_another_run_and_old_checkpoints_do_not_record_it():
    def identity(**tokenizer) -> dict:
        return run_identity(config.Config({}, {"run": {"seed": 0}, "tokenizer": tokenizer}), tokenizer="f")

    saved = identity(path=None, vocab_size=300, context_length=32)
    with pytest.raises(ValueError, match=r"tokenizer\.vocab_size is 300 in the checkpoint and 512 in the config"):
        check_identity(Path("run"), saved, identity(path=None, vocab_size=512, context_length=32))
    old = {key: value for key, value in saved.items() if not key.startswith("tokenizer.")}
    assert check_identity(Path("run"), old, saved) == {}
    assert identity(path="spiece.model", vocab_size=300, context_length=32) == old


def test_a_checkpoint_of_another_order_of_samples_is_refused_and_the_change_can_be_accepted():
    wanted = run_identity(config.Config({}, {"run": {"seed": 0}, "loader": {"crop": "squash"}}), data="f")
    old = {key: value for key, value in wanted.items() if key != "order"}  # of 0.1, which records none
    with pytest.raises(
        ValueError, match=r"order is 1 in the checkpoint and 2 in the config \(version of the order"
    ) as e:
        check_identity(Path("run"), old, wanted)
    assert "saving.accept_changes=[order]" in str(e.value)
    assert check_identity(Path("run"), old, wanted, accepted=["order"]) == {"order": [1, 2]}
    assert check_identity(Path("run"), wanted, wanted) == {}


@pytest.mark.parametrize("key", ADDED)
def test_a_run_that_began_before_an_option_existed_continues_where_the_option_changes_nothing(key):
    saved = {"optimizer.lr": 0.1}
    assert check_identity(Path("run"), saved, {"optimizer.lr": 0.1, key: ADDED[key]}) == {}
    with pytest.raises(ValueError, match=re.escape(f"{key} is {ADDED[key]} in the checkpoint and 3 in the config")):
        check_identity(Path("run"), saved, {"optimizer.lr": 0.1, key: 3})
