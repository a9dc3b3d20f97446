from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from distill.cache import CachedTeacher, cache_teacher
from distill.hf_columns import check_columns, columns_for, teacher_only
from distill.teacher import Teacher

SIZES = {"vocab_size": 11, "max_position_embeddings": 8}


def bert() -> Any:
    return BertForSequenceClassification(
        BertConfig(hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=4, **SIZES)
    )


def distilbert() -> Any:
    return DistilBertForSequenceClassification(DistilBertConfig(dim=4, hidden_dim=4, n_layers=1, n_heads=2, **SIZES))


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = bert()

    def forward(self, **batch: Tensor) -> Any:
        return self.model(**batch)


def row() -> dict[str, Any]:
    tokens = torch.randint(1, 11, (5,))
    return {"input_ids": tokens, "attention_mask": torch.ones(5).long(), "token_type_ids": torch.ones(5).long()}


def test_the_teacher_s_columns_are_those_that_it_names() -> None:
    assert "token_type_ids" in columns_for(Teacher(bert()), None)
    assert "token_type_ids" not in columns_for(Teacher(distilbert()), None)
    assert "token_type_ids" in columns_for(Teacher([distilbert(), bert()]), None)
    assert columns_for(Teacher(Wrapper()), ["token_type_ids"]) == {"token_type_ids"}
    assert columns_for(Teacher(lambda input_ids, segments: input_ids), None) == {"input_ids", "segments"}


def test_only_the_teacher_takes_what_the_student_does_not_name() -> None:
    columns = columns_for(Teacher(bert()), None)
    assert teacher_only(distilbert(), columns, {"labels"}) == {"token_type_ids"}
    assert teacher_only(bert(), columns, {"labels"}) == frozenset()
    assert teacher_only(Wrapper(), columns, {"labels"}) == frozenset()


def test_columns_that_may_be_needed_are_not_dropped_in_silence() -> None:
    data = [{**row(), "text": "a b", "weights": [0.5], "labels": 1}]
    kept = {"input_ids", "attention_mask", "labels"}
    with pytest.raises(ValueError, match=r"teacher_columns=\['token_type_ids', 'weights'\], or teacher_columns=\[\]"):
        check_columns(data, kept, Teacher(Wrapper()))
    check_columns(data, {*kept, "token_type_ids", "weights"}, Teacher(Wrapper()))
    check_columns(data, kept, Teacher(bert()))
    check_columns(None, kept, Teacher(Wrapper()))
    check_columns([(1, 2)], kept, Teacher(Wrapper()))


def test_a_stream_is_not_looked_into() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            raise AssertionError("a sample was taken")

    class Table:
        def __getitem__(self, index: int) -> Any:
            raise AssertionError("a sample was taken")

    for data in (Stream(), Table()):
        check_columns(data, (), Teacher(lambda **batch: batch["input_ids"]))


def test_a_cache_names_the_columns_that_it_was_made_of(tmp_path: Path) -> None:
    data = [row() for _ in range(4)]
    cache_teacher(bert(), DataLoader(data, 2), tmp_path)  # type: ignore[arg-type]
    teacher = CachedTeacher(tmp_path)
    assert columns_for(teacher, None) == {"input_ids", "attention_mask", "token_type_ids"}
    check_columns(data, (), teacher)
    with pytest.raises(ValueError, match="it was made with other columns"):
        teacher.attach(DataLoader([{"input_ids": each["input_ids"]} for each in data], 2))  # type: ignore[arg-type]


def test_each_of_several_teachers_gets_what_it_takes() -> None:
    one, other = distilbert(), bert()
    batch = {name: torch.stack([value] * 2) for name, value in row().items()}
    mean = Teacher([one, other]).outputs((), batch, match=True)[0]
    kept = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert torch.allclose(mean, (one.eval()(**kept).logits + other.eval()(**batch).logits) / 2, atol=1e-6)
