"""Captions obey their options, and equal those of a plain computation without caches, token for token."""

import itertools
import math
import re
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from grr.components.dropout import fold_in
from grr.generation import generate as generation
from grr.generation.beam import beam_search
from grr.generation.decoding_state import DecodingState
from grr.generation.generate import generate, generate_several, prefix_ids, sample
from grr.models.builders import grr_coca_tiny
from grr.parallel.initialize import initialize
from grr.parallel.process_group import process_group
from grr.parallel.shard import shard_over, unsharded
from grr.tokenizers import Tokenizer, train_tokenizer

WORDS = ["a", "the", "red", "blue", "big", "small", "fox", "bread", "owl", "boat", "hill", "runs", "sits", "on", "near"]
CONTEXT = 16
ROOM = CONTEXT - 3


class Spelled(Tokenizer):
    """Tokenizer whose decode returns the ids, EOS (1) included: "17 4 1"."""

    def decode(self, ids) -> str:
        end = ids.index(self.eos_id) + 1 if self.eos_id in ids else len(ids)
        assert set(ids[end:]) <= {self.pad_id}
        return " ".join(map(str, ids[:end]))


@pytest.fixture(scope="module")
def tok(tmp_path_factory) -> Tokenizer:
    captions = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS]
    path = tmp_path_factory.mktemp("words") / "t.model"
    train_tokenizer(captions, path, vocab_size=100)
    return Spelled(path, context_length=CONTEXT)


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Tokenizer:
    """A vocabulary so small that all captions of a few tokens can be enumerated."""
    path = tmp_path_factory.mktemp("letters") / "t.model"
    train_tokenizer(["a a a"], path, vocab_size=10)
    return Spelled(path, context_length=CONTEXT)


def a_model(tok: Tokenizer, seed: int, **options):
    """Returns a float64 model whose logits are large, depend on the image, and favour EOS: captions of all lengths."""
    torch.manual_seed(seed)
    model = grr_coca_tiny(vocab_size=tok.vocab_size, context_length=CONTEXT, **options).double()
    with torch.no_grad():
        model.generative_pooler.out.weight *= 5
        for block in model.multimodal_decoder.blocks:
            block.cross_attention.out.weight *= 5
        model.multimodal_decoder.head.weight *= 6
        model.multimodal_decoder.head.bias[tok.eos_id] += 2 * math.log2(tok.vocab_size / 8)
    return model.eval()


def some_images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ids_of(captions: list[str]) -> list[list[int]]:
    return [[int(i) for i in caption.split()] for caption in captions]


@torch.no_grad()
def next_log_probabilities(
    model,
    image: Tensor,
    tok: Tokenizer,
    prefixes: list[list[int]],
    *,
    min_new_tokens: int = 0,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
) -> list[list[float]]:
    """Compute prefixes of one length from the start, without a cache, and apply the rules token by token."""
    ids = torch.tensor([[tok.bos_id, *written] for written in prefixes])
    logits = model(image.expand(len(ids), -1, -1, -1), ids).logits[:, -1]
    logits[:, [tok.pad_id, tok.bos_id, tok.cls_id]] = -torch.inf
    rows, n = logits.log_softmax(-1).tolist(), no_repeat_ngram_size
    for written, log_p in zip(prefixes, rows, strict=True):
        ngrams = {tuple(written[i : i + n]) for i in range(len(written) - n + 1)} if n else set()
        for token in range(tok.vocab_size):
            if token in written:
                log_p[token] *= repetition_penalty
            if n and tuple([*written, token][-n:]) in ngrams:
                log_p[token] = -math.inf
        if len(written) < min_new_tokens:
            log_p[tok.eos_id] = -math.inf
    return rows


def greedily(model, image: Tensor, tok: Tokenizer, max_new_tokens: int, **rules) -> list[int]:
    written: list[int] = []
    while len(written) < max_new_tokens and tok.eos_id not in written:
        (log_p,) = next_log_probabilities(model, image, tok, [written], **rules)
        written.append(max(range(len(log_p)), key=log_p.__getitem__))
    return written


def with_beams(
    model, image: Tensor, tok: Tokenizer, max_new_tokens: int, num_beams: int, length_penalty: float, **rules
) -> tuple[float, list[int]]:
    """Beam search as `beam_search` defines it, in lists: the score and the ids of the best caption."""
    return all_of_beams(model, image, tok, max_new_tokens, num_beams, length_penalty, [], **rules)[0]


