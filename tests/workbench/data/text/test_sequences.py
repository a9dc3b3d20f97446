import json

import datasets
import pytest

from tests.helpers.texts import PARTS, loaded, sentences, texts
from workbench.data import TextSequences
from workbench.tasks import LanguageModelling


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
