import csv
import json

import datasets
import pytest

from tests.helpers.texts import PARTS, rows, sentences
from workbench.data import Sentences, TextClassification, TextSequences, TextStream
from workbench.data.text.reading import read_labelled, read_rows, read_text


def write(path, table):
    """The rows in the format that the ending of ``path`` says."""
    named = [{"id": i, "sentence": text, "intent": label} for i, (text, label) in enumerate(table)]
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in named) + "\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(named))
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(named).to_parquet(path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(
                file, ["id", "sentence", "intent"], delimiter="\t" if path.suffix == ".tsv" else ","
            )
            writer.writeheader()
            writer.writerows(named)
    return path


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "tsv", "parquet"])
def test_tables(tmp_path, ending):
    table = [['a "quoted", text\nof two lines', "x y"], *rows(5)]
    found = read_rows(write(tmp_path / f"table.{ending}", table), ["sentence", "intent"])
    assert found == {"all": [tuple(row) for row in table]}
    with pytest.raises(ValueError, match=rf"table\.{ending}.*row 1: has no 'text', only .*name the columns"):
        read_rows(tmp_path / f"table.{ending}", ["text", "intent"])


def test_a_folder_of_parts_and_one_that_datasets_saved(tmp_path):
    for part, count in (("train", 12), ("validation", 4)):
        write(tmp_path / f"{part}.csv", rows(count))
    module = TextClassification(tmp_path, "sentence", "intent", test=0.25)
    assert {part: len(data) for part, data in module.parts.items()} == {"train": 9, "val": 4, "test": 3}
    made = {
        part: datasets.Dataset.from_dict({"text": sentences(12), "label": [10, 2] * 6}) for part in ("train", "test")
    }
    datasets.DatasetDict(made).save_to_disk(str(tmp_path / "saved"))
    module = TextClassification(tmp_path / "saved")
    assert module.names == ["2", "10"], "in the order of numbers"
    assert {part: len(data) for part, data in module.parts.items()} == {"train": 11, "val": 1, "test": 12}


def test_a_name_is_asked_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(name):
        asked.append(name)
        return datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": sentences(20), "label": [0, 1] * 10}))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert TextClassification("someone/some-set").classes == 2
    assert asked == ["someone/some-set"]

    def several(name, part):
        asked.append((name, part))
        return load_dataset(name)

    monkeypatch.setattr(datasets, "load_dataset", several)
    assert TextClassification("someone/some-set:plus").classes == 2
    assert asked[1:] == [("someone/some-set", "plus"), "someone/some-set"]

    def fail(name):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match=r"some-set: neither a path here nor .* \(offline\)"):
        TextClassification("someone/some-set").setup()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\x00\x01", "zero bytes"),
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"train": 3}', "'train' is not a list of rows"),
        (b'{"train": []}', "'train': has no rows"),
        (b'{"train": [["a", "x"], ["b"]]}', r"'train', row 2: is not text, label but \['b'\]"),
        (b'{"train": [[3, "x"]]}', r"'train', row 1: text 3 and label 'x' are not a text"),
        (b'{"train": [["a", 0.5]]}', "label 0.5"),
        (b'{"test": [["a", "x"]]}', "has no split 'train', only 'test'"),
        (b'{"train": [["a", "x"], ["b", "x"], ["c", "x"]]}', "one class 'x'"),
        (b'{"train": [["a", "x"]]}', "cannot split 1 samples"),
        (b'{"train": [["a", "x"], ["b", "y"]], "test": [["a", "x"]], "val": [["c", "z"]]}', "val has the class 'z'"),
    ],
)
def test_broken_files_are_named(tmp_path, content, message):
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"broken.json.*({message})"):
        TextClassification(path).setup()


def test_other_broken_sources_are_named(tmp_path):
    cases = [
        ("x.jsonl", '{"text": "a", "label": 1}\n{', "line 2: is not JSON"),
        ("x.all", "1 fine\nlonely\n", "line 2: 'lonely'"),
    ]
    cases += [("x.parquet", "PAR1", "cannot be read as parquet"), ("x.doc", "a", "unknown kind; supported are .json")]
    for name, content, message in cases:
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            TextClassification(tmp_path / name).setup()
    with pytest.raises(ValueError, match="no such file or folder, and no name"):
        TextClassification("/nowhere/at all").setup()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: has no train file"):
        TextClassification(tmp_path / "empty").setup()


@pytest.mark.parametrize(
    ("module", "arguments", "expected"),
    [
        (TextStream, {"train": "some/texts", "column": "text", "tokens": "word", "length": 4}, [30, 2, 2]),
        (TextSequences, {"path": "some/texts", "column": "ids"}, [18, 1, 1]),
        (Sentences, {"paths": ["some/texts"], "column": "text"}, [18, 1, 1]),
    ],
)
def test_every_kind_of_text_comes_from_the_hub_too(module, arguments, expected, monkeypatch):
    rows = {"text": sentences(20), "ids": [[1, 2, 3]] * 20}
    made = {"train": datasets.Dataset.from_dict(rows), "odd": datasets.Dataset.from_dict({"text": [1], "ids": ["x"]})}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(made))
    found = module(**arguments)
    assert [len(found.parts[part]) for part in PARTS] == expected
    made["train"] = datasets.Dataset.from_dict({"text": [1] * 9, "ids": ["x"] * 9})
    with pytest.raises(ValueError, match=r"some/texts.*(has 1, which is not a text|has texts; give a tokenizer)"):
        module(**arguments).setup()
    del made["train"]
    with pytest.raises(ValueError, match=r"some/texts.*: has no split 'train', only '?odd"):
        module(**arguments).setup()


def test_only_a_line_feed_ends_a_line(tmp_path, lines):
    assert len(read_labelled(lines)) == 40
    (tmp_path / "a.txt").write_bytes("1 one\u2028two\r\n0 three\x0bfour".encode())
    assert read_labelled(tmp_path / "a.txt") == [("one\u2028two", "1"), ("three\x0bfour", "0")]


def test_windows_line_ends_and_marks(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert read_text(tmp_path / "a.txt") == "one\ntwo"
