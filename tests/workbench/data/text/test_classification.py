import json

import pytest
import torch

from tests.helpers.texts import PARTS, loaded, real, rows, texts
from workbench.data import TextClassification
from workbench.tasks import Classification


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


def test_texts_are_cut_to_the_length(intents):
    module = TextClassification(intents, length=4)
    assert {batch["input_ids"].shape[1] for batch in loaded(module, "test")} == {4}
    assert all(text.startswith("[CLS] ") and text.endswith(" [SEP]") for text in texts(module, "test"))


def test_paths_may_hold_variables(intents, monkeypatch):
    monkeypatch.setenv("SOMEWHERE", str(intents.parent))
    assert TextClassification(f"$SOMEWHERE/{intents.name}").classes == 3


@pytest.mark.data
def test_clinc150():
    module = TextClassification(real("clinc150", "data_full.json"), vocabulary=4000)
    assert {part: len(data) for part, data in module.parts.items()} == {"train": 15_000, "val": 3_000, "test": 4_500}
    assert (module.classes, len(module.vocabulary)) == (150, 4000)
    assert module.parts["test"].extras["labels"].bincount().tolist() == [30] * 150
    assert TextClassification(real("clinc150", "data_full.json"), out_of_scope=True).classes == 151
