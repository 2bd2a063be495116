"""Tagged words: windows own each token once, pieces find their words, and entities are scored as the field does."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled import write_examples

from dstrain.data.tokens import load_document_tokenizer
from dstrain.errors import CorpusError
from dstrain.recipe.data import TokenClassificationData
from dstrain.tasks.tags import entities, pieces_of_spans, pieces_of_words, read_sentences, shown_tags, tag_scores
from dstrain.tasks.windows import windows


@settings(deadline=None)
@given(st.integers(0, 500), st.integers(1, 40), st.integers(0, 20))
def test_every_token_is_owned_once_where_most_is_around_it(tokens: int, advance: int, stride: int) -> None:
    found = windows(tokens, advance + stride, stride)
    owners = [(at, number) for number, one in enumerate(found) for at in range(one.first, one.last)]
    assert [at for at, _ in owners] == list(range(tokens))
    for at, number in owners:
        around = [
            min(at - one.start if one.start else 999, one.stop - 1 - at if one.stop < tokens else 999) for one in found
        ]
        own = around[number]
        assert found[number].start <= at < found[number].stop
        assert own >= max(near for near, one in zip(around, found, strict=True) if one.start <= at < one.stop) - 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_examples(tmp_path_factory.mktemp("tags"))


def test_a_word_is_known_by_its_first_piece(folder: Path) -> None:
    encoder = load_document_tokenizer(folder / "tokenizer")
    words = ["red", "\u200b", "skyleaf", "好", "of"]
    (found,) = pieces_of_words(encoder, [words], " ")
    pieces = [encoder.tokenizer.id_to_token(int(number)) for number in found.ids]
    assert found.words.tolist() == [0, 2, 3, 4]  # of the second word nothing is left
    assert [pieces[place] for place in found.first_pieces][::3] == ["red", "of"]
    assert pieces[found.first_pieces[1]].startswith("s")
    assert len(found.ids) > 4
    (unspaced,) = pieces_of_spans(encoder, ["red sky"], [[(0, 3), (4, 7)]])
    assert unspaced.words.tolist() == [0, 1]


def test_windows_of_a_long_text_own_each_word_once(folder: Path) -> None:
    encoder = load_document_tokenizer(folder / "tokenizer")
    (found,) = pieces_of_words(encoder, [["red", "green", "skyleaf"] * 9], " ")
    owned = []
    for ids, window in found.windows(encoder, 12, 4):
        assert len(ids) <= 12 and (ids[0], ids[-1]) == (encoder.cls_id, encoder.sep_id)
        words, places = found.owned(window)
        owned += words.tolist()
        assert ids[places].tolist() == found.ids[found.first_pieces[words]].tolist()
    assert owned == list(range(27))


def test_entities_of_every_scheme() -> None:
    assert entities(["B-a", "I-a", "O", "I-b", "B-b", "B-a"]) == [(0, 2, "a"), (3, 4, "b"), (4, 5, "b"), (5, 6, "a")]
    assert entities(["B-a", "I-a", "E-a", "S-a", "S-b"]) == [(0, 3, "a"), (3, 4, "a"), (4, 5, "b")]
    assert entities(["B-a", "M-a", "E-a", "S-a", "O"]) == [(0, 3, "a"), (3, 4, "a")]


@settings(deadline=None)  # the first example imports seqeval
@given(st.lists(st.sampled_from(["O", "B-a", "I-a", "E-a", "S-a", "B-b", "I-b", "E-b", "S-b"]), max_size=12))
def test_entities_are_those_of_seqeval(tags: list[str]) -> None:
    from seqeval.metrics.sequence_labeling import get_entities

    assert entities(tags) == [(first, last + 1, kind) for kind, first, last in get_entities(tags)]


def test_scores_of_entities_and_of_tokens() -> None:
    true = [["B-a", "M-a", "E-a", "O"], ["S-b", "O"]]
    predicted = [["B-a", "M-a", "E-a", "S-b"], ["O", "O"]]
    tags = ["O", *(f"{prefix}-{kind}" for kind in "ab" for prefix in "BMES")]
    scores = tag_scores(true, predicted, tags)
    assert (scores["precision"], scores["recall"], scores["f1"]) == (0.5, 0.5, 0.5)
    assert scores["token_accuracy"] == pytest.approx(4 / 6)
    assert scores["report"]["entities"]["a"] == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "entities": 1}
    rows = {line.split()[0]: line.split() for line in scores["report"]["token_report"].splitlines() if line.strip()}
    assert rows["O"] == ["O", "0.500", "0.500", "0.500", "2"]
    assert [each["badness"] for each in scores["judged"]] == [1, 1], "one was invented, one missed"
    assert shown_tags(["x", "y", "z"], ["B-a", "O", "S-b"]) == "x/B-a z/S-b"
    nothing = tag_scores([["O"]], [["O"]], ["O"])
    assert (nothing["f1"], nothing["report"]["entities"]) == (0.0, {})


def test_tags_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    lines = [
        {"tokens": ["x"], "tags": ["B-a"]},
        {"tokens": ["x", "y"], "tags": ["O"]},
        {"tokens": ["x"], "tags": ["M-a"]},
    ]
    lines += [{"tokens": [], "tags": []}, {"tokens": "x", "tags": ["O"]}]
    train, valid = tmp_path / "train.jsonl", tmp_path / "valid.jsonl"
    train.write_text("".join(json.dumps(line) + "\n" for line in lines))
    valid.write_text('{"tokens": ["x"], "tags": ["B-aa"]}\n')
    section = TokenClassificationData(train=str(train), valid=str(valid), sequence_length=16, on_bad_example="stop")
    with pytest.raises(CorpusError) as error:
        read_sentences(section)
    assert str(error.value).splitlines() == [
        f"{train}:2: has 2 tokens and 1 tags; give each token one tag",
        f"{train}:3: the tag 'M-a' is not of the scheme BIO, whose tags are O and B-TYPE, I-TYPE; set data.scheme, or "
        "correct the tag",
        f"{train}:4: tokens is empty; write the tokens, or drop the line",
        f"{train}:5: tokens is 'x', not a list of texts; write [a, b]",
        "data.on_bad_example=drop leaves them out, and counts them",
    ]
    train.write_text('{"tokens": ["x"], "tags": ["B-a"]}\n')
    with pytest.raises(
        CorpusError, match=r"valid\.jsonl:1: the type 'aa' of B-aa does not occur in \S+; did you mean 'a'"
    ):
        read_sentences(section)
    valid.write_text('{"tokens": ["y"], "tags": ["I-a"]}\n')
    tags, splits, _ = read_sentences(section)
    assert (tags, len(splits.valid)) == (["O", "B-a", "I-a"], 1)
