"""The embedded corpus: what is kept of a docstring, how the budget is shared, and that nothing held out leaks."""

import csv
import json
from argparse import Namespace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.corpus.docstrings import (
    Docstring,
    Harvest,
    clean,
    docstrings_of,
    harvest,
    installed_sources,
    is_prose,
    share_evenly,
    sources_under,
    within_budget,
    write_corpus,
)
from dstrain.corpus.labels import labelled_split, names_removed
from dstrain.errors import CorpusError

PROSE = "This function reads the sensor at place {} and returns the temperature that it has measured there, in kelvin."


def package_tree(root: Path, packages: int = 3, modules: int = 8, functions: int = 6) -> Path:
    for package in range(packages):
        for module in range(modules):
            path = root / f"package{package}" / f"module{module}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(
                "\n".join(
                    f'def f{number}():\n    """{PROSE.format(f"{package} {module} {number}")}"""'
                    for number in range(functions)
                )
            )
    return root


def test_docstrings_are_found_by_their_qualified_names_without_importing() -> None:
    source = b'''"""Module."""
raise SystemExit("imported")
class Outer:
    """Outer."""
    def method(self):
        """Method."""
        def hidden():
            """Hidden."""
if True:
    async def branch():
        """Branch."""
else:
    try:
        pass
    except ValueError:
        class Rescue:
            """Rescue."""
'''
    assert list(docstrings_of(source)) == [
        ("", "Module."),
        ("Outer", "Outer."),
        ("Outer.method", "Method."),
        ("branch", "Branch."),
        ("Rescue", "Rescue."),
    ]


def test_cleaning_keeps_prose_and_drops_markup() -> None:
    docstring = """Return the :class:`~torch.nn.Module` of ``name`` or :ref:`none <glossary>`.

    Parameters
    ----------
    name : str
        The *name*, see `Module`_.

    >>> get("a")
    1


    .. versionadded:: 1.2
    It is **fast**.

    ```python
    get("b")
    ```
    """
    assert clean(docstring) == (
        "Return the torch.nn.Module of name or none.\n\n"
        "Parameters\nname : str\n    The *name*, see Module.\n\nIt is fast."
    )


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (PROSE.format("one"), True),
        ("Too short to be of any use.", False),
        (
            "f(a, b, c=1, d=2) -> (x, y, z); g(a, b, c=1, d=2) -> (x, y, z); h(a, b, c=1, d=2) -> (x, y, z) int float",
            False,
        ),
        ("wort " * 20 + "äöüß" * 20, False),
    ],
)
def test_what_counts_as_prose(text: str, kept: bool) -> None:
    assert is_prose(text) is kept


def test_tests_and_vendored_copies_are_left_out(tmp_path: Path) -> None:
    for name in ("a/__init__.py", "a/b.py", "a/tests/c.py", "a/_vendor/d.py", "a/not-a-module.py", "e.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert sorted((source.package, source.module) for source in sources_under(tmp_path)) == [
        ("a", "a"),
        ("a", "a.b"),
        ("e", "e"),
    ]


def test_harvest_counts_files_that_do_not_parse_and_keeps_the_first_of_duplicates(tmp_path: Path) -> None:
    text = PROSE.format("one")
    (tmp_path / "a.py").write_text(f'"""{text}"""')
    (tmp_path / "b.py").write_text(f'"""{text.upper()}"""')
    (tmp_path / "c.py").write_text('"""broken""" if')
    result = harvest(sorted(sources_under(tmp_path), key=lambda source: source.module), processes=1)
    assert [(entry.module, entry.text) for entry in result.docstrings] == [("a", text)]
    assert (result.source_files, result.unparsable_files, result.dropped) == (3, 1, 1)


@given(st.dictionaries(st.text(min_size=1), st.integers(0, 1000), min_size=1), st.integers(0, 5000))
def test_the_budget_is_shared_evenly_and_used_up(wanted: dict[str, int], budget: int) -> None:
    share = share_evenly(wanted, budget)
    given_away = sum(min(size, share) for size in wanted.values())
    assert given_away <= budget
    if sum(wanted.values()) <= budget:
        assert given_away == sum(wanted.values())
    else:
        assert sum(min(size, share + 1) for size in wanted.values()) > budget


