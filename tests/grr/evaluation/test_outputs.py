"""Outputs of a model on pairs, against plain calls of the model per pair, and on any number of processes."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from evaluate_worker import SEEN, Noise, a_model, colours, several_captions
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import run

from grr.data.images import normalize
from grr.data.pairs import Texts
from grr.evaluation.outputs import BATCH, compute_outputs, features, over_images
from grr.generation.generate import generate
from grr.tokenizers import Tokenizer

pytestmark = pytest.mark.usefixtures("process_group")

WORKER = Path(__file__).parents[1] / "evaluate_worker.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tokenizer):
    return a_model(tokenizer).double()


@torch.no_grad()
def test_outputs_equal_those_of_a_forward_pass_of_each_pair(model, tokenizer):
    pairs = Noise(several_captions(20))
    outputs = compute_outputs(model, pairs, tokenizer, CPU, generation={}, **SEEN)
    assert model.training
    model.eval()
    assert (outputs.texts, len(outputs.images)) == (list(range(len(pairs))), 20)
    for t in range(len(pairs)):
        ids = torch.tensor([tokenizer.encode(pairs.captions[t])])  # [1, 17], untrimmed
        image = pairs.load(t, size=32, crop="squash").unsqueeze(0)
        output = model(image, ids[:, :-1])
        targets = [int(i) for i in ids[0, 1:] if i not in (tokenizer.pad_id, tokenizer.cls_id, tokenizer.bos_id)]
        loss = F.cross_entropy(output.logits[0, : len(targets)], torch.tensor(targets), reduction="sum")
        row = outputs.image_of_text[t]
        assert outputs.images[row] == list(pairs.image_of).index(pairs.image_of[t])
        assert outputs.tokens[t] == len(targets)
        torch.testing.assert_close(outputs.token_losses[t], loss.double(), rtol=1e-5, atol=0)
        torch.testing.assert_close(outputs.text_embeddings[t], output.text_embeddings[0])
        torch.testing.assert_close(outputs.image_embeddings[row], output.image_embeddings[0])
        assert pairs.captions[t] in outputs.references[row]
        assert outputs.written[row] == generate(model, image, tokenizer)[0]
    assert [len(own) for own in outputs.references] == [1 + j % 3 for j in range(20)]
    model.train()


def test_unreadable_samples_are_left_out_and_change_no_other_output(model, tokenizer):
    whole = compute_outputs(model, Noise(several_captions(12)), tokenizer, CPU, **SEEN)
    pairs = Noise(
        several_captions(12), bad=(2, 7), silent=(0, 5)
    )  # the only caption of image 0, one of image 5's three
    outputs = compute_outputs(model, pairs, tokenizer, CPU, **SEEN)
    assert outputs.left_out == {
        "0.png#0": "its caption is empty",
        "5.png#5": "its caption is empty",
        "2.png#2": "half of it is missing",
        "7.png#7": "half of it is missing",
    }
    assert [int(pairs.image_of[i]) for i in outputs.images] == [j for j in range(12) if j not in (0, 2, 7)]
    kept = [t for t, j in enumerate(pairs.image_of) if j not in (0, 2, 7) and t != 5]
    assert outputs.texts == kept
    torch.testing.assert_close(outputs.token_losses, whole.token_losses[kept])
    torch.testing.assert_close(outputs.text_embeddings, whole.text_embeddings[kept])
    owners = [whole.images[i] for i in whole.image_of_text[kept].tolist()]
    assert [outputs.images[i] for i in outputs.image_of_text.tolist()] == owners
    assert outputs.facts()["left_out"] == 4
    assert len(outputs.facts()["left_out_names"]) == 4


def test_captions_longer_than_the_context_are_counted(model, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "words")
    short = Tokenizer(tmp_path / "words", context_length=7)
    pairs = Noise(several_captions(20))
    fitting = "a fox", "a red fox number"  # two tokens, and as many as fit
    pairs.captions = Texts.of((*fitting, caption)[t % 3] for t, caption in enumerate(pairs.captions))
    outputs = compute_outputs(model, pairs, short, CPU, **SEEN)
    cut = [short.decode(short.encode(caption)) != caption for caption in pairs.captions]
    assert outputs.truncated.tolist() == cut
    facts = outputs.facts()
    assert (facts["truncated"], facts["max_tokens"]) == (sum(cut), 4)
    assert 0 < sum(cut) < len(cut)
    assert compute_outputs(model, pairs, tokenizer, CPU, **SEEN).facts()["truncated"] == 0


def test_data_without_readable_samples_are_refused_with_names(model, tokenizer):
    with pytest.raises(ValueError, match=r"must be readable, got none: 0.png#0: half of it is missing"):
        compute_outputs(model, Noise([0, 1], bad=(0, 1)), tokenizer, CPU, **SEEN)
    with pytest.raises(ValueError, match=r"one labelled image must be readable, got none: 0.png#0"):
        features(model, colours(2, bad=(0, 1)), CPU, **SEEN)


def test_the_first_images_are_those_that_occur_first(model, tokenizer):
    pairs = Noise([4, 2, 4, 9, 2, 1])
    outputs = compute_outputs(model, pairs, tokenizer, CPU, images=2, **SEEN)
    assert (outputs.images, outputs.texts, outputs.image_of_text.tolist()) == ([0, 1], [0, 1, 2, 4], [0, 1, 0, 1])
    assert outputs.written == []


@torch.no_grad()
def test_features_are_embeddings_and_pooler_inputs_of_images_with_a_class(model):
    labelled = colours(9, bad=(4,))
    labelled.labels[6] = -100
    outputs = features(model, labelled, CPU, patches=True, **SEEN)
    kept = [0, 1, 2, 3, 5, 7, 8]
    assert outputs.labels.tolist() == [j % 4 for j in kept]
    assert outputs.left_out == {"4.png#4": "half of it is missing"}
    images = torch.stack([labelled.load(j, size=32, crop="squash") for j in kept])
    model.eval()
    torch.testing.assert_close(outputs.embeddings, model.encode_image(images))
    torch.testing.assert_close(outputs.patches, model.vision_encoder(normalize(images)))
    model.train()
    assert features(model, labelled, CPU, **SEEN).patches.numel() == 0


def test_an_image_with_several_labels_is_refused(model):
    labelled = colours(4)
    labelled.image_of = labelled.image_of // 2
    with pytest.raises(ValueError, match="each image must have one label, got 4 labels of 2 images"):
        features(model, labelled, CPU, **SEEN)


@settings(max_examples=20)
@given(count=st.integers(0, 3 * BATCH), bad=st.sets(st.integers(0, 3 * BATCH), max_size=70))
def test_batches_are_consecutive_images_also_with_missing_ones(count, bad):
    pairs = Noise(list(range(3 * BATCH + 1)), bad=tuple(bad))
    done, unread = over_images(
        pairs, list(range(count)), lambda x, items: (len(x), items), CPU, image_size=2, crop="squash"
    )
    blocks = [range(start, min(start + BATCH, count)) for start in range(0, count, BATCH)]
    expected = [[i for i in block if i not in bad] for block in blocks]
    assert done == [(len(items), items) for items in expected if items]
    assert list(unread) == [pairs.ids[i] for i in range(count) if i in bad]


@pytest.mark.slow
def test_two_processes_compute_the_numbers_of_one_bit_for_bit(tmp_path):
    """Bad images, several captions an image, a sharded model, and numbers of batches that processes do not divide."""

    def result(processes: int) -> dict:
        done = run([str(WORKER), str(tmp_path / str(processes))], processes=processes)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        assert lines, done.stderr[-3000:]
        return json.loads(lines[0].removeprefix("RESULT "))

    one = result(1)
    assert len(one["rows"][2]) == 5  # left out
    assert result(2) == one
