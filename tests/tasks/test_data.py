import json
from pathlib import Path

import datasets
import pytest

from loratory.tasks.data import read_data, read_rows

DATA = Path(__file__).parents[2] / "data"


@pytest.fixture
def write(tmp_path):
    def one(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return one


@pytest.mark.parametrize(
    ("name", "content", "rows", "origin"),
    [
        ("a.jsonl", '{"t": 1}\n\n{"t": 2}\n', [{"t": 1}, {"t": 2}], "row 3"),
        ("a.json", '[{"t": 1}, {"t": 2}]', [{"t": 1}, {"t": 2}], "row 2"),
        ("b.json", '{"data": [{"t": 1}, {"t": 2}]}', [{"t": 1}, {"t": 2}], "row 2"),
        ("a.csv", '\ufefft,u\n"x\ny",1\nz,2\n', [{"t": "x\ny", "u": "1"}, {"t": "z", "u": "2"}], "row 2 (line 4)"),
        ("a.tsv", "t\tu\na,b\t1\nc\t2\n", [{"t": "a,b", "u": "1"}, {"t": "c", "u": "2"}], "row 2 (line 3)"),
        ("a.conll", "-DOCSTART-\tO\n\nA\tO\nB\tB-X\n\n\nC\tO\n",
         [{"tokens": ["A", "B"], "tags": ["O", "B-X"]}, {"tokens": ["C"], "tags": ["O"]}], "row 2 (line 7)"),
        ("b.conll", "A DT O\n\nB NN B-X", [{"tokens": ["A"], "tags": ["O"]}, {"tokens": ["B"], "tags": ["B-X"]}],
         "row 2 (line 3)"),
    ],
)  # fmt: skip
def test_formats(write, name, content, rows, origin):
    path = write(name, content)
    found = read_rows(path)
    assert found == rows
    assert found[-1].origin == f"{path} {origin}"


def test_text_by_document_or_line(write):
    path = write("a.txt", "one\n\ntwo\n")
    assert read_rows(path) == [{"text": "one\n\ntwo\n"}]
    assert [(row["text"], row.origin) for row in read_rows(path, text_by="line")] == [
        ("one", f"{path} row 1"), ("two", f"{path} row 3"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="text_by is 'word'"):
        read_rows(path, text_by="word")


def test_parquet_and_folders_saved_by_datasets(tmp_path):
    table = datasets.Dataset.from_dict(
        {"text": ["a", "b"], "label": [1, 0], "tags": [[0, 1], [1]]},
        features=datasets.Features({
            "text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"]),
            "tags": datasets.List(datasets.ClassLabel(names=["O", "B-X"])),
        }),
    )  # fmt: skip
    table.to_parquet(str(tmp_path / "a.parquet"))
    assert read_rows(tmp_path / "a.parquet")[1] == {"text": "b", "label": 0, "tags": [1]}
    datasets.DatasetDict({"train": table, "validation": table}).save_to_disk(str(tmp_path / "saved"))
    found = read_data(tmp_path / "saved")
    assert found.train[0] == {"text": "a", "label": "yes", "tags": ["O", "B-X"]}
    assert found.dev[1].origin == f"{tmp_path / 'saved'}[validation] row 2"
    table.save_to_disk(str(tmp_path / "one"))
    assert len(read_rows(tmp_path / "one")) == 2


@pytest.mark.parametrize(
    ("name", "content", "kind", "message"),
    [
        ("a.jsonl", '{"t": 1}\n{"t": \n', ValueError, r"a\.jsonl row 2: not JSON .*column 6"),
        ("a.jsonl", '{"t": 1}\n[1]\n', TypeError, r"a\.jsonl row 2: \[1\] is list, but each row must be an object"),
        ("a.jsonl", "", ValueError, r"a\.jsonl is empty .0 bytes."),
        ("a.jsonl", "\n\n", ValueError, r"a\.jsonl has no rows"),
        ("a.jsonl", b'{"t": "\xff"}', ValueError, r"a\.jsonl is not UTF-8 text .byte 7."),
        ("a.json", '[{"t": 1},\n]', ValueError, r"a\.json line \d: not JSON .*one object a line is .jsonl"),
        ("a.json", '{"rows": 1}', TypeError, "a list of rows .or one under 'data'. is expected"),
        ("a.json", "[3]", TypeError, r"a\.json row 1: 3 is int"),
        ("a.csv", "t,u\n1,2\n1,2,3\n", ValueError, r"row 2 .line 3.: 3 values, but 2 columns .t, u."),
        ("a.csv", 't\n"open\n', ValueError, r"a\.csv line 2: not a table .*check its quotes"),
        ("a.csv", "t,t\n1,2\n", ValueError, "line 1: column names must be there and differ"),
        ("a.csv", "t,u\n", ValueError, "has no rows"),
        ("a.parquet", "PAR0", ValueError, r"a\.parquet is not a Parquet file"),
        ("a.conll", "A\tO\nB\n", ValueError, r"row 1 .line 2.: 'B' has not 2 columns, the word first"),
        ("a.conll", "A\tO\n\nB\tX\tO\n", ValueError, r"row 2 .line 3."),
        ("a.conll", "A\n", ValueError, r"row 1 .line 1."),
        ("a.txt", " \n", ValueError, "has no rows"),
        ("a.xlsx", "x", ValueError, r"a file ending in '\.xlsx' cannot be read; known: \.jsonl, \.json"),
    ],
)
def test_bad_files(write, name, content, kind, message):
    with pytest.raises(kind, match=message):
        read_rows(write(name, content))


