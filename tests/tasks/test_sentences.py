"""Sentences: how texts are split and read, and which of them are most like a summary."""

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from labelled import write_examples
from rouge_score.rouge_scorer import RougeScorer

from dstrain.data.tokens import Encoder, load_encoder
from dstrain.tasks.sentence_extraction import NO_SENTENCE, SentenceFinder
from dstrain.tasks.sentences import best, joined, marked_texts, most_alike, sentences_of

WORDS = ["red", "green", "blue", "apple", "leaf", "sky", "of", "the"]
sentence = st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return load_encoder(write_examples(tmp_path_factory.mktemp("sentences")) / "tokenizer")


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two.", ("One.", "Two.")),
        (" Version 2.5 works!  Yes.\nNo?", ("Version 2.5 works!", "Yes.", "No?")),
        ("第一句。第二句！", ("第一句。", "第二句！")),
        ("no stop at all", ("no stop at all",)),
    ],
)
def test_a_text_is_split_behind_its_full_stops(text: str, sentences: tuple[str, ...]) -> None:
    assert sentences_of(text) == sentences


def test_chinese_sentences_are_joined_without_spaces() -> None:
    assert joined(["第一句。", "第二句！"], "zh") == "第一句。第二句！"
    assert joined(["One.", "Two.\n\n"], "en") == "One. Two."


@given(st.lists(sentence, min_size=1, max_size=6), st.integers(3, 30))
def test_each_sentence_that_fits_begins_at_its_mark(encoder: Encoder, sentences: list[str], length: int) -> None:
    (text,) = marked_texts(encoder, [sentences], length)
    assert 0 < len(text.ids) <= length and 0 < len(text.marks) <= len(sentences)
    assert (text.ids[text.marks] == encoder.cls_id).all() and (text.ids == encoder.cls_id).sum() == len(text.marks)
    parts = np.split(text.ids, text.marks[1:])
    for number, (part, one) in enumerate(zip(parts, sentences, strict=False)):
        whole = encoder.tokenizer.encode(one, add_special_tokens=False).ids
        assert part[1:-1].tolist() == (whole[: length - 2] if number == 0 else whole)
        assert part[-1] == encoder.sep_id
    if len(parts) < len(sentences):
        following = encoder.tokenizer.encode(sentences[len(parts)], add_special_tokens=False).ids
        assert len(text.ids) + len(following) + 2 > length, "it would have fitted"


def test_texts_of_a_batch_do_not_mix(encoder: Encoder) -> None:
    texts = [["red apple", "blue sky"], ["the leaf"], ["sky of the apple", "green", "red"]]
    together = marked_texts(encoder, texts, 40)
    for text, alone in zip(together, (marked_texts(encoder, [one], 40)[0] for one in texts), strict=True):
        assert text.ids.tolist() == alone.ids.tolist() and text.marks.tolist() == alone.marks.tolist()


def likeness(text: str, summaries: list[str]) -> float:
    scorer = RougeScorer(["rouge1", "rouge2"])
    return max(sum(score.fmeasure for score in scorer.score(one, text).values()) for one in summaries)


@given(st.lists(sentence, min_size=1, max_size=5), st.lists(sentence, min_size=1, max_size=2))
def test_one_sentence_is_the_one_with_most_rouge(sentences: list[str], summaries: list[str]) -> None:
    """Pairs of words are those of rouge-score but where two sentences meet, so one sentence can be compared."""
    chosen = most_alike(sentences, summaries, 1, "en")
    scores = [likeness(one, summaries) for one in sentences]
    assert scores[chosen[0]] == pytest.approx(max(scores)) if chosen else max(scores) == 0


@given(st.lists(sentence, min_size=1, max_size=5), sentence, st.integers(1, 4))
def test_every_further_sentence_makes_it_more_alike(sentences: list[str], summary: str, count: int) -> None:
    found = [most_alike(sentences, [summary], k, "en") for k in range(1, count + 1)]
    assert all(set(less) <= set(more) for less, more in pairwise(found)), "chosen one by one"
    assert all(len(chosen) <= k and chosen == sorted(set(chosen)) for k, chosen in enumerate(found, start=1))


def test_the_choice_of_two_is_close_to_the_best_of_all_pairs() -> None:
    sentences = ["the red apple fell", "nothing of that", "a leaf is green", "blue sky", "the red apple"]
    summary = "the red apple fell and a leaf is green"
    best_pair = max(combinations(range(5), 2), key=lambda two: likeness(" ".join(sentences[k] for k in two), [summary]))
    assert tuple(most_alike(sentences, [summary], 2, "en")) == best_pair == (0, 2)
    assert most_alike(["第一个苹果。", "蓝色的天空。"], ["天空是蓝色的"], 1, "zh") == [1]
    assert most_alike(["one", "two"], ["three"], 1, "en") == []


def test_the_best_are_in_the_order_of_the_text() -> None:
    assert best(np.array([0.5, 2.0, -1.0, 2.0]), 1) == [1]
    assert best(np.array([0.5, 2.0, -1.0, 2.0]), 3) == [0, 1, 3]
    assert best(np.array([0.5]), 3) == [0]


def test_the_loss_is_a_softmax_over_the_sentences_of_a_text(encoder: Encoder) -> None:
    from transformers import BertConfig, BertForTokenClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    finder = SentenceFinder(BertForTokenClassification(BertConfig(vocab_size=128, num_labels=1, **sizes))).eval()
    ids = torch.randint(5, 128, (3, 9))
    mask = torch.ones_like(ids)
    labels = torch.full((3, 9), NO_SENTENCE)
    labels[0, [0, 4, 7]] = torch.tensor([0.0, 0.5, 0.5])
    labels[1, [0, 3]] = torch.tensor([1.0, 0.0])
    labels[2, [0, 5]] = 0.0  # nothing is right
    loss, right = finder(input_ids=ids, attention_mask=mask, labels=labels)
    logits = finder.model(input_ids=ids, attention_mask=mask).logits[..., 0]
    first, second = logits[0, [0, 4, 7]].log_softmax(0), logits[1, [0, 3]].log_softmax(0)
    assert loss.item() == pytest.approx(-(first[1] / 2 + first[2] / 2 + second[0]).item(), rel=1e-5)
    assert right.item() == int(first.argmax() > 0) + int(second.argmax() == 0)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in finder.parameters() if p.grad is not None)
