"""CLIP's byte pairs: decoding inverts encoding, and the ids equal those of a plain computation and of open_clip."""

import gzip
import pickle
import sys
import unicodedata

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from grr.tokenizers import ClipTokenizer, Tokenizer, installed_merges, load_tokenizer, open_tokenizer, train_tokenizer
from grr.tokenizers.clip import is_merges

ftfy = pytest.importorskip("ftfy", reason='pip install "grr-coca[clip]"')
PAIRS = ["t h", "th e</w>", "a n", "an d</w>", "i n", "r e", "o x</w>", "f ox</w>", "re d</w>", "b re", "bre a",
         "o n</w>", "! !</w>", "! !", "Ã ©", "c a", "ca f", "caf Ã©</w>", "Ã ©</w>", "1 2</w>"]  # fmt: skip
SENTENCES = ["A red fox and the bread!", "  white\n space\t ", "", "it's the dogs' — isn't it? we'RE 'sorry'",
             "café, CAFÉ", "x12y 1234 ½ Ⅷ ٣", "!!! !? wow!(", "“quoted” ’s", "&amp;lt;b&gt; &eacute;",
             "日本語 テキスト", "🦊🍞 fox", "a\x00b\x07\x1b[31mc", "\u202eabc\u202c \ufeff \u200b", "naÃ¯ve",
             "<|endoftext|> </w>", "'ſ 'S", "ﬁne"]  # fmt: skip


@pytest.fixture(scope="module")
def merges(tmp_path_factory):
    path = tmp_path_factory.mktemp("merges") / "merges.txt"
    path.write_text("\n".join(["#version: 0.2", *PAIRS, ""]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tok(merges) -> ClipTokenizer:
    return ClipTokenizer(merges, context_length=64)


@pytest.fixture(scope="module")
def clip() -> ClipTokenizer:
    """Returns a tokenizer with CLIP's merges."""
    try:
        return ClipTokenizer(installed_merges())
    except FileNotFoundError:
        pytest.skip("CLIP's merges are not here: pip install open_clip_torch==3.3.0")


def tokens(tok: Tokenizer, text: str) -> list[int]:
    """Check the layout BOS t1 ... tn EOS PAD ... PAD CLS PAD and return t1 ... tn."""
    ids = tok.encode(text)
    assert len(ids) == tok.context_length + 1
    assert (ids[0], ids[-2], ids[-1]) == (tok.bos_id, tok.cls_id, tok.pad_id)
    n = ids.index(tok.eos_id) - 1
    assert set(ids[n + 2 : -2]) <= {tok.pad_id}
    assert all(0 <= i < tok.bos_id for i in ids[1 : n + 1])
    return ids[1 : n + 1]


# Laws


@given(text=st.text(max_size=12))
def test_every_visible_character_of_a_text_is_decoded_in_lower_case(tok, text):
    import html

    visible = "".join(html.unescape(html.unescape(ftfy.fix_text(text))).lower().split())
    assert "".join(tok.decode(tok.encode(text)).split()) == visible


@given(text=st.text(max_size=300))
def test_every_text_has_the_layout_of_clip(tok, text):
    assert len(tokens(tok, text)) <= tok.context_length - 3


@pytest.mark.parametrize("text", [*SENTENCES, "\ud800 lone \udfff", "word " * 10_000, "xyz" * 30_000, "!" * 10_000])
def test_hostile_texts_have_the_layout_of_clip(tok, text):
    tokens(tok, text)
    assert isinstance(tok.decode(tok.encode(text)), str)


@given(words=st.lists(st.sampled_from(["red", "fox", "and", "bread", "x"]), max_size=90))
def test_a_long_caption_is_cut_so_that_eos_and_cls_still_fit(tok, words):
    every = [i for word in words for i in tokens(tok, word)]
    assert tokens(tok, " ".join(words)) == every[: tok.context_length - 3]


# Agreement


def spelled(word: str) -> list[str]:
    """Apply each merge in the order of the list, wherever it occurs: the definition of byte-pair encoding."""
    visible = {b: chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]}
    hidden = iter(range(256, 512))
    letters = [visible[b] if b in visible else chr(next(hidden)) for b in range(256)]
    parts = [letters[b] for b in word.encode()]
    parts[-1] += "</w>"
    for pair in PAIRS:
        first, second = pair.split()
        i = 0
        while i + 1 < len(parts):
            if (parts[i], parts[i + 1]) == (first, second):
                parts[i : i + 2] = [first + second]
            i += 1
    return parts


@given(word=st.text("thearndifoxbc", min_size=1, max_size=12))
@example(word="bread")
@example(word="theand")
def test_a_word_is_encoded_by_applying_the_merges_in_their_order(tok, word):
    parts = spelled(word)
    ids = tokens(tok, word)
    assert [tok.decode([i]) for i in ids] == [part.removesuffix("</w>") for part in parts]
    ends = [tok.decode([i, i]) != 2 * tok.decode([i]) for i in ids]  # a piece that ends a word is followed by a space
    assert ends == [part.endswith("</w>") for part in parts]


def test_the_ids_are_bytes_then_bytes_at_the_end_of_a_word_then_merges_then_special_ids(tok):
    assert tokens(tok, "!") == [256]
    assert tokens(tok, "a!") == [256 + ord("a") - ord("!"), 256]
    assert tokens(tok, "xa") == [ord("x") - ord("!"), 256 + ord("a") - ord("!")]
    assert tokens(tok, "the fox") == [512 + PAIRS.index("th e</w>"), 512 + PAIRS.index("f ox</w>")]
    assert tokens(tok, "é") == [512 + PAIRS.index("Ã ©</w>")]
    assert (tok.bos_id, tok.eos_id, tok.cls_id) == (512 + len(PAIRS), 513 + len(PAIRS), 514 + len(PAIRS))
    assert tok.vocab_size == 515 + len(PAIRS)
    assert (tok.pad_id, tok.unk_id) == (0, -1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("it's we'RE 'sorry'", ["it", "'s", "we", "'re", "'s", "orry", "'"]),
        ("x12y", ["x", "1", "2", "y"]),
        ("café-bar_n", ["café", "-", "bar", "_", "n"]),
        ("½Ⅷ٣", ["½", "ⅷ", "٣"]),
        ("!?a", ["!?", "a"]),
        ("“a” ’s &amp;lt;", ['"', "a", '"', "'s", "<"]),
    ],
)
def test_letters_digits_and_signs_are_separate_words(tok, text, words):
    assert tok.decode(tok.encode(text)) == " ".join(words)


