"""Spatial words are right if they are those of a reference in its order, whatever the objects are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grr.evaluation.composition import relation_accuracy

openmoji = pytest.importorskip("grr.data.formats.openmoji")
SCENES = {
    kind: [("fox", r, "egg", "blue") for r in relations]
    for kind, relations in openmoji.RELATIONS.items()
    if kind != "objects"
}


@pytest.mark.parametrize("kind", SCENES)
def test_a_sentence_has_the_relation_of_another_only_if_both_are_of_the_same_relation(kind):
    for one in SCENES[kind]:
        for other in SCENES[kind]:
            written = openmoji.sentence(("key", other[1], "owl", "pink"))
            found = relation_accuracy([[openmoji.sentence(one)]], [written])
            assert found == {"accuracy": float(one[1] == other[1]), "images": 1}


@given(flags=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=20))
def test_images_without_a_relation_in_their_references_do_not_count(flags):
    references = [["a fox above an egg" if spatial else "a fox and an egg", "a picture"] for spatial, _ in flags]
    written = ["an egg above an egg on" if right else "a fox" for _, right in flags]
    counted = [right for spatial, right in flags if spatial]
    if not counted:
        with pytest.raises(ValueError, match=r"relations: .* got none; remove relations from run.tasks"):
            relation_accuracy(references, written)
    else:
        found = relation_accuracy(references, written)
        assert found == {"accuracy": sum(counted) / len(counted), "images": len(counted)}
