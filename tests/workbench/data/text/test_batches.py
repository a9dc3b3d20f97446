import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from tests.helpers.texts import loaded
from workbench.data import Sentences, TextClassification
from workbench.data.text.batches import Padding, TokenLists
from workbench.data.text.tokens import learn


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