def test_clips_vocabulary_has_clips_ids(clip):
    """The ids of "a photo of a cat" are those of Radford et al., which every CLIP has."""
    assert (clip.vocab_size, clip.bos_id, clip.eos_id, clip.cls_id, clip.pad_id) == (49_409, 49_406, 49_407, 49_408, 0)
    assert tokens(clip, "a photo of a cat") == [320, 1125, 539, 320, 2368]


@pytest.fixture(scope="module")
def theirs(clip):
    try:
        return pytest.importorskip("open_clip.tokenizer").SimpleTokenizer(context_length=76)
    except RuntimeError as error:
        pytest.skip(f"the torchvision that open_clip needs does not fit this torch: {error}")


def assert_same(clip: ClipTokenizer, theirs, caption: str) -> None:
    row = theirs([caption])[0].tolist()
    assert clip.encode(caption)[:76] == row
    assert clip.decode(row) == theirs.decode(row[1 : row.index(clip.eos_id)]).strip()


@given(text=st.text(max_size=100))
def test_any_text_has_the_ids_of_open_clip(clip, theirs, text):
    assume(all(unicodedata.category(c) != "Cn" for c in text))  # versions of Unicode differ in unassigned characters
    assert_same(clip, theirs, text)


@pytest.mark.parametrize("text", SENTENCES)
def test_sentences_have_the_ids_of_open_clip(clip, theirs, text):
    assert_same(clip, theirs, text)


# Use


def test_decode_takes_tensors_and_stops_at_eos_or_at_the_padding(tok):
    ids = tok.encode("the red fox")
    assert tok.decode(torch.tensor(ids)) == "the red fox"
    assert tok.decode([tok.bos_id, *ids[1:4], tok.eos_id, 77]) == "the red fox"
    assert tok.decode([*ids[1:4], 0, 0]) == "the red fox"
    assert tok.decode([0, *ids[1:3], tok.cls_id, 10**6, -1]) == "!the red"