def all_of_beams(
    model,
    image: Tensor,
    tok: Tokenizer,
    max_new_tokens: int,
    num_beams: int,
    length_penalty: float,
    prefix: list[int],
    **rules,
) -> list[tuple[float, list[int]]]:
    """The scores and ids of the captions of beam search, best first."""
    beams: list[tuple[float, list[int]]] = [(0.0, prefix)]
    captions: list[tuple[float, list[int]]] = []
    for length in range(1 + len(prefix), max_new_tokens + 1):
        following = next_log_probabilities(model, image, tok, [written for _, written in beams], **rules)
        longer = [
            (total + p, [*written, token])
            for (total, written), log_p in zip(beams, following, strict=True)
            for token, p in enumerate(log_p)
            if p > -math.inf
        ]
        longer.sort(reverse=True)
        ended = [d for d in longer[:num_beams] if d[1][-1] == tok.eos_id or length == max_new_tokens]
        captions += [(total / (length - len(prefix)) ** length_penalty, written) for total, written in ended]
        beams = [d for d in longer if d[1][-1] != tok.eos_id][:num_beams]
        if len(captions) >= num_beams or not beams:
            break
    return sorted(captions, reverse=True)


rules = st.fixed_dictionaries(
    {
        "min_new_tokens": st.integers(0, 6),
        "no_repeat_ngram_size": st.integers(0, 3),
        "repetition_penalty": st.sampled_from([0.7, 1.0, 1.5, 1e9]),
    }
)
searches = st.one_of(
    st.fixed_dictionaries({"num_beams": st.integers(1, 4), "length_penalty": st.sampled_from([-0.5, 0.0, 1.0, 2.0])}),
    st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.3, 1.0, 3.0]),
            "top_k": st.sampled_from([None, 1, 5, 1000]),
            "top_p": st.sampled_from([None, 0.1, 0.9, 1.0]),
            "seed": st.integers(0, 9),
        }
    ),
)


# Laws


@given(rules=rules, search=searches, max_new_tokens=st.integers(6, ROOM), seed=st.integers(0, 99))
def test_captions_obey_every_rule_of_every_search_and_are_reproducible(tok, rules, search, max_new_tokens, seed):
    model, images = a_model(tok, seed), some_images(3, seed)
    captions = generate(model, images, tok, max_new_tokens=max_new_tokens, **rules, **search)
    n = rules["no_repeat_ngram_size"]
    for written in ids_of(captions):
        assert not {tok.pad_id, tok.bos_id, tok.cls_id} & set(written)
        words = written[:-1] if written[-1] == tok.eos_id else written
        assert rules["min_new_tokens"] <= len(words) <= max_new_tokens
        assert tok.eos_id not in words
        assert len(words) < max_new_tokens or written == words  # a caption of max_new_tokens ends without EOS
        ngrams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)] if n else []
        assert len(set(ngrams)) == len(ngrams)
    assert generate(model, images, tok, max_new_tokens=max_new_tokens, **rules, **search) == captions


@settings(max_examples=20)
@given(rules=rules, seed=st.integers(0, 99), max_new_tokens=st.integers(6, ROOM))
def test_sampling_without_a_choice_equals_greedy_search(tok, rules, seed, max_new_tokens):
    model, images = a_model(tok, seed), some_images(3, seed)
    expected = generate(model, images, tok, max_new_tokens=max_new_tokens, **rules)
    for choice in ({"top_k": 1}, {"top_p": 1e-9}, {}):
        temperature = 2.0 if choice else 1e-6
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature, **choice, **rules}
        assert generate(model, images, tok, **options) == expected
    with torch.no_grad():
        state = DecodingState(model, images, tok, max_new_tokens=max_new_tokens, **rules)
        captions, _ = beam_search(state, num_beams=1)
    assert [tok.decode(row) for (row,) in captions.tolist()] == expected


