"""The registry: names, nearest names, the table."""

import pytest

import loratory as lt
from loratory.methods import METHODS, method_class, method_name


def test_names_are_sorted_and_find_their_classes():
    assert list(METHODS) == sorted(METHODS)
    for name, cls in METHODS.items():
        assert method_class(name) is cls
        assert method_name(cls) == name
        assert method_name(cls()) == name


@pytest.mark.parametrize("name", ["LoRA", "merged_lora", "Merged-LoRA", "HEAD_ONLY"])
def test_case_and_dashes_do_not_matter(name: str):
    assert method_class(name) in (lt.LoRA, lt.MergedLoRA, lt.HeadOnly)


def test_an_unknown_name_lists_the_nearest():
    listed = ", ".join(METHODS)
    with pytest.raises(ValueError, match=rf"there is no method 'lorra'; nearest names: lora, .*, .*; all: {listed}$"):
        method_class("lorra")


def test_methods_gives_one_row_each():
    rows = {row.name: row for row in lt.methods()}
    assert set(rows) == set(METHODS)
    assert rows["lora"] == ("lora", "LoRA", "a trained low-rank update beside the frozen weight.", "loratory")
    assert all(row.description.endswith(".") and len(row.description) < 120 for row in rows.values())


def test_every_docstring_says_what_a_reader_needs():
    for name, cls in METHODS.items():
        text = cls.__doc__
        assert text.replace("-", "").startswith(f"{cls.__name__}: "), name
        if cls.trains == "factors":
            start = "unchanged" if cls.acts_on == "layers" else " starts "  # virtual tokens change the model at once
            start = "not the base's function" if name == "lora-sb" else start  # its paper starts from a first step
            for part in (start, "Trains", "Raises", "Source: arXiv", "Differs"):
                assert part in text, (name, part)
