"""METEOR as NLTK computes it: words are matched as they are, by their stems, and as synonyms of WordNet."""

from functools import cache
from typing import Any

from grr.evaluation.captions import split_words, treebank


def meteor(references: list[list[str]], hypotheses: list[str]) -> float:
    """Compute the mean over images of METEOR with the reference that scores best, from 0 to 1.

    Arguments as in `grr.evaluation.captions.caption_metrics`, whose words are compared. It is METEOR with the
    parameters of Lavie and Agarwal (2007), without the paraphrases and the weights of words that METEOR 1.5 has, the
    program in Java by which published tables were computed, and NLTK looks up synonyms of stems, not of words: do not
    compare its values with those. Raises as `open_wordnet` does, and ValueError if the lists differ in length or are
    empty.
    """
    if len(references) != len(hypotheses) or not hypotheses:
        raise ValueError(
            f"meteor: references and hypotheses must be as many, and at least one, got {len(references)} and "
            f"{len(hypotheses)}; references[i] is the list of captions of the image that hypotheses[i] describes"
        )
    wordnet = open_wordnet()
    from nltk.translate.meteor_score import meteor_score

    scores = [
        meteor_score([split_words(reference) for reference in own], split_words(hypothesis), wordnet=wordnet)
        for own, hypothesis in zip(references, hypotheses, strict=True)
    ]
    return float(sum(scores) / len(scores))


@cache
def open_wordnet() -> Any:
    """Returns NLTK's reader of WordNet. Recipes call it at their start, so that they fail before they write captions.

    Raises ImportError without NLTK, FileNotFoundError without WordNet's data, which NLTK downloads on request only.
    """
    treebank()
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except (LookupError, OSError) as error:
        raise FileNotFoundError(
            "meteor: NLTK must find the data of WordNet, got none in nltk_data/ of the home folder or in NLTK_DATA; "
            "run `python -m nltk.downloader wordnet`, or remove meteor from run.tasks"
        ) from error
    return wordnet
