"""Visual entailment, the layout of SNLI-VE."""

from collections.abc import Iterator
from pathlib import Path

from grr.data.formats.annotations import check_images_exist
from grr.data.formats.rows import read_lines, read_objects
from grr.data.labelled import JUDGEMENTS, Labelled, LabelledRow, labelled_rows
from grr.data.pairs import Row
from grr.data.records import Records


def snli_ve(*, path: str, images: str) -> Labelled:
    """Read SNLI-VE (Xie et al. 2019) as it is distributed: snli_ve_train.jsonl and the folder of Flickr30k's images.

    The image is the premise, sentence2 the hypothesis; pairs without a majority label ("-") are left out. Raises
    FileNotFoundError if the file or all images are missing; ValueError, naming the line, if a line has another content.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"snli_ve: there is no file {path}")
    number = {judgement: i for i, judgement in enumerate(JUDGEMENTS)}
    records = Records()

    def rows() -> Iterator[LabelledRow]:
        for i, row in read_objects("snli_ve", Path(path), read_lines("snli_ve", Path(path))):
            where = f"snli_ve: {path} line {i}"
            image, text, judgement = (row.get(key) for key in ("flickr30k_id", "sentence2", "gold_label"))
            if not isinstance(image, str) or not isinstance(text, str) or judgement not in {"-", *JUDGEMENTS}:
                raise ValueError(
                    f"{where} must be an object with Flickr30K_ID, sentence2 and gold_label "
                    f"({', '.join(JUDGEMENTS)} or -), got {str(row)[:80]!r}; correct the line"
                )
            if judgement == "-":
                records.leave_out("without a judgement")
            else:
                yield LabelledRow(Row(f"{image}.jpg", text, where), number[judgement])

    labelled = labelled_rows(Path(images), rows(), list(JUDGEMENTS), records)
    check_images_exist("snli_ve", path, labelled.pairs)
    return labelled
