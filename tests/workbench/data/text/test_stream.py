import pytest
import torch

from tests.helpers.texts import loaded, real, sentences
from workbench.data import TextStream
from workbench.data.text.stream import TokenBlocks
from workbench.tasks import LanguageModelling


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
