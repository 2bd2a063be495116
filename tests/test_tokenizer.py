"""Tokenizer training: the same bytes each time, a folder that Transformers loads, and every wrong input named."""

import json
from argparse import Namespace
from collections import Counter
from pathlib import Path

import pytest

from dstrain.corpus.train_tokenizer import (
    COMMON_ALPHABET,
    choose_alphabet,
    sampled_texts,
    train_command,
    train_wordpiece,
)
from dstrain.errors import CorpusError

WORDS = ["reader", "readers", "reading", "shard", "shards", "sharding", "naïve", "token", "tokens", "tokenizer"]
TEXTS = [
    f"The {first} of {second}s; {number % 7} {third}!"
    for number, (first, second, third) in enumerate((a, b, c) for a in WORDS for b in WORDS for c in WORDS[:3])
]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def arguments(
    sources: list[Path], out: Path, vocab_size: int = 86, lowercase: bool = True, field: str = "text"
) -> Namespace:
    return Namespace(
        field=field,
        sources=[str(source) for source in sources],
        out=str(out),
        vocab_size=vocab_size,
        kind="wordpiece",
        lowercase=lowercase,
    )


def test_the_same_texts_give_the_same_bytes(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    for out in ("one", "two", "three"):
        assert train_command(arguments([source], tmp_path / out)) == 0
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"]
    for name in files:
        assert (
            (tmp_path / "one" / name).read_bytes()
            == (tmp_path / "two" / name).read_bytes()
            == (tmp_path / "three" / name).read_bytes()
        )


@pytest.mark.parametrize("lowercase", [True, False])
def test_transformers_loads_the_folder_as_a_fast_bert_tokenizer(tmp_path: Path, lowercase: bool) -> None:
    from transformers import AutoTokenizer, BertTokenizer

    train_command(arguments([write_jsonl(tmp_path / "texts.jsonl", TEXTS)], tmp_path / "out", lowercase=lowercase))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert isinstance(tokenizer, BertTokenizer) and tokenizer.is_fast
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(tokenizer) == 128  # 86 padded to a multiple of 64
    encoded = tokenizer("The naïve reader", "of shards")
    assert tokenizer.convert_ids_to_tokens(encoded["input_ids"]) == (
        ["[CLS]", "the", "naive", "reader", "[SEP]", "of", "shards", "[SEP]"]
        if lowercase
        else ["[CLS]", "The", "naïve", "reader", "[SEP]", "of", "shards", "[SEP]"]
    )
    assert encoded["token_type_ids"] == [0, 0, 0, 0, 0, 1, 1, 1]
    assert (tokenizer.mask_token_id, tokenizer.pad_token_id, tokenizer.sep_token_id) == (4, 0, 3)
    vocabulary = (tmp_path / "out" / "vocab.txt").read_text().splitlines()
    assert vocabulary[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] and vocabulary[-1] == "[unused41]"
    assert tokenizer.get_vocab() == {token: number for number, token in enumerate(vocabulary)}


def test_rare_characters_are_unknown_and_a_mask_is_one_token() -> None:
    tokenizer = train_wordpiece(TEXTS, 86)
    assert tokenizer.encode("reader \N{SNOWMAN} [MASK]").tokens == ["[CLS]", "reader", "[UNK]", "[MASK]", "[SEP]"]


def test_thousands_of_chinese_characters_stay_and_a_handful_of_strays_do_not() -> None:
    common = {chr(0x4E00 + number): 5000 // (1 + number // 10) for number in range(3000)}
    letters = Counter(common | {chr(0xAC00 + number): 1 for number in range(100)} | {" ": 10**6})
    alphabet = choose_alphabet(letters, 10_000)
    assert len(alphabet) > COMMON_ALPHABET and set(alphabet) <= common.keys()
    assert sum(letters[c] for c in alphabet) >= 0.9995 * (letters.total() - letters[" "])
    assert len(choose_alphabet(Counter({chr(0x4E00 + number): 1 for number in range(20)}), 10_000)) == 20
    assert len(choose_alphabet(letters, 1500)) == 1500 - 5  # as many as there is room for


def test_another_field_is_read_where_it_is_named(tmp_path: Path) -> None:
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    assert train_command(arguments([source], tmp_path / "out", field="body")) == 0
    with pytest.raises(CorpusError, match="or name the field with --field"):
        train_command(arguments([source], tmp_path / "out"))


def test_a_large_source_is_sampled_from_all_its_parts(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [f"{number:04d}" for number in range(1000)])
    sample = sampled_texts([path], "text", sample_bytes=path.stat().st_size // 10)
    assert sample == [f"{number:04d}" for number in range(0, 1000, 10)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "fine"}\n{"body": "x"}\n', r"texts\.jsonl:2: "),
        (b"", r"no text in the sources"),
        (b'{"text": "  "}\n', r"no text in the sources"),
    ],
)
def test_sources_without_text_are_named_and_nothing_is_written(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "texts.jsonl").write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        train_command(arguments([tmp_path / "texts.jsonl"], tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_that_is_too_small_or_cannot_be_filled_is_refused_with_the_limit() -> None:
    with pytest.raises(CorpusError, match=r"too small .* give at least (\d+)") as small:
        train_wordpiece(TEXTS, 10)
    least = int(str(small.value).rsplit(" ", 1)[1])
    train_wordpiece(TEXTS, least)
    with pytest.raises(CorpusError, match=r"more than .* give at most (\d+)") as large:
        train_wordpiece(TEXTS, 100_000)
    train_wordpiece(TEXTS, int(str(large.value).rsplit(" ", 1)[1]))


def test_an_unwritable_place_is_a_user_error(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    with pytest.raises(CorpusError, match="choose a folder"):
        train_command(arguments([source], source))