@settings(max_examples=20)
@given(
    num_beams=st.integers(1, 4), count=st.integers(2, 7), seed=st.integers(0, 99), dropout=st.sampled_from([0.0, 0.5])
)
def test_a_batch_has_the_captions_of_its_images_one_at_a_time(tok, num_beams, count, seed, dropout):
    model, images = a_model(tok, seed, dropout=dropout).train(), some_images(count, seed)
    alone = [generate(model, image.unsqueeze(0), tok, num_beams=num_beams)[0] for image in images]
    assert generate(model, images, tok, num_beams=num_beams) == alone


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, None, None),
        (0.5, None, None),
        (2.0, 4, None),
        (1.0, None, 0.8),
        (1.5, 5, 0.6),
        (1.0, None, 1.0),
    ],
)
def test_tokens_are_drawn_with_the_probabilities_of_the_truncated_softmax(temperature, top_k, top_p):
    logits = torch.tensor([0.5, -torch.inf, 2.0, 1.0, -1.0, 1.5, 0.0, -3.0])
    weights = {i: math.exp(x / temperature) for i, x in enumerate(logits.tolist()) if x > -math.inf}
    expected: dict[int, float] = {}
    kept = sorted(weights, key=weights.__getitem__, reverse=True)[:top_k]
    for i in kept:  # the fewest whose probabilities sum to top_p, of those that top_k kept
        if top_p is None or sum(expected.values()) < top_p * sum(weights[j] for j in kept):
            expected[i] = weights[i]
    probability = {i: w / sum(expected.values()) for i, w in expected.items()}
    draws = 20_000
    drawn = sample(logits.expand(draws, -1), fold_in(0, torch.arange(draws)), temperature, top_k, top_p)
    counts = torch.bincount(drawn, minlength=len(logits)).tolist()
    assert all(counts[i] == 0 for i in range(len(logits)) if i not in probability)
    chi_square = sum((counts[i] - draws * p) ** 2 / (draws * p) for i, p in probability.items())
    freedom = len(probability) - 1
    assert chi_square <= freedom + 5 * math.sqrt(2 * freedom)  # its mean and five standard deviations


def test_captions_are_drawn_with_the_probabilities_of_the_model(few):
    """Captions of two tokens, in a batch whose captions end at different steps."""
    model, image, draws = a_model(few, 1), some_images(1, 1)[0], 3000
    (first,) = next_log_probabilities(model, image, few, [[]])
    probability = {}
    for i, p in enumerate(first):
        if i == few.eos_id:
            probability[str(i)] = math.exp(p)
        elif p > -math.inf:
            (second,) = next_log_probabilities(model, image, few, [[i]])
            probability |= {f"{i} {j}": math.exp(p + q) for j, q in enumerate(second) if q > -math.inf}
    assert sum(probability.values()) == pytest.approx(1)
    captions = generate(model, image.expand(draws, -1, -1, -1), few, max_new_tokens=2, temperature=1.0)
    likely = {caption: p for caption, p in probability.items() if draws * p >= 5}
    assert len(likely) > 5
    chi_square = sum((captions.count(c) - draws * p) ** 2 / (draws * p) for c, p in likely.items())
    assert chi_square <= len(likely) + 5 * math.sqrt(2 * len(likely))


# Agreement


@pytest.mark.parametrize(
    "options",
    [
        {"text_position": "rope"},
        {"text_position": "learned"},
        {"text_position": "sinusoidal"},
        {"text_position": "rope", "qk_norm": True, "pooler_norm": True},
        {"text_norm": "layernorm", "text_feed_forward": "mlp", "text_position": "sinusoidal", "qk_norm": True},
    ],
)
def test_captions_equal_those_of_the_plain_computation(tok, options):
    captions, lengths = set(), set()
    cases = [{}, {}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 4, "repetition_penalty": 1.3}]
    for seed, rule in enumerate(cases):
        model, images = a_model(tok, seed, dropout=0.5, **options), some_images(5, seed)
        written = ids_of(generate(model.train(), images, tok, **rule))
        assert model.training
        model.eval()
        assert written == [greedily(model, image, tok, ROOM, **rule) for image in images]
        captions |= set(map(tuple, written))
        lengths |= set(map(len, written))
    assert len(captions) >= 8  # otherwise the comparison would prove little
    assert len(lengths) >= 3