def test_compressed_and_plain_lists_are_the_same_vocabulary(tok, merges, tmp_path):
    header = '"bpe_simple_vocab_16e6.txt#version: 0.2'  # as OpenAI's begins
    more = [f"{chr(ord('a') + i % 26)} {chr(ord('a') + i // 26 % 26)}" for i in range(49_000)]  # longer than CLIP reads
    with gzip.open(tmp_path / "a.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join([header, *PAIRS, ""]))
    with gzip.open(tmp_path / "long.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join([header, *more]))
    compressed = ClipTokenizer(tmp_path / "a.gz", context_length=64)
    assert compressed.fingerprint == tok.fingerprint
    assert compressed.encode("the red fox") == tok.encode("the red fox")
    assert ClipTokenizer(tmp_path / "long.gz").vocab_size == 49_409


def test_it_is_saved_as_a_plain_list_and_recognised_by_its_content(tok, tmp_path):
    tok.save(tmp_path / "tokenizer.model")
    assert is_merges(tmp_path / "tokenizer.model")
    for again in (load_tokenizer(tmp_path / "tokenizer.model", context_length=64), pickle.loads(pickle.dumps(tok))):
        assert isinstance(again, ClipTokenizer)
        assert (again.fingerprint, again.context_length, again.vocab_size) == (tok.fingerprint, 64, tok.vocab_size)
        assert again.encode("bread, and the fox") == tok.encode("bread, and the fox")


def test_a_sentencepiece_model_is_not_taken_for_a_list_of_merges(tmp_path):
    train_tokenizer(["a red fox"], tmp_path / "own.model", vocab_size=40)
    assert not is_merges(tmp_path / "own.model")
    assert type(load_tokenizer(tmp_path / "own.model", context_length=16)) is Tokenizer
    assert load_tokenizer(tmp_path / "own.model", context_length=16).context_length == 16


def test_a_run_may_be_trained_with_it(merges, tok, tmp_path):
    for path in (str(merges), None):  # with None, a run that resumes opens the copy in its folder
        opened = open_tokenizer([], tmp_path / "tokenizer.model", True, path=path, context_length=64)
        assert isinstance(opened, ClipTokenizer)
        assert opened.fingerprint == tok.fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "ClipTokenizer: there is no file .*m.txt; CLIP's merges are bpe_simple_vocab_16e6.txt.gz in"),
        (b"t h\nth e</w>\n", "the first line of a list of merges ends with #version: 0.2, that of .*m.txt does not"),
        (b"", "the first line of a list of merges ends with #version: 0.2"),
        (b"\x1f\x8bgarbage", "the first line of a list of merges ends with #version: 0.2"),
        (gzip.compress(b"#version: 0.2\nt h\n" * 9, mtime=0)[:-12], "the first line of a list of merges ends with"),
        (b"#version: 0.2\nt h\nthe\n", "a line of .*m.txt must be two pieces, got 'the'; copy it again"),
        ("#version: 0.2\nt \N{SNOWMAN}\n".encode(), "a line of .*m.txt must be two pieces, got 't \N{SNOWMAN}'"),
    ],
)
def test_a_file_that_is_not_a_list_of_merges_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "m.txt").write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ClipTokenizer(tmp_path / "m.txt")


def test_a_context_without_room_for_a_token_is_refused(merges):
    rule = "ClipTokenizer: context_length must be at least 4, for BOS, a token, EOS and CLS, got context_length=3"
    with pytest.raises(ValueError, match=rule):
        ClipTokenizer(merges, context_length=3)


def test_without_ftfy_the_error_says_what_to_install(merges, monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ImportError, match=r'ClipTokenizer: ftfy, .* is not installed; pip install "grr-coca\[clip\]"'):
        ClipTokenizer(merges)


def test_without_open_clip_the_error_says_where_the_merges_are(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="CLIP's merges are not part of this library, and open_clip_torch, wh"):
        installed_merges()
