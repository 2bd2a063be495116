import json
from pathlib import Path

import pytest
from data_support import write_small_tokenizer

from dstrain.data.tokens import load_document_tokenizer
from dstrain.errors import CorpusError


def test_a_document_stands_between_cls_and_sep(tmp_path: Path) -> None:
    encoder = load_document_tokenizer(write_small_tokenizer(tmp_path))
    assert encoder.encode("The cats sat.").tolist() == [2, 5, 7, 13, 9, 18, 3]
    assert encoder.encode("").tolist() == encoder.encode(" \n").tolist() == []
    assert [ids.tolist() for ids in encoder.encode_many(["a", "", "dog"])] == [[2, 6, 3], [], [2, 8, 3]]
    assert (encoder.vocab_size, encoder.cls_id, encoder.sep_id, encoder.mask_id, encoder.pad_id) == (19, 2, 3, 4, 0)
    assert encoder.vocabulary.special_ids == (0, 1, 2, 3, 4)
    assert encoder.decode(encoder.encode("the dog")) == "[CLS] the dog [SEP]"


def test_pieces_that_go_on_with_a_word(tmp_path: Path) -> None:
    assert load_document_tokenizer(write_small_tokenizer(tmp_path)).continuing_ids().tolist() == [13], "##s"
    path = tmp_path / "tokenizer.json"
    names = ["[PAD]", "[MASK]", "[CLS]", "[SEP]", "Ġa", "b", "Ġ", "Ċ", "c"]
    pieces = {name: number for number, name in enumerate(names)}
    content = json.loads(path.read_text()) | {"model": {"type": "BPE", "vocab": pieces, "merges": []}}
    path.write_text(json.dumps(content))
    encoder = load_document_tokenizer(tmp_path)
    special = encoder.vocabulary.special_ids
    assert [number for number in encoder.continuing_ids().tolist() if number not in special] == [5, 8], "b and c"
    content["model"]["vocab"] = {piece.translate({ord("Ġ"): "x", ord("Ċ"): "y"}): n for piece, n in pieces.items()}
    path.write_text(json.dumps(content))
    with pytest.raises(CorpusError, match=r"data\.masking\.unit: .* use token"):
        load_document_tokenizer(tmp_path).continuing_ids()


def test_roberta_roles(tmp_path: Path) -> None:
    encoder = load_document_tokenizer(write_small_tokenizer(tmp_path, cls="<s>", sep="</s>", mask="<mask>"))
    assert encoder.encode("dog").tolist() == [2, 8, 3]


def test_roles_from_special_tokens_map_and_from_added_token_objects(tmp_path: Path) -> None:
    reference = load_document_tokenizer(write_small_tokenizer(tmp_path))
    roles = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({role: {"content": token, "lstrip": True} for role, token in roles.items()})
    )
    assert load_document_tokenizer(tmp_path).vocabulary == reference.vocabulary
    assert load_document_tokenizer(tmp_path).digest == reference.digest


def test_bos_and_eos_serve_where_there_is_no_cls_and_sep(tmp_path: Path) -> None:
    write_small_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(path.read_text().replace("cls_token", "bos_token").replace("sep_token", "eos_token"))
    assert load_document_tokenizer(tmp_path).encode("dog").tolist() == [2, 8, 3]


def test_truncation_in_the_file_cuts_no_document(tmp_path: Path) -> None:
    reference = load_document_tokenizer(write_small_tokenizer(tmp_path))
    reference.tokenizer.enable_truncation(4)
    reference.tokenizer.enable_padding(length=50)
    reference.tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder = load_document_tokenizer(tmp_path)
    assert len(encoder.encode("dog " * 30)) == 32
    assert encoder.digest == reference.digest


def test_the_digest_follows_what_decides_ids(tmp_path: Path) -> None:
    digest = load_document_tokenizer(write_small_tokenizer(tmp_path)).digest
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content, indent=7, sort_keys=True))
    assert load_document_tokenizer(tmp_path).digest == digest
    content["normalizer"] = None
    path.write_text(json.dumps(content))
    assert load_document_tokenizer(tmp_path).digest != digest


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"no tokenizer.json there"):
        load_document_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CorpusError, match="not a tokenizer"):
        load_document_tokenizer(tmp_path)
    write_small_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "[PAD]"}')
    with pytest.raises(CorpusError, match=r"no mask_token in tokenizer_config.json or special_tokens_map.json"):
        load_document_tokenizer(tmp_path)
