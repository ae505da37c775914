"""Visual question answering, the layout of VQA v2."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from grr.data.collate import IGNORE
from grr.data.formats.annotations import check_images_exist, objects_in, read_annotations, value_of
from grr.data.labelled import Labelled, LabelledRow, labelled_rows
from grr.data.pairs import Row
from grr.data.records import Records


def vqa_v2(
    *, questions: str, annotations: str, images: str, answers: int = 3129, classes_from: str | None = None
) -> Labelled:
    """Read VQA v2 (Goyal et al. 2017) as it is distributed: v2_OpenEnded_mscoco_train2014_questions.json,
    v2_mscoco_train2014_annotations.json, and the folder of COCO's images, or the one that holds it (train2014/).

    The class of a question is the answer of most of its annotators. The classes are the `answers` most frequent ones,
    and questions with other answers are left out. For validation, `classes_from` is the annotations of the training
    data: the classes are taken from there, and all questions are kept; those with other answers count as errors. The
    answers of all annotators are the data's `people`, by which the official accuracy credits an answer of a few; files
    without them, in which the first annotation has no `answers`, are read too. Raises FileNotFoundError if a file or
    all images are missing; ValueError if a file has another content.
    """
    asked = read_annotations("vqa_v2", questions, images, ("questions", "data_subtype"))
    answered = read_annotations("vqa_v2", annotations, images, ("annotations",))
    source = answered if classes_from is None else read_annotations("vqa_v2", classes_from, images, ("annotations",))
    counts = Counter(given.most for given in _answers(classes_from or annotations, source).values())
    classes = sorted(counts, key=lambda answer: (-counts[answer], answer))[:answers]
    number = {answer: i for i, answer in enumerate(classes)}
    answer_of = _answers(annotations, answered)
    year = str(asked["data_subtype"])  # train2014
    folder = f"{year}/" if Path(images, year).is_dir() else ""
    records = Records()

    def rows() -> Iterator[LabelledRow]:
        for j, question in enumerate(objects_in(f"vqa_v2: {questions}", asked, "questions")):
            where = f"vqa_v2: {questions} questions[{j}]"
            question_id, image = (value_of(question, key, (int,), where) for key in ("question_id", "image_id"))
            text = value_of(question, "question", (str,), where)
            if question_id not in answer_of:
                raise ValueError(
                    f"vqa_v2: {annotations} must hold an answer to each question of {questions}, but has none for "
                    f"{question_id}; pass two files of the same split"
                )
            given = answer_of.pop(question_id)
            label = number.get(given.most, IGNORE)
            if label == IGNORE and classes_from is None:
                records.leave_out("with a rare answer")
            else:
                row = Row(f"{folder}COCO_{year}_{image:012d}.jpg", text, where)
                yield LabelledRow(row, label, given.people)

    labelled = labelled_rows(Path(images), rows(), classes, records)
    for question_id in answer_of:
        records.skip(f"question_id {question_id}", "answer without a question")
    check_images_exist("vqa_v2", annotations, labelled.pairs)
    return labelled


class _Answers(NamedTuple):
    """Answers to a question: that of most annotators, and those of all, one a line, if the file has them."""

    most: str
    people: str | None


def _answers(file: str, content: dict[str, Any]) -> dict[int, _Answers]:
    """Returns the answers to each question in a file of VQA's annotations. Raises ValueError, naming the entry."""
    answers: dict[int, _Answers] = {}
    annotations = objects_in(f"vqa_v2: {file}", content, "annotations")
    of_people = bool(annotations) and "answers" in annotations[0]
    for j, annotation in enumerate(annotations):
        where = f"vqa_v2: {file} annotations[{j}]"
        question_id = value_of(annotation, "question_id", (int,), where)
        if question_id in answers:
            raise ValueError(
                f"{where} must answer a question without another answer, got question_id {question_id} again; "
                "remove one of the two"
            )
        most = value_of(annotation, "multiple_choice_answer", (str,), where)
        answers[question_id] = _Answers(most, _of_people(annotation, where) if of_people else None)
    return answers


def _of_people(annotation: dict[str, Any], where: str) -> str:
    """Returns the answers of an annotation, one a line."""
    given = value_of(annotation, "answers", (list,), where)
    if not given:
        raise ValueError(f"{where} must have the answers of one annotator or more, got none; is the file cut off?")
    return "\n".join(value_of(one, "answer", (str,), where).replace("\n", " ") for one in given)
