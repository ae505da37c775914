"""Caption metrics: BLEU, ROUGE-L and CIDEr against reference captions, as in COCO's evaluation.

The official pipeline (Chen et al. 2015, "Microsoft COCO Captions") splits words with Stanford's tokenizer, in Java;
here NLTK's regular expressions do, with the differences that its output shows, and give the same numbers.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import chain, pairwise
from typing import Any

Words = list[str]
Ngram = tuple[str, ...]
MAX_N = 4  # words of the longest n-gram that BLEU and CIDEr look at
BETA = 1.2  # weight of recall against precision in ROUGE-L
UNITS = "BLEU and ROUGE-L from 0 to 1, CIDEr-D from 0 to 10, as coco-caption prints them"
SIGMA = 6.0  # words; the width of CIDEr-D's bell curve over differences in length


def caption_metrics(references: list[list[str]], hypotheses: list[str]) -> dict[str, float]:
    """Compute all metrics below, by the names bleu_1, bleu_2, bleu_3, bleu_4, rouge_l and cider.

    references[i] are the captions that people wrote for image i, hypotheses[i] is the caption to score. Values are
    those that coco-caption prints: BLEU and ROUGE-L between 0 and 1, CIDEr between 0 and 10, and 0 by definition for a
    single image; many papers print a hundred times these. The order of images and references does not matter.
    Raises ValueError if the lists differ in length or are empty, or if an image has no reference.
    """
    people, machine = _words("caption_metrics", references, hypotheses)
    bleus = {f"bleu_{n}": score for n, score in enumerate(_bleu(people, machine), start=1)}
    return {**bleus, "rouge_l": _rouge_l(people, machine), "cider": _cider(people, machine)}


def bleu(references: list[list[str]], hypotheses: list[str]) -> tuple[float, float, float, float]:
    """Compute BLEU-1 to BLEU-4: precisions of n-grams against the references, counted over all images.

    Arguments and errors as in `caption_metrics`. BLEU-n is the geometric mean of the precisions of 1 to n words, times
    a penalty if all captions together are shorter than the references closest to them in length.
    Source: Papineni et al. 2002, section 2.3.
    """
    return _bleu(*_words("bleu", references, hypotheses))


def rouge_l(references: list[list[str]], hypotheses: list[str]) -> float:
    """Compute ROUGE-L: the F-measure of the longest common subsequence of words, averaged over images.

    Arguments and errors as in `caption_metrics`. As in COCO's evaluation, the best precision and the best
    recall may be those of two references. Source: Lin 2004, section 3.
    """
    return _rouge_l(*_words("rouge_l", references, hypotheses))


def cider(references: list[list[str]], hypotheses: list[str]) -> float:
    """Compute CIDEr-D: tf-idf weighted cosine similarity of n-grams with each reference.

    Arguments and errors as in `caption_metrics`. Document frequencies come from the given references, so the value
    depends on the whole set of images, and is 0 for a single one. It lies between 0 and 10. Source: Vedantam et al.
    2015; variant D clips counts and penalises differences in length.
    """
    return _cider(*_words("cider", references, hypotheses))


# --- words -----------------------------------------------------------------------------------------------------------

PUNCTUATION = {"", "''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}  # what COCO leaves out
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}  # COCO keeps these
WHOLE = re.compile(  # what Stanford's tokenizer keeps in one piece, which Treebank's rules would split
    r"""(<(?:[!?][a-z-][^>]{0,99}|/?[a-z][\w:.-]*(?:\s+(?:[a-z][\w:.-]*(?:\s*=\s*["'][^"']*["'])?))*\s*/?)>"""  # <unk>
    r"|https?://[^\s<>]*[^\s<>.,;:!?)\"']"
    r"|(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)*|(?<!\S)[@#][a-z][a-z0-9]*"  # addresses, names, hash tags
    r"|[?!]{2,}"  # a single one is punctuation, two are a word
    r"|(?-i:\b[A-Z]{1,4}(?:&[A-Z]{1,4})+\b))",  # AT&T
    re.IGNORECASE,
)
SPELLING = [(re.compile(pattern), replacement) for pattern, replacement in (
    ("[\U00010000-\U0010ffff]", " "),  # emoji are left out
    ("&amp;", "&"), ("&lt;", " < "), ("&gt;", " > "), ("&quot;", '"'),
    ("“|”", '"'), ("‘|’", "'"), ("–|—", " -- "), ("€", " $ "), ("£", " # "), ("½", " 1/2 "), ("`", " ` "),
    (r"(?<!\w)([a-z])\.{2,}", r"\1. ... "), (r"\.{2,}|…", " ... "),
    (r"(?<!\S)\.(?=[a-z])", ""), (r"(\d)\.(?=[a-z])", r"\1 "),
    (r"([=|~*^\\°¿¡])", r" \1 "), (r"(?<=\w)\+(?=\w)", " + "),
    (r"(?<!\S)-(?=[a-z])", ""), (r"(?<=\w)-(?!\S)", ""),
    (r"(?<!\S)'(?=[a-z])(?!(?:em|til|tis|twas|n|cause|s|d|m|ll|re|ve)\b)", "' "),
    (r"(\d)'(\d+)\"", r"\1 \2 "), (r"(\d)'(?=\d)", r"\1 '"),
    (r"n't've\b", "n't 've"), (r"\by'(?=[a-z])", "y' "), (r"(\d:\d\d)(?=[ap]m\b)", r"\1 "),
)]  # fmt: skip
PLAIN = re.compile(r"[a-z0-9 ,]*\.?")  # most captions: nothing in them is spelled in another way
ABBREVIATION = re.compile(
    r"[a-z]\.|([a-z]{1,2}\.){2,}|(jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thu|thurs|fri|mr|mrs|ms"
    r"|dr|prof|jr|sr|st|mt|ave|blvd|rd|sq|ct|co|corp|inc|ltd|etc|vs|ft|capt|lt|col|gen|maj|sgt|sen|rep|gov|adm|pres"
    r"|rev|hon|dept|est|al|bros|assn|univ|tel|ext|bldg|cf|esq|messrs|mme|mlle|ph|calif|fla|penn|conn|ariz|colo|ind|kan"
    r"|minn|mo|wis|va|ga|md|mich|tenn|okla|nev|neb|mont|ala|ky|seq)\."
)
BEFORE_NUMBERS = re.compile(r"(nos?|figs?|pp|art|op|ca|prop)\.")  # abbreviations where a number follows


@cache
def treebank() -> Any:
    """Returns NLTK's Treebank tokenizer. Recipes call it at their start, so that they fail before they write captions.

    Raises ImportError without NLTK.
    """
    try:
        from nltk.tokenize import TreebankWordTokenizer
    except ImportError as error:
        raise ImportError(
            'treebank: caption metrics need NLTK, which is not installed; pip install "grr-coca[evaluate]"'
        ) from error
    return TreebankWordTokenizer()


def split_words(caption: str) -> Words:
    """Returns a caption's words in lower case, as COCO's evaluation splits them: don't -> do n't; no punctuation.

    They are those of Stanford's PTBTokenizer 3.4.1 without the marks that COCO removes: a word in angle brackets, as
    `<unk>`, is one word, and so are two or more of ! and ? in a row. NLTK's rules of the Penn Treebank split the rest;
    they split a period from the last word of a text only, Stanford's tokenizer from any word but an abbreviation.
    """
    words: Words = []
    for i, part in enumerate(WHOLE.split(" ".join(caption.split()))):
        words += part.lower().split() if i % 2 else _treebank_words(part.lower())
    return words


def _treebank_words(text: str) -> Words:
    if not PLAIN.fullmatch(text):
        for pattern, replacement in SPELLING:
            text = pattern.sub(replacement, text)
    tokens = [BRACKETS.get(token, token) for token in treebank().tokenize(f"{text} .")]
    words = []
    for token, following in pairwise([*tokens, ""]):
        keeps = ABBREVIATION.fullmatch(token) or (BEFORE_NUMBERS.fullmatch(token) and following[:1].isdigit())
        words.append(token if keeps else token.rstrip("."))
    return [word for word in words if word not in PUNCTUATION]


def _words(who: str, references: list[list[str]], hypotheses: list[str]) -> tuple[list[list[Words]], list[Words]]:
    if len(references) != len(hypotheses) or not hypotheses:
        raise ValueError(
            f"{who}: references and hypotheses must be as many, and at least one, got {len(references)} and "
            f"{len(hypotheses)}; references[i] is the list of captions of the image that hypotheses[i] describes"
        )
    for i, own in enumerate(references):
        if isinstance(own, str) or not own:
            raise ValueError(
                f"{who}: references[{i}] must be a list of one caption or more, got {own!r}; put a single caption into "
                "a list, and leave out images that nobody described"
            )
    return [[split_words(reference) for reference in own] for own in references], [split_words(h) for h in hypotheses]


# --- scores ----------------------------------------------------------------------------------------------------------


def _bleu(references: list[list[Words]], hypotheses: list[Words]) -> tuple[float, float, float, float]:
    matched, written = [0] * MAX_N, [0] * MAX_N
    length = closest = 0
    for own, words in zip(references, hypotheses, strict=True):
        allowed = [Counter(_ngrams(reference)) for reference in own]
        for ngram, count in Counter(_ngrams(words)).items():
            matched[len(ngram) - 1] += min(count, max(counts.get(ngram, 0) for counts in allowed))
            written[len(ngram) - 1] += count
        length += len(words)
        closest += min((abs(len(reference) - len(words)), len(reference)) for reference in own)[1]
    brevity = min(1.0, math.exp(1 - (closest + 1e-9) / (length + 1e-15)))  # these keep COCO's code from dividing by 0
    precisions = [(m + 1e-15) / (w + 1e-9) for m, w in zip(matched, written, strict=True)]
    one, two, three, four = (brevity * math.prod(precisions[:n]) ** (1 / n) for n in range(1, MAX_N + 1))
    return one, two, three, four


def _rouge_l(references: list[list[Words]], hypotheses: list[Words]) -> float:
    total = 0.0
    for own, words in zip(references, hypotheses, strict=True):
        common = [_longest_common_subsequence(reference, words) for reference in own]
        if any(common):
            precision = max(common) / len(words)
            recall = max(c / len(reference) for c, reference in zip(common, own, strict=True) if reference)
            total += (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)
    return total / len(hypotheses)


def _longest_common_subsequence(a: Words, b: Words) -> int:
    """How many words of a are found in b in the same order, gaps allowed: one row of the usual table at a time."""
    above = [0] * (len(b) + 1)
    for word in a:
        row = [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        above = row
    return above[-1]


def _cider(references: list[list[Words]], hypotheses: list[Words]) -> float:
    images_with = Counter(chain.from_iterable({n for words in own for n in _ngrams(words)} for own in references))
    rarest = math.log(len(references))
    rarity = {ngram: rarest - math.log(count) for ngram, count in images_with.items()}

    def weigh(words: Words) -> tuple[dict[Ngram, float], list[float]]:
        """Count times rarity of each n-gram, and for each n the length of that vector."""
        weights = {ngram: count * rarity.get(ngram, rarest) for ngram, count in Counter(_ngrams(words)).items()}
        squares = [0.0] * MAX_N
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight**2
        return weights, [math.sqrt(square) for square in squares]

    total = 0.0
    for own, words in zip(references, hypotheses, strict=True):
        weights, norms = weigh(words)
        for reference in own:
            wanted, wanted_norms = weigh(reference)
            products = [0.0] * MAX_N
            for ngram in weights.keys() & wanted.keys():
                products[len(ngram) - 1] += min(weights[ngram], wanted[ngram]) * wanted[ngram]
            cosines = [p / (x * y) for p, x, y in zip(products, norms, wanted_norms, strict=True) if p]
            longer = max(0, len(words) - 1) - max(0, len(reference) - 1)  # in COCO's code, bigrams measure length
            total += math.exp(-(longer**2) / (2 * SIGMA**2)) * sum(cosines) / MAX_N / len(own)
    return 10 * total / len(hypotheses)


def _ngrams(words: Words) -> Iterator[Ngram]:
    return chain.from_iterable(zip(*(words[i:] for i in range(n)), strict=False) for n in range(1, MAX_N + 1))