def test_a_large_package_does_not_crowd_out_small_ones() -> None:
    large = [Docstring("large", "large", str(number), "x" * 100) for number in range(100)]
    small = [Docstring("small", "small", str(number), "y" * 100) for number in range(3)]
    kept = within_budget([*large, *small], budget_bytes=1000)
    assert [entry.package for entry in kept] == ["large"] * 7 + ["small"] * 3


def test_names_of_all_labels_and_their_aliases_are_replaced() -> None:
    text = "PyTorch and numpy (np.array, NumPy) but not torchvision;\n  pd.DataFrame, torch.nn"
    assert names_removed(text, ["numpy", "pandas", "torch"]) == (
        "library and library (library.array, library) but not torchvision; library.DataFrame, library.nn"
    )


def test_the_labelled_split_is_balanced_and_shares_no_module_and_no_text(tmp_path: Path) -> None:
    documents = [
        (f"p{package}", f"p{package}.m{module}", f"text {package} {module} {number}")
        for package in range(4)
        for module in range(10 + package)
        for number in range(5)
    ]
    documents += [
        ("p0", "p0.m0", "said by two"),
        ("p1", "p1.m1", "said by two"),
        ("p1", "p1.m2", "P2 says"),
        ("p1", "p1.m3", "P1 says"),
    ]
    split = labelled_split(documents, labels_wanted=3, train_rows_per_label=20, valid_rows_per_label=8)
    assert split.labels == ["p1", "p2", "p3"]
    module_of = {text: (package, module) for package, module, text in documents}
    for examples, rows in ((split.train, 20), (split.valid, 8)):
        assert {label: [one for _, one in examples].count(label) for label in split.labels} == dict.fromkeys(
            split.labels, rows
        )
        assert len({text for text, _ in examples}) == len(examples)
    held_out = {module_of[text] for text, _ in split.valid}
    assert held_out <= split.held_out
    assert not {module_of[text] for text, _ in split.train if text in module_of} & split.held_out


def test_too_few_packages_for_labels_is_a_user_error() -> None:
    with pytest.raises(CorpusError, match="install more packages"):
        labelled_split([("only", "only.module", "text")])


def test_the_corpus_is_the_same_each_time_and_leaves_out_what_is_held_out(tmp_path: Path) -> None:
    sources = sorted(sources_under(package_tree(tmp_path / "site")), key=lambda source: source.module)
    for out in ("one", "two"):
        summary = write_corpus(harvest(sources), tmp_path / out, max_mb=None)
    for name in ("docstrings.jsonl", "labels/train.csv", "labels/valid.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "one" / "docstrings.jsonl").read_text().splitlines()]
    assert len(lines) == summary["documents"]
    with (tmp_path / "one" / "labels" / "valid.csv").open() as file:
        valid = list(csv.DictReader(file))
    assert len(valid) == summary["label_valid_rows"] > 0
    assert not {row["text"] for row in valid} & {line["text"] for line in lines}


def test_the_size_limit_holds(tmp_path: Path) -> None:
    entries = [Docstring(f"p{n % 3}", f"p{n % 3}.m{n}", "", PROSE.format(n)) for n in range(300)]
    summary = write_corpus(Harvest(entries, 1, 0, 0), tmp_path / "out", max_mb=0.01)
    texts = [json.loads(line)["text"] for line in (tmp_path / "out" / "docstrings.jsonl").read_text().splitlines()]
    assert 0.009e6 < sum(map(len, texts)) <= 0.01e6
    assert summary["megabytes"] == 0.01


def test_an_unwritable_place_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    entries = [Docstring(f"p{n % 3}", f"p{n % 3}.m{n}", "", PROSE.format(n)) for n in range(300)]
    with pytest.raises(CorpusError, match="choose a folder"):
        write_corpus(Harvest(entries, 1, 0, 0), tmp_path / "file", max_mb=None)


@pytest.mark.slow
def test_the_running_interpreter_has_sources_of_many_packages() -> None:
    packages = {source.package for source in installed_sources()}
    assert {"python", "numpy", "pydantic"} <= packages
    assert "dstrain" not in packages


def test_a_size_that_is_none_is_refused(tmp_path: Path) -> None:
    from dstrain.corpus.docstrings import docstrings_command

    with pytest.raises(CorpusError, match="--max-mb 0"):
        docstrings_command(Namespace(out=str(tmp_path), max_mb=0, json=False))
