import csv
import json
import os
import subprocess
import sys

import datasets
import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler
from transformers import PreTrainedTokenizerFast

from workbench.data import Sentences, TextClassification, TextSequences, TextStream
from workbench.data.text.batches import Padding, TokenLists
from workbench.data.text.reading import read_labelled, read_rows, read_text
from workbench.data.text.stream import TokenBlocks
from workbench.data.text.tokens import learn
from workbench.tasks import Classification, LanguageModelling

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "dog", "run", "far", "off"]
PARTS = ("train", "val", "test")


def sentences(count, start=0):
    return [" ".join(WORDS[(i * k + start) % len(WORDS)] for k in range(2, 4 + i % 5)) for i in range(count)]


def rows(count, start=0):
    return [[text, f"class{i % 3}"] for i, text in enumerate(sentences(count, start))]


@pytest.fixture
def intents(tmp_path):
    path = tmp_path / "intents.json"
    content = {"val": rows(6, 1), "train": rows(30), "test": rows(9, 2)}
    content |= {f"oos_{part}": [[text, "oos"] for text in sentences(4, 3)] for part in PARTS}
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def lines(tmp_path):
    """As MR and SUBJ are: not UTF-8, and with a byte inside a line that Unicode would end it at."""
    path = tmp_path / "lines.all"
    path.write_bytes(
        b"".join(b"%d fine \x85 caf\xe9 %s .\n" % (i % 2, text.encode()) for i, text in enumerate(sentences(40)))
    )
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The folder of a tokenizer whose end token is its padding, too."""
    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary = {word: i for i, word in enumerate(["<end>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return str(folder)


def loaded(module, part):
    return list(getattr(module, f"{part}_dataloader")())


def texts(module, part):
    """What a part holds, decoded."""
    names = {number: token for token, number in module.vocabulary.items()}
    return [" ".join(names[int(i)] for i in module.parts[part][k]["input_ids"]) for k in range(len(module.parts[part]))]


# --- classification


def test_intents(intents):
    module = TextClassification(intents, batch_size=8)
    assert {part: len(data) for part, data in module.parts.items()} == {"train": 30, "val": 6, "test": 9}
    assert (module.classes, module.names) == (3, ["class0", "class1", "class2"])
    for number, (text, label) in enumerate(rows(6, 1)):
        item = module.parts["val"][number]
        assert texts(module, "val")[number] == f"[CLS] {text} [SEP]"
        assert module.names[item["labels"]] == label
    (batch,) = loaded(module, "val")
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    assert all(value.dtype == torch.int64 for value in batch.values())
    lengths = [len(text.split()) + 2 for text, _ in rows(6, 1)]
    assert batch["input_ids"].shape == (6, max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert torch.equal(batch["input_ids"] == module.vocabulary["[PAD]"], batch["attention_mask"] == 0)
    assert Classification(3).inputs(batch)[1].keys() == {"input_ids", "attention_mask"}


def test_out_of_scope_is_a_class_more(intents):
    module = TextClassification(intents, out_of_scope=True)
    assert module.names == ["class0", "class1", "class2", "oos"]
    assert {part: len(data) for part, data in module.parts.items()} == {"train": 34, "val": 10, "test": 13}
    content = json.loads(intents.read_text())
    intents.write_text(json.dumps({name: content[name] for name in PARTS}))
    with pytest.raises(ValueError, match="has no 'oos_train'"):
        TextClassification(intents, out_of_scope=True).setup()


def test_lines_are_split_by_class_and_the_same_in_every_run(lines):
    torch.manual_seed(1)
    module = TextClassification(lines, validation=0.2, test=0.1)
    assert {part: len(data) for part, data in module.parts.items()} == {"train": 28, "val": 8, "test": 4}
    for part, each in (("train", 14), ("val", 4), ("test", 2)):
        assert module.parts[part].extras["labels"].bincount().tolist() == [each, each]
    assert "… cafe" in texts(module, "train")[0], "windows-1252, accents dropped"
    torch.manual_seed(2)
    again = TextClassification(lines, validation=0.2, test=0.1)
    assert [texts(module, part) for part in PARTS] == [texts(again, part) for part in PARTS]
    every = sorted(text for part in PARTS for text in texts(TextClassification(lines), part))
    assert len(every) == 40


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


def test_the_tokenizer_is_learnt_from_training_alone_and_alike_in_every_process(intents, tmp_path):
    content = json.loads(intents.read_text())
    content["test"][0][0] = "unheard words"
    intents.write_text(json.dumps(content))
    module = TextClassification(intents, vocabulary=12)
    assert list(module.vocabulary)[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert list(module.vocabulary.values()) == list(range(12))
    assert texts(module, "test")[0] == "[CLS] [UNK] [UNK] [SEP]"
    assert module.tokenizer != TextClassification(intents, vocabulary=11).tokenizer
    assert module.tokenizer != TextClassification(intents, vocabulary=12, length=5).tokenizer
    code = (
        "import sys; from workbench.data import Sentences, TextClassification as T, TextSequences, TextStream\n"
        "print({'datasets', 'pyarrow'} & {*sys.modules})\n"
        "for kind in ('word', 'bpe'): print(T(sys.argv[1], tokenizer=kind, vocabulary=60).tokenizer)"
    )
    done = subprocess.run([sys.executable, "-c", code, intents], capture_output=True, text=True, check=True)
    here = [TextClassification(intents, tokenizer=kind, vocabulary=60).tokenizer for kind in ("word", "bpe")]
    assert done.stdout.splitlines() == ["set()", *here], "and nothing was imported that was not needed"


def test_pieces_of_words(intents):
    module = TextClassification(intents, tokenizer="bpe", vocabulary=30)
    assert len(module.vocabulary) == 30
    text = texts(module, "val")[0].removeprefix("[CLS] ").removesuffix(" [SEP]")
    assert text.replace(" ", "") == rows(6, 1)[0][0].replace(" ", "")


def test_texts_are_cut_to_the_length(intents):
    module = TextClassification(intents, length=4)
    assert {batch["input_ids"].shape[1] for batch in loaded(module, "test")} == {4}
    assert all(text.startswith("[CLS] ") and text.endswith(" [SEP]") for text in texts(module, "test"))


def test_a_tokenizer_from_a_folder(intents, tokenizer):
    module = TextClassification(intents, tokenizer=tokenizer, batch_size=6)
    assert module.vocabulary["cat"] == 3
    assert texts(module, "val") == [text for text, _ in rows(6, 1)]
    (batch,) = loaded(module, "val")
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all(), "the end token pads"
    with pytest.raises(ValueError, match="nowhere: no tokenizer can be loaded from there"):
        TextClassification(intents, tokenizer="/nowhere").setup()


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
        (b'{"train": [["a", "x"], ["b", "y"]], "test": [["a", "x"]], "val": [["c", "z"]]}', "val has the label 'z'"),
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
    cases += [("x.parquet", "PAR1", "cannot be read as parquet"), ("x.doc", "a", "unknown kind; known are .json")]
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
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"vocabulary": 5}, "vocabulary=5: give more than the 5 special tokens"),
        ({"length": 2}, "length=2: give at least 3"),
        ({"validation": 0.0}, "validation=0.0"),
        ({"validation": 0.5, "test": 0.5}, "validation=0.5, test=0.5"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        TextClassification("x", **arguments)
    if "vocabulary" not in arguments:
        with pytest.raises(ValueError, match=message):
            Sentences(["x"], **arguments)
    with pytest.raises(ValueError, match="cannot be learnt"):
        learn(["a"], "wordpiece", 10, 5)


# --- sentences


def test_sentences_of_several_files(lines, tmp_path, tokenizer):
    (tmp_path / "plain.txt").write_text("\n".join(sentences(20, 5)) + "\n\n")
    module = Sentences([str(lines), str(lines)], tokenizer, batch_size=4, validation=0.2, test=0.1)
    assert {part: len(data) for part, data in module.parts.items()} == {"train": 56, "val": 16, "test": 8}
    batch = loaded(module, "val")[0]
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert texts(module, "train")[0].startswith("<unk> <unk> <unk>")
    plain = Sentences([str(tmp_path / "plain.txt")], labelled=False)
    every = sorted(text for part in PARTS for text in texts(plain, part))
    assert every == sorted(f"[CLS] {text} [SEP]" for text in sentences(20, 5))
    for wrong in ([], str(lines)):
        with pytest.raises(ValueError, match="give a list of one or more text files"):
            Sentences(wrong)


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


# --- streams


@pytest.mark.parametrize(("size", "length"), [(10, 4), (11, 4), (12, 4), (4, 4), (5, 2), (9, 9), (10, 9)])
def test_every_token_of_a_stream_is_predicted_once(size, length):
    stream = torch.arange(size, dtype=torch.int32)
    blocks = TokenBlocks(stream, length)
    task = LanguageModelling(size)
    seen = []
    for i in range(len(blocks)):
        item = {name: value[None] for name, value in blocks[i].items()}
        assert item["input_ids"].shape == (1, length)
        seen += task.targets(item)[task.valid(item)].tolist()
    assert seen == list(range(1, size))
    with pytest.raises(IndexError):
        blocks[len(blocks)]
    with pytest.raises(ValueError, match=f"{length - 1} tokens, fewer than length={length}"):
        TokenBlocks(stream[: length - 1], length)


def test_characters(tmp_path):
    path = tmp_path / "input.txt"
    path.write_text("abca\n" * 36 + "z" * 20)
    module = TextStream(str(path), length=8, validation=0.1, testing=0.1, batch_size=4)
    assert module.vocabulary == {"<unk>": 0, "\n": 1, "a": 2, "b": 3, "c": 4}
    streams = {part: data.stream.tolist() for part, data in module.parts.items()}
    assert streams["train"] == [2, 3, 4, 2, 1] * 32
    assert streams["val"] == [2, 3, 4, 2, 1] * 4
    assert streams["test"] == [0] * 20, "the end; not in the training part"
    batch = loaded(module, "train")[0]
    assert batch.keys() == {"input_ids", "labels"}
    assert batch["input_ids"].shape == (4, 8)
    assert module.tokenizer != TextStream(str(path), length=8, min_count=40).tokenizer


def test_words(tmp_path):
    (tmp_path / "train.txt").write_text(" = A <unk> =\n\nb b c\n" + "a a a b d <unk>\n" * 5)
    (tmp_path / "valid.txt").write_text("b new a\n")
    source = {
        "train": str(tmp_path / "train.txt"),
        "val": str(tmp_path / "valid.txt"),
        "test": str(tmp_path / "valid.txt"),
    }
    module = TextStream(**source, tokens="word", length=3, vocabulary=5)
    assert module.vocabulary == {"<unk>": 0, "<eos>": 1, "a": 2, "b": 3, "d": 4}
    assert module.parts["train"].stream.tolist()[:10] == [0, 0, 0, 0, 1, 1, 3, 3, 0, 1]
    assert module.parts["val"].stream.tolist() == [3, 0, 2, 1]
    assert len(TextStream(**source, tokens="word", length=3, min_count=6).vocabulary) == 4
    assert len(TextStream(**source, tokens="word", length=3).vocabulary) == 8
    cut = TextStream(source["train"], test=source["test"], tokens="word", length=3, validation=0.2)
    assert {part: len(data.stream) for part, data in cut.parts.items()} == {"train": 36, "val": 9, "test": 4}


def test_a_tokenizers_tokens(tmp_path, tokenizer):
    whole = "\n".join(sentences(30))
    (tmp_path / "a.txt").write_text(whole)
    module = TextStream([str(tmp_path / "a.txt")] * 2, str(tmp_path / "a.txt"), str(tmp_path / "a.txt"), tokenizer, 5)
    expected = [module.vocabulary[word] for word in whole.split()]
    assert module.parts["val"].stream.tolist() == expected
    assert len(module.parts["train"].stream) == 2 * len(expected) - 1, "a word goes on from file to file"


def test_long_texts_are_given_to_a_tokenizer_in_pieces(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("workbench.data.text.stream._PIECE", 50)
    whole = "\n".join(sentences(40))
    (tmp_path / "a.txt").write_text(whole)
    module = TextStream(*[str(tmp_path / "a.txt")] * 3, tokenizer, 5)
    assert module.parts["train"].stream.tolist() == [module.vocabulary[word] for word in whole.split()]


def test_a_column_of_running_text(tmp_path):
    for part, text in (("train", "abc"), ("val", "ab"), ("test", "cc")):
        (tmp_path / f"{part}.jsonl").write_text(f'{{"body": "{text}"}}\n' * 6)
    module = TextStream(str(tmp_path), column="body", length=4)
    assert {part: len(data.stream) for part, data in module.parts.items()} == {"train": 23, "val": 17, "test": 17}
    module = TextStream(
        str(tmp_path / "train.jsonl"), test=str(tmp_path / "test.jsonl"), column="body", length=4, validation=0.3
    )
    assert {part: len(data.stream) for part, data in module.parts.items()} == {"train": 16, "val": 7, "test": 17}
    with pytest.raises(ValueError, match=r"row 1: has no 'text'"):
        TextStream(str(tmp_path), column="text").setup()


def test_wrong_streams_are_named(tmp_path):
    (tmp_path / "a.txt").write_text("abc" * 10)
    for arguments in ({"length": 1}, {"min_count": 0}, {"vocabulary": 2}):
        with pytest.raises(ValueError, match="give at least 2, 1 and 3"):
            TextStream("x", **arguments)
    with pytest.raises(ValueError, match=r"a\.txt, val: a part has 2 tokens, fewer than length=8"):
        TextStream(str(tmp_path / "a.txt"), length=8).setup()
    with pytest.raises(ValueError, match=r"none\.txt: no such file"):
        TextStream(str(tmp_path / "none.txt")).setup()


# --- sequences


def test_generated_numbers_with_prompts(tmp_path):
    table = [{"ids": list(range(1, 3 + i % 4)), "asked": i % 2 + 1} for i in range(20)]
    datasets.Dataset.from_list(table).save_to_disk(str(tmp_path / "set"))
    module = TextSequences(tmp_path / "set", "ids", "asked", length=4, batch_size=20, validation=0.1, test=0.1)
    assert {part: len(data) for part, data in module.parts.items()} == {"train": 16, "val": 2, "test": 2}
    batch = loaded(module, "train")[0]
    assert batch.keys() == {"input_ids", "attention_mask", "prompt_lengths"}
    assert batch["input_ids"].shape == (16, 4), "cut"
    task = LanguageModelling(9)
    for row, ids in enumerate(batch["input_ids"].tolist()):
        real = [n for n in ids if n]
        count = max(0, len(real) - int(batch["prompt_lengths"][row]))
        assert int(task.valid(batch)[row].sum()) == count
    assert "prompt_lengths" not in task.inputs(batch)[1]


def test_generated_texts(tmp_path, tokenizer):
    path = tmp_path / "set.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{text} <end>"}) for text in sentences(20)))
    module = TextSequences(path, tokenizer=tokenizer)
    assert sorted(text for part in PARTS for text in texts(module, part)) == sorted(f"{t} <end>" for t in sentences(20))
    batch = loaded(module, "train")[0]
    assert batch.keys() == {"input_ids", "attention_mask"}
    ends = LanguageModelling(20).targets(batch)
    assert ((ends == 0).sum(1) == 1).all(), "every true end counts, though it pads too"
    with pytest.raises(ValueError, match="column 'text' has texts; give a tokenizer"):
        TextSequences(path).setup()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"ids": [1, 2.5], "n": 1}, "is not a list of token numbers"),
        ({"ids": "abc", "n": 1}, "is not a list of token numbers"),
        ({"ids": [1, -1], "n": 1}, "-1 is none of the possible token numbers"),
        ({"ids": [], "n": 1}, "has no tokens"),
        ({"ids": [1, 2], "n": -1}, "column 'n' has -1"),
        ({"ids": [1, 2], "n": "x"}, "column 'n' has 'x'"),
    ],
)
def test_wrong_sequences_are_named(tmp_path, row, message):
    path = tmp_path / "set.jsonl"
    path.write_text("\n".join(json.dumps(each) for each in [row, *[{"ids": [1], "n": 0}] * 9]))
    with pytest.raises(ValueError, match=message):
        TextSequences(path, "ids", "n").setup()


def test_numbers_beyond_the_tokenizer(tmp_path, tokenizer):
    path = tmp_path / "set.jsonl"
    path.write_text('{"ids": [1, 99]}\n' * 10)
    with pytest.raises(ValueError, match="row 1: 99 is none of the 15 token numbers"):
        TextSequences(path, "ids", tokenizer=tokenizer).setup()
    with pytest.raises(ValueError, match="length=1"):
        TextSequences(path, length=1)


# --- what all share


def test_items_have_stable_indices_and_no_randomness():
    data = TokenLists([[1, 2, 3], [4], [5, 6]], {"labels": [7, 8, 9]})
    assert data.views == 1
    assert [(item["input_ids"].tolist(), int(item["labels"])) for item in data] == [
        ([1, 2, 3], 7),
        ([4], 8),
        ([5, 6], 9),
    ]
    for index in (-1, 3):
        with pytest.raises(IndexError):
            data[index]
    batch = Padding(0)([data[1], data[0]])
    assert batch["input_ids"].tolist() == [[4, 0, 0], [1, 2, 3]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [8, 7]
    with pytest.raises(ValueError, match="sequence 1 has no tokens"):
        TokenLists([[1], []])


def test_loaders_are_plain_and_follow_the_seed(intents):
    module = TextClassification(intents, batch_size=4)
    samplers = {"train": RandomSampler, "val": SequentialSampler, "test": SequentialSampler}
    for part, sampler in samplers.items():
        loader = getattr(module, f"{part}_dataloader")()
        assert type(loader) is DataLoader
        assert type(loader.sampler) is sampler
    orders = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        orders.append(torch.cat([batch["labels"] for batch in loaded(module, "train")]).tolist())
        assert torch.equal(torch.get_rng_state(), state)
    assert orders[0] == orders[1] != orders[2]


def test_workers_load_the_same(intents):
    for here, there in zip(
        loaded(TextClassification(intents), "val"), loaded(TextClassification(intents, num_workers=1), "val")
    ):
        assert here.keys() == there.keys()
        assert all(torch.equal(here[name], there[name]) for name in here)


def test_paths_may_hold_variables(intents, monkeypatch):
    monkeypatch.setenv("SOMEWHERE", str(intents.parent))
    assert TextClassification(f"$SOMEWHERE/{intents.name}").classes == 3


def test_windows_line_ends_and_marks(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert read_text(tmp_path / "a.txt") == "one\ntwo"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("TextClassification", {"path": "x", "tokenizer": "bpe"}),
        ("Sentences", {"paths": ["a", "b"]}),
        ("TextStream", {"train": ["a", "b"], "val": "c"}),
        ("TextSequences", {"path": "x", "prompt": "n"}),
    ],
)
def test_modules_from_a_config(name, arguments):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=pl.LightningDataModule)
    parsed = parser.parse_object({"data": {"class_path": f"workbench.data.{name}", "init_args": arguments}})
    assert type(parser.instantiate(parsed).data).__name__ == name


# --- the real ones


def real(*inside):
    return os.path.join(os.environ["DATA"], *inside)


@pytest.mark.data
def test_clinc150():
    module = TextClassification(real("clinc150", "data_full.json"), vocabulary=4000)
    assert {part: len(data) for part, data in module.parts.items()} == {"train": 15_000, "val": 3_000, "test": 4_500}
    assert (module.classes, len(module.vocabulary)) == (150, 4000)
    assert module.parts["test"].extras["labels"].bincount().tolist() == [30] * 150
    assert TextClassification(real("clinc150", "data_full.json"), out_of_scope=True).classes == 151


@pytest.mark.data
def test_mr_and_subj():
    paths = [real("mr", "rt-polarity.all"), real("subj", "subj.all")]
    module = Sentences(paths)
    assert sum(len(data) for data in module.parts.values()) == 20_662
    module = TextClassification(paths[0])
    assert module.classes == 2
    assert module.parts["train"].extras["labels"].bincount().tolist() == [4265, 4265]


@pytest.mark.data
def test_shakespeare():
    module = TextStream(real("tinyshakespeare", "input.txt"))
    assert sum(len(data.stream) for data in module.parts.values()) == 1_115_394
    assert len(module.vocabulary) == 66


@pytest.mark.data
def test_wikitext():
    folder = "wikitext2-valid-test"
    module = TextStream(real(folder, "test.txt"), test=real(folder, "valid.txt"), tokens="word")
    assert len(module.parts["test"].stream) == 217_646
    assert sum(len(module.parts[part].stream) for part in ("train", "val")) == 245_569
