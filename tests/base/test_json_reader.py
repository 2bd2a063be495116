"""One reader of JSON: the standard library's values, and one typed error for all that cannot be used."""

import json
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.json_reader import (
    MOST_DEPTH,
    JsonError,
    parse_json,
    parse_json_object,
    read_json,
    read_json_lines,
    read_json_object,
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES, st.booleans())
@pytest.mark.slow
def test_values_are_those_of_the_standard_library(value, ascii_only):
    text = json.dumps(value, ensure_ascii=ascii_only, indent=1)
    assert parse_json(text, "here") == value
    assert parse_json(text.encode(), "here") == value


BROKEN = {
    '{"a": 1,}': "data.json:1: not JSON (Illegal trailing comma before end of object at character 8)",
    '{"a": 1,\n "b": NaN}': "data.json:2: JSON with NaN, which is no number of JSON (write null; at character 7)",
    "[1, -Infinity]": "data.json:1: JSON with -Infinity, which is no number of JSON (write null; at character 5)",
    "[1, 1e999]": "data.json:1: JSON with 1e999, which is no number of JSON (write null; at character 5)",
    '{"a": {"a": 1},\n"a": 2}': "data.json:2: JSON with the key 'a' twice in one object (again at character 1)",
    '[{"\\u0061": 1, "a": 2}]': "data.json:1: JSON with the key 'a' twice in one object (again at character 16)",
    '["[[{", ' + "7" * 5000 + "]": "data.json:1: JSON with a number of 5,000 digits (at most 4,300; at character 9)",
    '["good \\ud83d\\ude00, \\\\ud83d",\n "\\ud83d"]': (
        "data.json:2: half a character (a lone surrogate \\ud83d at character 3)"
    ),
    '["\ud800"]': "data.json:1: half a character (a lone surrogate U+D800 at character 3)",
    "[" * 201 + "]" * 201: "data.json:1: JSON that is nested more than 200 deep (at character 201)",
    '{"a":' * 100_000: "data.json:1: JSON that is nested more than 200 deep (at character 1001)",
    "": "data.json:1: not JSON (Expecting value at character 1)",
    "[1] [2]": "data.json:1: not JSON (Extra data at character 5)",
}


@pytest.mark.parametrize("text", BROKEN, ids=lambda text: text[:20])
def test_every_broken_rule_is_one_error_that_names_the_place(text):
    if "trailing" in BROKEN[text] and sys.version_info < (3, 13):
        expected = "data.json:1: not JSON (Expecting property name enclosed in double quotes at character 9)"
    else:
        expected = BROKEN[text]
    with pytest.raises(JsonError, match=f"^{re.escape(expected)}$"):
        parse_json(text, "data.json")


def test_what_a_process_of_this_program_wrote_may_hold_nan_and_is_no_deeper():
    assert parse_json('{"loss": NaN, "a": 1, "a": 2}', "metrics.jsonl", strict=False)["a"] == 2
    with pytest.raises(JsonError, match="nested more than 200 deep"):
        parse_json("[" * 300 + "]" * 300, "here", strict=False)
    with pytest.raises(JsonError, match="5,000 digits"):
        parse_json("7" * 5000, "here", strict=False)


def test_depth_up_to_the_limit_is_read_even_far_down_the_stack():
    def at_depth(calls: int) -> object:
        return at_depth(calls - 1) if calls else parse_json("[" * MOST_DEPTH + "]" * MOST_DEPTH, "here")

    assert at_depth(300) is not None


def test_bytes_have_to_be_utf8():
    assert parse_json(b'\xef\xbb\xbf{"a": 1}', "here") == {"a": 1}
    with pytest.raises(JsonError, match=r"^here:2: not UTF-8 at byte 3 \(0xe9\)"):
        parse_json(b'["\n\xe9"]', "here")
    with pytest.raises(JsonError, match=r"^here:1: not UTF-8 at byte 0"):
        parse_json('{"a": 1}'.encode("utf-16"), "here")


def test_lines_are_numbered_and_end_at_line_feeds_only(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": "\u2028"}\n\n  \r\n{"a": 2}\r\n{"b": }\n', encoding="utf-8")
    lines = read_json_lines(path)
    assert [next(lines), next(lines)] == [{"a": "\u2028"}, {"a": 2}]
    with pytest.raises(JsonError, match=r"lines.jsonl:5: not JSON \(Expecting value at character 7\)$"):
        next(lines)


def test_an_object_is_asked_for(tmp_path):
    path = tmp_path / "object.json"
    for text, kind in (("[1]", "a list"), ("null", "null"), ("true", "true"), ('"x"', "a text"), ("1.5", "a number")):
        path.write_text(text)
        with pytest.raises(JsonError, match=f"object.json:1: is {kind}, not an object$"):
            read_json_object(path)
        with pytest.raises(JsonError, match=f"^line:7: is {kind}, not an object$"):
            parse_json_object(text, "line", line=7)
        assert read_json(path) == json.loads(text)


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "large.json"
    path.write_text(json.dumps(["x" * 100]))
    monkeypatch.setattr("dstrain.base.json_reader.MOST_BYTES", 50)
    with pytest.raises(JsonError, match=r"JSON of 104 bytes, more than 50"):
        read_json(path)
    with pytest.raises(JsonError, match=r"large.json:1: a line of more than 50 bytes"):
        list(read_json_lines(path))
