"""Sentences: how texts are split and read, and which of them are most like a summary."""

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from labelled import write_examples
from rouge_score.rouge_scorer import RougeScorer

from dstrain.data.tokens import DocumentTokenizer, load_document_tokenizer
from dstrain.tasks.sentence_extraction import NO_SENTENCE, SentenceFinder
from dstrain.tasks.sentences import (
    NO_SCORE,
    best,
    joined,
    most_alike,
    padded_sentences,
    sentence_scores,
    sentences_of,
    split_texts,
)

WORDS = ["red", "green", "blue", "apple", "leaf", "sky", "of", "the"]
sentence = st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> DocumentTokenizer:
    return load_document_tokenizer(write_examples(tmp_path_factory.mktemp("sentences")) / "tokenizer")


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
def test_a_text_is_read_as_one_and_each_token_knows_its_sentence(
    encoder: DocumentTokenizer, sentences: list[str], length: int
) -> None:
    (text,) = split_texts(encoder, [sentences], length)
    assert 2 <= len(text.ids) == len(text.sentences) <= length and 0 < text.count <= len(sentences)
    assert (text.ids[0], text.ids[-1]) == (encoder.cls_id, encoder.sep_id)
    assert (text.sentences[[0, -1]] == -1).all() and (text.sentences[1:-1] >= 0).all()
    wholes = [encoder.tokenizer.encode(one, add_special_tokens=False).ids for one in sentences]
    for number in range(text.count):
        part = text.ids[text.sentences == number].tolist()
        assert part == (wholes[0][: length - 2] if number == 0 else wholes[number])
    assert (np.diff(text.sentences[1:-1]) >= 0).all()
    if text.count < len(sentences):
        assert len(text.ids) + len(wholes[text.count]) > length, "it would have fitted"


def test_texts_of_a_batch_do_not_mix(encoder: DocumentTokenizer) -> None:
    texts = [["red apple", "blue sky"], ["the leaf"], ["sky of the apple", "green", "red"]]
    together = split_texts(encoder, texts, 40)
    for text, alone in zip(together, (split_texts(encoder, [one], 40)[0] for one in texts), strict=True):
        assert text.ids.tolist() == alone.ids.tolist() and text.sentences.tolist() == alone.sentences.tolist()
    batch = padded_sentences(together, 16)
    assert [row[row >= 0].tolist() for row in batch] == [one.sentences[one.sentences >= 0].tolist() for one in together]


@given(st.lists(st.lists(st.floats(-5, 5, width=32), max_size=4), min_size=1, max_size=5), st.integers(0, 3))
def test_the_score_of_a_sentence_is_the_mean_of_its_tokens(of_tokens: list[list[float]], padding: int) -> None:
    numbers = [number for number, own in enumerate(of_tokens) for _ in own]
    logits = torch.tensor([[9.0, *(value for own in of_tokens for value in own), 9.0, *[9.0] * padding]])
    sentences = torch.tensor([[-1, *numbers, -1, *[-1] * padding]])
    (scores,) = sentence_scores(logits, sentences, len(of_tokens))
    expected = [np.mean(own) if own else NO_SCORE for own in of_tokens]
    assert scores.tolist() == pytest.approx(expected, abs=1e-5, rel=1e-5)


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


def test_the_loss_is_a_softmax_over_the_sentences_of_a_text(encoder: DocumentTokenizer) -> None:
    from transformers import BertConfig, BertForTokenClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    finder = SentenceFinder(BertForTokenClassification(BertConfig(vocab_size=128, num_labels=1, **sizes))).eval()
    ids = torch.randint(5, 128, (3, 9))
    mask = torch.ones_like(ids)
    sentences = torch.tensor([[-1, 0, 0, 1, 2, 2, 2, 2, -1], [-1, 0, 1, 1, 1, -1, -1, -1, -1], [-1, *[0] * 7, -1]])
    labels = torch.tensor([[0.0, 0.5, 0.5], [1.0, 0.0, NO_SENTENCE], [0.0, NO_SENTENCE, NO_SENTENCE]])
    loss, right = finder(input_ids=ids, attention_mask=mask, labels=labels, sentences=sentences)
    logits = finder.model(input_ids=ids, attention_mask=mask).logits[..., 0]
    first = torch.stack([logits[0, 1:3].mean(), logits[0, 3], logits[0, 4:8].mean()]).log_softmax(0)
    second = torch.stack([logits[1, 1], logits[1, 2:5].mean()]).log_softmax(0)
    assert loss.item() == pytest.approx(-(first[1] / 2 + first[2] / 2 + second[0]).item(), rel=1e-5)
    assert right.item() == int(first.argmax() > 0) + int(second.argmax() == 0)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in finder.parameters() if p.grad is not None)
