"""Composition: whether captions say where objects are, and answers to questions of right and wrong captions."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from grr.data.formats.choices import Choices
from grr.evaluation.outputs import ModelOutputs
from grr.tokenizers import Tokenizer

WHERE = re.compile(r"\babove\b|\bto the left of\b|\bat the (?:top|bottom) (?:left|right)\b")
Judged = tuple[float, bool]  # score of a pair, and whether its caption is right


def check_spatial(captions: Iterable[str]) -> None:
    """Raise ValueError if no caption has spatial words, before anything is computed for the task relations."""
    if not any(map(WHERE.search, captions)):
        raise ValueError(
            "relations: a caption of the data must have spatial words (above, to the left of, at the top left ...), "
            "got none; remove relations from run.tasks"
        )


def relation_accuracy(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> dict[str, float]:
    """Returns the fraction of captions with the spatial words of a reference, in its order, as `accuracy`.

    references[i] are the captions of image i, hypotheses[i] is the caption to score. The words are those of the
    built-in sentences: "above", "to the left of", and "at the top left" and the three other corners. Images whose
    references have none do not count; `images` is the number of the others. Objects and colours may be wrong: with the
    words "above" and "to the left of", a guess is right in half of the images. Raises as `check_spatial` does.
    """
    check_spatial(caption for captions in references for caption in captions)
    spoken = [[words for caption in captions if (words := WHERE.findall(caption))] for captions in references]
    right = [WHERE.findall(h) in some for h, some in zip(hypotheses, spoken, strict=True) if some]
    return {"accuracy": sum(right) / len(right), "images": len(right)}


def choice_accuracy(outputs: ModelOutputs, choices: Choices) -> dict[str, Any]:
    """Compute the accuracies in the questions of `choices`, as fractions of them; outputs: those of its pairs.

    The score of a pair is its cosine, or the log-likelihood of its caption given the image, which only a captioner has
    (the sum over its tokens, EOS included; Lin et al. 2024, arXiv 2306.01879). Winoground's accuracies (Thrush et al.
    2022, equations 1 to 3): `text` counts questions in which each image scores higher with its right caption than with
    any wrong one, `image` those in which each caption scores higher with its right image, where a question has several
    images, and `group` those of both. A tie is wrong. Returns cosine_text, likelihood_text and so on, `questions`,
    `left_out`, the number of questions with a pair that `outputs` does not have, and the same for each of `kinds`.
    Raises ValueError if no question is left.
    """
    cosine = (outputs.image_embeddings[outputs.image_of_text].double() * outputs.text_embeddings.double()).sum(1)
    scores = {"cosine": cosine.tolist(), "likelihood": (-outputs.token_losses).tolist()}
    row_of = {pair: row for row, pair in enumerate(outputs.texts)}
    pairs_of: defaultdict[int, list[int]] = defaultdict(list)
    for pair, question in enumerate(choices.questions.tolist()):
        pairs_of[question].append(pair)
    whole = [pairs for pairs in pairs_of.values() if all(pair in row_of for pair in pairs)]
    if not whole:
        raise ValueError(
            f"choice_accuracy: the outputs must have all pairs of a question, got none of {len(pairs_of)}; raise "
            "run.images, or check the images that were left out"
        )
    by_kind: defaultdict[str, list[dict[str, bool]]] = defaultdict(list)
    for pairs in whole:
        found: dict[str, bool] = {}
        for name, score in scores.items():
            found |= _answers(name, pairs, [score[row_of[pair]] for pair in pairs], choices)
        by_kind[choices.kinds[choices.kind[pairs[0]]]].append(found)
    everything = [found for some in by_kind.values() for found in some]
    return {
        **_means(everything),
        "left_out": len(pairs_of) - len(whole),
        "kinds": {kind: _means(some) for kind, some in by_kind.items()},
    }


def count_ties(choices: Choices, tokenizer: Tokenizer) -> int:
    """Returns the number of questions in which a right and a wrong caption of an image are the same tokens.

    They differ beyond the context, or in what the tokenizer does not keep; every score is a tie, and the answer wrong.
    """
    rights: defaultdict[tuple[int, int], set[tuple[int, ...]]] = defaultdict(set)
    wrongs: defaultdict[tuple[int, int], set[tuple[int, ...]]] = defaultdict(set)
    keys = zip(choices.questions.tolist(), choices.image_of.tolist(), strict=True)
    for key, caption, right in zip(keys, choices.captions, choices.right, strict=True):
        (rights if right else wrongs)[key].add(tuple(tokenizer.encode(caption)))
    return len({question for question, image in rights if rights[question, image] & wrongs[question, image]})


def _answers(name: str, pairs: Sequence[int], scores: Sequence[float], choices: Choices) -> dict[str, bool]:
    """Returns whether the answers to a question are right: text, and image and group if it has several images."""
    text = _all_right(pairs, scores, choices, lambda pair: choices.image_of[pair])
    if len({choices.image_of[pair] for pair in pairs}) < 2:
        return {f"{name}_text": text}
    image = _all_right(pairs, scores, choices, lambda pair: choices.captions[pair])
    return {f"{name}_text": text, f"{name}_image": image, f"{name}_group": text and image}


def _all_right(pairs: Sequence[int], scores: Sequence[float], choices: Choices, key: Callable[[int], object]) -> bool:
    """Returns whether, among the pairs of equal keys, every right one scores higher than every wrong one."""
    groups: defaultdict[object, list[Judged]] = defaultdict(list)
    for pair, score in zip(pairs, scores, strict=True):
        groups[key(pair)].append((score, bool(choices.right[pair])))
    return all(
        score > other for group in groups.values() for score, right in group if right for other, ok in group if not ok
    )


def _means(some: Iterable[dict[str, bool]]) -> dict[str, float]:
    some = list(some)
    names = dict.fromkeys(name for found in some for name in found)
    means = {name: [found[name] for found in some if name in found] for name in names}
    return {"questions": len(some), **{name: sum(found) / len(found) for name, found in means.items()}}