def test_folders_and_splits(write, tmp_path):
    write("d/train.jsonl", '{"t": 1}\n{"t": 2}\n')
    write("d/validation.csv", "t\n3\n")
    write("d/test.json", '[{"t": 2}]')
    found = read_data(tmp_path / "d")
    assert (found.train, found.dev, found.test) == ([{"t": 1}, {"t": 2}], [{"t": "3"}], [{"t": 2}])
    assert len(found.notes) == 1
    assert found.notes[0].startswith("1 of 1 test rows also stand in train")
    assert read_rows(tmp_path / "d", split="dev") == [{"t": "3"}]
    write("d/train.csv", "t\n1\n")
    with pytest.raises(ValueError, match=r"more than one train file .train\.csv, train\.jsonl."):
        read_data(tmp_path / "d")


def test_shards_make_one_split(write, tmp_path):
    write("d/train-00000-of-00002.jsonl", '{"t": 1}\n')
    write("d/train-00001-of-00002.jsonl", '{"t": 2}\n')
    assert read_rows(tmp_path / "d") == [{"t": 1}, {"t": 2}]


def test_dev_is_held_out_and_said(write):
    path = write("a.jsonl", "".join(json.dumps({"t": i}) + "\n" for i in range(60)))
    found, again = read_data(path), read_data(path)
    assert (len(found.train), len(found.dev), found.test) == (57, 3, [])
    assert found == again
    assert sorted(row["t"] for row in found.train + found.dev) == list(range(60))
    assert read_data(path, seed=1).dev != found.dev
    assert found.notes == (f"dev: 3 of 60 training rows held out (seed 0), as {path} has no dev split",)
    assert len(read_data(write("two.jsonl", '{"t": 1}\n{"t": 2}\n')).dev) == 1
    with pytest.raises(ValueError, match="has 1 row, too few to hold out a dev split"):
        read_data(write("one.jsonl", '{"t": 1}\n'))


def test_dev_of_one_long_text_is_its_end(write):
    text = "".join(f"line {i}\n" for i in range(100))
    found = read_data(write("a.txt", text))
    assert found.train[0]["text"] + found.dev[0]["text"] == text
    assert 0.02 < len(found.dev[0]["text"]) / len(text) < 0.08
    assert "the last" in found.notes[0]


def test_dev_and_test_from_elsewhere(write):
    train, other = write("a.jsonl", '{"t": 1}\n'), write("b.jsonl", '{"t": 2}\n')
    found = read_data(train, dev=other, test=other)
    assert (found.dev, found.test, found.notes) == ([{"t": 2}], [{"t": 2}], ())


def test_what_is_not_there(write, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"data 'no/such\.jsonl' is no file or folder"):
        read_rows("no/such.jsonl")
    write("d/notes.md", "x")
    with pytest.raises(FileNotFoundError, match=r"no train, dev or test file .found: notes\.md."):
        read_data(tmp_path / "d")
    write("e/dev.jsonl", '{"t": 1}\n')
    write("e/test.jsonl", '{"t": 1}\n')
    with pytest.raises(ValueError, match=r"has no train split .found: dev, test."):
        read_data(tmp_path / "e")

    def fails(name, config=None):
        raise ConnectionError("no network\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(
        FileNotFoundError, match=r"'glue:sst2' could not be read as a file, a folder or .*ConnectionError: no"
    ):
        read_rows("glue:sst2")


def test_the_projects_own_data():
    counts = {"banking77": (8972, 995, 3080), "e2e": (1946, 60, 300), "ncbi_disease": (5424, 923, 940)}
    for name, expected in counts.items():
        found = read_data(DATA / name)
        assert (len(found.train), len(found.dev), len(found.test)) == expected
