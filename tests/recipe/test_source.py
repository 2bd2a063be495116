from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.errors import RecipeError
from dstrain.recipe.source import Node, Place, parse_scalar, parse_yaml, read_yaml

START = Place("r.yaml", 1)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1e6", 1e6),
        ("1.5", 1.5),
        (".5", 0.5),
        ("-2", -2),
        ("100_000", 100_000),
        ("true", True),
        ("false", False),
        ("null", None),
        ("~", None),
        ("", None),
        *((word, word) for word in ("no", "yes", "on", "off", "True", "NULL", "1:30", "0x10", "0o17", "017", "1_")),
        *((word, word) for word in (".inf", ".nan", "1e999", "2024-01-01", "1__0", "bf16", "--1")),
    ],
)
def test_unquoted_scalars_mean_one_thing(text: str, value: object) -> None:
    found = parse_scalar(text)
    assert found == value
    assert type(found) is type(value)


@given(st.integers())
def test_integers_are_read_back(number: int) -> None:
    assert parse_scalar(str(number)) == number
    assert parse_scalar(f"{number:_}") == number


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_are_read_back_exactly(number: float) -> None:
    assert parse_scalar(repr(number)) == number


def test_every_value_knows_its_line() -> None:
    tree, problems = parse_yaml("a: 1\nb:\n  c: x\n  d:\n  - 1\n  - 2\n", START)
    assert problems == []
    assert isinstance(tree.value, dict)
    section = tree.value["b"]
    assert isinstance(section.value, dict)
    assert section.value["c"].place.line == 3
    assert section.value["d"].place.line == 4
    assert isinstance(section.value["d"].value, list)
    assert [item.place.line for item in section.value["d"].value] == [5, 6]


def test_quotes_make_text() -> None:
    tree, _ = parse_yaml("{a: \"3e-4\", b: 'true', c: 3e-4}", START)
    assert tree.plain() == {"a": "3e-4", "b": "true", "c": 3e-4}


def test_duplicate_keys_name_both_lines() -> None:
    _, problems = parse_yaml("a: 1\nb: 2\na: 3\nc: {d: 1, d: 2}\n", START)
    assert [str(problem) for problem in problems] == [
        "r.yaml:3: the key 'a' is already set on line 1; delete one of the two",
        "r.yaml:4: the key 'd' is already set on line 4; delete one of the two",
    ]


@pytest.mark.parametrize("text", ["a: !!int 3", "a: !x {b: 1}", "a: !!python/object:os.system [ls]"])
def test_tags_are_refused(text: str) -> None:
    _, problems = parse_yaml(text, START)
    assert len(problems) == 1
    assert "is not allowed; write the plain value" in problems[0].text


def test_merge_keys_are_refused_with_a_remedy() -> None:
    _, problems = parse_yaml("a: &x {b: 1}\nc:\n  <<: *x\n", START)
    assert [str(problem) for problem in problems] == [
        "r.yaml:3: merge keys `<<` are not supported; inherit with `base:` instead"
    ]


def test_aliases_repeat_a_value() -> None:
    tree, problems = parse_yaml("a: &x [1, 2]\nb: *x\n", START)
    assert problems == []
    assert tree.plain() == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize(
    "text",
    [
        "a: &x {b: *x}",
        "\n".join(["a0: &a0 [1, 1]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9))]),
    ],
    ids=["recursive", "exponential"],
)
def test_endless_aliases_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="alias"):
        parse_yaml(text, START)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", 3),
        ("a: 1\n\tb: 2\n", 2),
        ("a: *nowhere\n", 1),
        ("a: 'x\n", 2),
        ("a: 1\nb: \x07\n", 2),
    ],
)
def test_a_syntax_error_is_one_line_with_its_place(text: str, line: int) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_yaml(text, START)
    assert str(caught.value).startswith(f"r.yaml:{line}: not valid YAML:")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_absurd_nesting_is_refused() -> None:
    with pytest.raises(RecipeError, match="nested too deeply"):
        parse_yaml("a: " + "[" * 1200, START)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the recipe is empty"),
        (b"- 1\n", "the recipe is not a mapping"),
        (b"a: \xff\n", "is not UTF-8 text"),
        (b"a: 1\n---\nb: 2\n", "not valid YAML"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        read_yaml(str(path))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: cannot be read: No such file"):
        read_yaml(str(tmp_path / "nowhere.yaml"))


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbfname: x\n")
    tree, _ = read_yaml(str(path))
    assert tree.plain() == {"name": "x"}


def test_plain_returns_json_types() -> None:
    node = Node({"a": Node([Node(1, START)], START)}, START)
    assert node.plain() == {"a": [1]}
