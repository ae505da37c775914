"""The accuracy of visual question answering (Antol et al. 2015), as the official evaluation of VQA v2 computes it."""

import re
from collections.abc import Sequence
from functools import lru_cache

ENOUGH = 3  # an answer is right if so many of the other people gave it
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
NUMBERS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBER_WITH_COMMA = re.compile("[0-9],[0-9]")
PERIOD = re.compile(r"\.(?![0-9])")
CONTRACTIONS = """\
'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'd've y'all'll you'd you'd've you'll you're you've"""
SPELLED = {
    word[:i] + word[i + 1 :]: word for word in CONTRACTIONS.split() for i, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}  # without one of its apostrophes -> a contraction; the last one is the official table's


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """Returns the accuracy of an answer to a question that some people, ten in VQA v2, answered: from 0 to 1.

    It is min(n / 3, 1), where n of the people gave this answer, averaged over the choices of all people but one. So it
    is 0, 0.3, 0.6, 0.9 and 1 if none, one, two, three, and four or more of ten gave it. Answers are compared after
    `normalise_answer`, or as they are if all people gave the same one. Source: Antol et al. 2015, section 3, and the
    evaluation code of VQA v2. Raises ValueError without people.
    """
    if isinstance(people, str) or not people:
        raise ValueError(
            f"vqa_accuracy: people must be a list of one answer or more, got {people!r}; give the answers of all people"
        )
    answer, people = _on_one_line(answer), [_on_one_line(given) for given in people]
    if len(set(people)) > 1:
        answer, people = normalise_answer(answer), [normalise_answer(given) for given in people]
    same = people.count(answer)
    without_one_of_them, without_another = min((same - 1) / ENOUGH, 1), min(same / ENOUGH, 1)
    return (same * without_one_of_them + (len(people) - same) * without_another) / len(people)


@lru_cache(maxsize=2**16)
def normalise_answer(answer: str) -> str:
    """Returns an answer as the official evaluation compares it: "The Two dogs." -> "2 dogs".

    Punctuation and articles are left out, numbers up to ten are written as digits, and contractions with their
    apostrophes. A sign between two words becomes a space, one beside a space is removed.
    """
    text = answer
    comma = NUMBER_WITH_COMMA.search(answer) is not None
    for sign in PUNCTUATION:
        beside_a_space = f"{sign} " in answer or f" {sign}" in answer
        text = text.replace(sign, "" if beside_a_space or comma else " ")
    words = [NUMBERS.get(word, word) for word in PERIOD.sub("", text).lower().split()]
    return " ".join(SPELLED.get(word, word) for word in words if word not in ARTICLES)


def _on_one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()
