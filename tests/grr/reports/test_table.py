"""A table says the same wherever it is written."""

from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from grr.reports.table import aligned, html, markdown

cells = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), max_size=8)
tables = st.integers(1, 5).flatmap(
    lambda columns: st.lists(st.lists(cells, min_size=columns, max_size=columns), min_size=2, max_size=6)
)


class Cells(HTMLParser):
    def __init__(self, source: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        self.rows[-1][-1] += data


@given(table=tables)
def test_a_page_shows_every_cell_as_it_is(table):
    assert Cells(html(table)).rows == table


@given(table=tables)
def test_every_line_of_aligned_text_has_its_columns_in_the_same_place(table):
    first, rule, *rest = aligned(table).split("\n")
    ends = [i for i, sign in enumerate(rule + " ") if sign == " " and i and rule[i - 1] == "-"]
    for row, line in zip(table, [first, *rest], strict=True):
        for cell, end in zip(row[1:], ends[1:], strict=True):
            assert line[:end].endswith(cell)
        assert line.startswith(row[0])


@given(table=tables)
def test_markdown_has_as_many_cells_as_the_table_whatever_they_hold(table):
    first, rule, *rest = markdown(table).split("\n")
    for row, line in zip([table[0], *table[1:]], [first, *rest], strict=True):
        assert line.replace("\\|", "").count("|") == len(row) + 1 == rule.count("|")
        assert [cell.strip().replace("\\|", "|") for cell in line.replace("\\|", "\0").strip("|").split("|")] == [
            cell.replace("|", "\0") for cell in row
        ]


def test_a_cell_of_a_stacked_table_has_its_column_and_nothing_is_lost():
    page = html([["", "a<b", "c"], ["row", "1", "2"]], stacked=True)
    assert page.count("<table class=stacked>") == 1
    assert '<th scope=row>row</th><td data-column="a&lt;b">1</td><td data-column="c">2</td>' in page
    assert html([["", "c"], ["row", "1"]]).count("stacked") == 0