@given(
    num_beams=st.integers(2, 4),
    length_penalty=st.sampled_from([-0.5, 0.0, 0.6, 1.0, 2.0]),
    rules=rules,
    scale=st.sampled_from([0.1, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_beam_search_equals_its_definition_in_plain_lists(few, num_beams, length_penalty, rules, scale, seed):
    rules = rules | {"min_new_tokens": min(rules["min_new_tokens"], few.vocab_size - 4)}
    model, images = a_model(few, seed), some_images(3, seed)
    with torch.no_grad():
        model.multimodal_decoder.head.weight *= scale  # a small scale makes the scores of beams nearly equal
        state = DecodingState(model, images, few, max_new_tokens=6, **rules)
        captions, scores = beam_search(state, num_beams=num_beams, length_penalty=length_penalty)
    for image, (row,), (score,) in zip(images, captions.tolist(), scores.tolist(), strict=True):
        expected_score, expected = with_beams(model, image, few, 6, num_beams, length_penalty, **rules)
        assert score == pytest.approx(expected_score)
        assert ids_of([few.decode(row)]) == [expected]


@pytest.mark.parametrize("length_penalty", [-0.5, 0.0, 0.7, 1.0, 3.0])
@pytest.mark.parametrize("min_new_tokens", [0, 2])
def test_a_beam_as_wide_as_the_number_of_captions_finds_the_best(few, length_penalty, min_new_tokens):
    model, images, longest = a_model(few, 3, text_position="learned"), some_images(2, 3), 4
    words = [i for i in range(few.vocab_size) if i not in (few.pad_id, few.eos_id, few.bos_id, few.cls_id)]
    whole = list(itertools.product(words, repeat=longest))
    with torch.no_grad():
        ids = torch.tensor([[few.bos_id, *caption[:-1]] for caption in whole])
        wide, narrow = (
            DecodingState(model, images, few, max_new_tokens=longest, min_new_tokens=min_new_tokens) for _ in range(2)
        )
        captions, scores = beam_search(wide, num_beams=few.vocab_size**longest, length_penalty=length_penalty)
        _, narrow_scores = beam_search(narrow, num_beams=2, length_penalty=length_penalty)
    results = zip(images, captions.tolist(), scores.tolist(), narrow_scores.tolist(), strict=True)
    for image, (row,), (score,), (narrow_score,) in results:
        with torch.no_grad():
            logits = model(image.expand(len(ids), -1, -1, -1), ids).logits  # [captions, 4, v]
        logits[..., [few.pad_id, few.bos_id, few.cls_id]] = -torch.inf
        log_p = logits.log_softmax(-1).tolist()
        every = {}
        for caption, p in zip(whole, log_p, strict=True):
            for end in range(min_new_tokens, longest):
                ended = (*caption[:end], few.eos_id)
                every[ended] = sum(p[i][token] for i, token in enumerate(ended)) / (end + 1) ** length_penalty
            every[caption] = sum(p[i][token] for i, token in enumerate(caption)) / longest**length_penalty
        assert len(every) == sum(len(words) ** n for n in range(min_new_tokens, longest + 1))
        best = max(every, key=every.__getitem__)
        assert ids_of([few.decode(row)]) == [list(best)]
        assert score == pytest.approx(every[best])
        assert narrow_score <= score + 1e-9


def test_a_very_large_repetition_penalty_prevents_avoidable_repetition(tok):
    for seed in range(5):
        written = ids_of(generate(a_model(tok, seed), some_images(4), tok, repetition_penalty=1e9, min_new_tokens=ROOM))
        assert all(len(set(caption)) == ROOM for caption in written)
    repeating = ids_of(generate(a_model(tok, 0), some_images(4), tok, min_new_tokens=ROOM))
    assert any(len(set(caption)) < ROOM for caption in repeating)  # without the penalty there is repetition


# Work


@pytest.mark.parametrize("search", [{}, {"num_beams": 3}, {"temperature": 1.0}])
def test_images_and_tokens_are_computed_once_and_ended_captions_are_dropped(tok, search):
    model, images, projected, read = a_model(tok, 5), some_images(8, 5), [], []
    for block in model.multimodal_decoder.blocks:
        block.cross_attention.kv.register_forward_hook(lambda _, inputs, output: projected.append(inputs[0].shape[0]))
    model.text_decoder.embedding.register_forward_hook(lambda _, inputs, output: read.append(inputs[0].shape))
    captions = ids_of(generate(model, images, tok, **search))
    assert projected == [8] * len(model.multimodal_decoder.blocks)
    assert {shape[1] for shape in read} == {1}
    rows = [shape[0] for shape in read]
    assert rows[0] == 8  # once for each image, not for each beam
    assert rows[-1] <= max(rows) // 2
    assert len(rows) == max(map(len, captions)) or "num_beams" in search


# Several captions, prefixes and draws


@settings(max_examples=20)
@given(
    n=st.integers(1, 4),
    rules=rules,
    words=st.integers(0, 3),
    seed=st.integers(0, 99),
    fixed=st.sampled_from([None, True]),
)
def test_what_is_drawn_for_an_image_depends_on_its_key_alone(tok, n, rules, words, seed, fixed):
    model, images = a_model(tok, seed), some_images(5, seed)
    options = {**rules, "temperature": 1.5, "top_k": 20, "prefix": " ".join(WORDS[:words])}
    keys = torch.arange(5) * 7 + seed
    with pytest.MonkeyPatch.context() as patch:
        if fixed:  # as on a GPU
            patch.setattr(generation, "DecodingState", partial(DecodingState, fixed_shapes=True))
        together, _ = generate_several(model, images, tok, options, num_captions=n, keys=keys)
        order = torch.randperm(5, generator=torch.Generator().manual_seed(seed)).tolist()
        again, _ = generate_several(model, images[order[:3]], tok, options, num_captions=n, keys=keys[order[:3]])
    assert again == [together[i] for i in order[:3]]
    assert all(len(some) == n for some in together)
    fewer, _ = generate_several(model, images, tok, options, num_captions=1, keys=keys)
    assert [some[:1] for some in together] == fewer
    begin = prefix_ids(tok, options["prefix"])
    for written in ids_of([caption for some in together for caption in some]):
        assert written[: len(begin)] == begin


@settings(max_examples=20)
@given(num_beams=st.integers(2, 4), words=st.integers(0, 2), scale=st.sampled_from([0.3, 1.0]), seed=st.integers(0, 99))
def test_the_captions_of_beam_search_are_its_best_in_order(few, num_beams, words, scale, seed):
    model, images = a_model(few, seed), some_images(3, seed)
    begin = prefix_ids(few, "a " * words)
    with torch.no_grad():
        model.multimodal_decoder.head.weight *= scale
        for fixed_shapes in (False, True):
            state = DecodingState(model, images, few, max_new_tokens=8, prefix=begin, fixed_shapes=fixed_shapes)
            captions, scores = beam_search(state, num_beams=num_beams, num_captions=num_beams)
            for image, rows, found in zip(images, captions.tolist(), scores.tolist(), strict=True):
                expected = all_of_beams(model, image, few, 8, num_beams, 1.0, begin)[:num_beams]
                written = [ids for row in rows if row[0] != few.pad_id for ids in ids_of([few.decode(row)])]
                assert written == [ids for _, ids in expected]
                assert found[: len(expected)] == pytest.approx([score for score, _ in expected])


@pytest.mark.parametrize("search", [{}, {"num_beams": 3}, {"temperature": 1e-6}])
def test_a_caption_continues_its_prefix_as_the_plain_computation_does(tok, search):
    model, images = a_model(tok, 4), some_images(4)
    for prefix in ("", "a", "the red fox"):
        begin = prefix_ids(tok, prefix)
        written = ids_of(generate(model, images, tok, prefix=prefix, **search))
        for image, ids in zip(images, written, strict=True):
            expected = list(begin)
            while len(expected) < ROOM and tok.eos_id not in expected:
                (log_p,) = next_log_probabilities(model, image, tok, [expected])
                expected.append(max(range(len(log_p)), key=log_p.__getitem__))
            if search.get("num_beams"):
                ((_, expected), *_) = all_of_beams(model, image, tok, ROOM, 3, 1.0, begin)
            assert ids == expected


# Use


def test_a_larger_max_new_tokens_does_not_change_how_a_caption_begins(tok, tmp_path):
    tok.save(tmp_path / "t.model")
    plain, model, images = Tokenizer(tmp_path / "t.model", context_length=CONTEXT), a_model(tok, 0), some_images(3)
    captions = generate(model, images, plain)
    assert captions == [plain.decode(ids) for ids in ids_of(generate(model, images, tok))]
    assert set("".join(captions)) <= set(" ⁇" + "".join(WORDS))
    long = ids_of(generate(model, images, tok))
    for count in (1, 2, 5):
        assert ids_of(generate(model, images, tok, max_new_tokens=count)) == [ids[:count] for ids in long]


def test_different_seeds_draw_different_captions(tok):
    model, images = a_model(tok, 0), some_images(3)
    assert len({tuple(generate(model, images, tok, temperature=2.0, seed=seed)) for seed in range(5)}) == 5


@pytest.mark.parametrize("search", [{}, {"num_beams": 3}, {"temperature": 1.0, "top_p": 0.9}])
def test_uint8_images_and_bfloat16_models_are_accepted(tok, search):
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    captions = generate(a_model(tok, 0).bfloat16(), images, tok, **search)
    assert all(ids_of(captions))


@pytest.mark.parametrize("search", [{}, {"num_beams": 3}, {"temperature": 1.0}])
def test_a_sharded_model_writes_the_captions_of_the_whole_model(tok, search):
    with process_group():
        models = []
        for sharded in (False, True):
            with torch.device("meta"):
                model = grr_coca_tiny(vocab_size=tok.vocab_size, context_length=CONTEXT).double()
            if sharded:
                shard_over(model, init_device_mesh("cpu", (1,)))
            initialize(model, torch.device("cpu"), seed=0)
            models.append(model)
        whole, sharded = models
        images = some_images(5)
        expected = generate(whole, images, tok, **search)
        assert generate(sharded, images, tok, **search) == expected
        with unsharded(sharded):
            assert generate(sharded, images, tok, **search) == expected


def test_the_mode_of_every_module_is_restored_after_an_error(tok):
    model = a_model(tok, 0).train()
    model.vision_encoder.eval()  # a frozen part
    before = [module.training for module in model.modules()]
    generate(model, some_images(2), tok, num_beams=2, max_new_tokens=2)
    assert [module.training for module in model.modules()] == before
    with pytest.raises(RuntimeError, match="channels"):
        generate(model, torch.zeros(2, 4, 32, 32, dtype=torch.float64), tok)
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"max_new_tokens": 0},
            "max_new_tokens must be from 1 to 13, what fits into context_length=16, got max_new_tokens=0",
        ),
        ({"max_new_tokens": 14}, "max_new_tokens must be from 1 to 13"),
        (
            {"max_new_tokens": 3, "min_new_tokens": 4},
            "min_new_tokens must be from 0 to max_new_tokens, got min_new_tokens=4, max_new_tokens=3",
        ),
        (
            {"prefix": "a red fox", "max_new_tokens": 3},
            "prefix must have fewer tokens than max_new_tokens, got 3 tokens",
        ),
        ({"num_beams": 0}, "num_beams must be at least 1, got num_beams=0"),
        ({"temperature": -1.0}, "temperature must be at least 0, got temperature=-1.0"),
        ({"temperature": math.nan}, "temperature must be at least 0"),
        (
            {"num_beams": 2, "temperature": 1.0},
            "beam search does not sample, got num_beams=2, temperature=1.0; leave one of them",
        ),
        ({"top_k": 5}, "top_k and top_p are for sampling, got top_k=5, top_p=None, .*; set temperature to 1.0"),
        ({"top_p": 0.5}, "top_k and top_p are for sampling"),
        ({"temperature": 1.0, "top_k": 0}, "top_k must be at least 1, got top_k=0; leave it out"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p must be above 0 and at most 1, got top_p=0.0; leave it out"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive, and above 1 to discourage repetition, got"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be at least 0, got no_repeat_ngram_size=-1"),
        ({"num_beams": 0, "max_new_tokens": 99}, "max_new_tokens must .*; num_beams must be at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused_by_generate(tok, arguments, message):
    with pytest.raises(ValueError, match=f"generate: {message}"):
        generate(a_model(tok, 0), some_images(1), tok, **arguments)


def test_more_distinct_tokens_than_the_vocabulary_has_are_refused(few):
    words = few.vocab_size - 4
    model, images = a_model(few, 0), some_images(2)
    written = ids_of(generate(model, images, few, min_new_tokens=words, no_repeat_ngram_size=1, num_beams=3))
    assert all(len(set(caption[:words])) == words for caption in written)
    rule = f"generate: min_new_tokens must be at most {words}, the words of the vocabulary"
    with pytest.raises(ValueError, match=rule):
        generate(model, images, few, min_new_tokens=words + 1, no_repeat_ngram_size=1)


@pytest.mark.parametrize("shape", [(3, 32, 32), (0, 3, 32, 32)])
def test_an_image_without_a_batch_and_an_empty_batch_are_refused(tok, shape):
    message = f"images must be [b, 3, h, w] with b >= 1, got {list(shape)}; for a single image, pass image."
    with pytest.raises(ValueError, match=re.escape(message)):
        generate(a_model(tok, 0), torch.zeros(shape, dtype=torch.float64), tok)


def test_another_models_tokenizer_is_refused(tok, few):
    rule = f"generate: the model has {tok.vocab_size} ids and the tokenizer {few.vocab_size}; use the tokenizer"
    with pytest.raises(ValueError, match=rule):
        generate(a_model(tok, 0), some_images(1), few)
