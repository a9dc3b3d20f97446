from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast

from distill.cache import CachedTeacher, cache_teacher
from distill.hf_vocabulary import vocabulary_for
from distill.teacher import Teacher

WORDS = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "a", "b", "c"])}


def model(rows: int, kind: Any = GPT2LMHeadModel) -> Any:
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return kind(GPT2Config(vocab_size=rows, n_embd=4, n_layer=1, n_head=1, n_positions=8, **ends))


def tokenizer(words: dict[str, int] = WORDS) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "[UNK]")), pad_token="[PAD]")


def test_heads_of_one_size_need_no_tokenizers() -> None:
    assert vocabulary_for(model(8), Teacher(model(8))) is None


def test_the_vocabulary_is_what_both_tokenizers_name() -> None:
    given = {"tokenizer": tokenizer(), "teacher_tokenizer": WORDS}
    assert vocabulary_for(model(8), Teacher(model(6)), **given) == 5
    assert vocabulary_for(model(8), Teacher(model(8)), **given) == 5
    processor = SimpleNamespace(tokenizer=tokenizer())
    assert vocabulary_for(model(8), Teacher(model(6)), tokenizer=processor, teacher_tokenizer=tokenizer()) == 5


def test_a_number_takes_the_place_of_tokenizers() -> None:
    assert vocabulary_for(model(8), Teacher(model(6)), tokenizer(), {"other": 0}, vocabulary=6) == 6
    with pytest.raises(ValueError, match="the teacher's head has 6 rows for 7 tokens: resize it"):
        vocabulary_for(model(8), Teacher(model(6)), vocabulary=7)


def test_without_either_unlike_heads_are_refused() -> None:
    for given in ({}, {"tokenizer": tokenizer()}, {"tokenizer": object()}):
        with pytest.raises(ValueError, match="the student's 8, the teacher's 6, and nothing says which are tokens"):
            vocabulary_for(model(8), Teacher(model(6)), **given)
    with pytest.raises(ValueError, match="the student's 8, the teacher 0's 8, the teacher 1's 6"):
        vocabulary_for(model(8), Teacher([model(8), model(6)]))
    with pytest.raises(ValueError, match="give the Trainer processing_class"):
        vocabulary_for(model(8), Teacher(model(8)), teacher_tokenizer=tokenizer())


def test_tokenizers_beside_the_weights_are_found(tmp_path: Path) -> None:
    swapped = {**WORDS, "a": 3, "b": 2}
    for name, words in (("student", WORDS), ("teacher", swapped)):
        model(8).save_pretrained(tmp_path / name)
        tokenizer(words).save_pretrained(tmp_path / name)
    student = GPT2LMHeadModel.from_pretrained(tmp_path / "student")
    with pytest.raises(ValueError, match="2 ids are other tokens to the teacher, the first 2: 'a' to the student"):
        vocabulary_for(student, Teacher(tmp_path / "teacher"))
    assert vocabulary_for(student, Teacher(tmp_path / "student")) is None
    assert vocabulary_for(student, Teacher(tmp_path / "teacher"), teacher_tokenizer=tokenizer()) is None
    model(6).save_pretrained(tmp_path / "student")
    narrow = GPT2LMHeadModel.from_pretrained(tmp_path / "student")
    assert vocabulary_for(student, Teacher(narrow)) == 5
    with pytest.raises(ValueError, match=r"teacher_tokenizer, in place of .* vocabulary=N"):
        vocabulary_for(narrow, Teacher(tmp_path / "teacher"))


def test_tokens_added_since_a_tokenizer_was_saved_are_compared(tmp_path: Path) -> None:
    model(5).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    student, teacher = (GPT2LMHeadModel.from_pretrained(tmp_path) for _ in range(2))
    extended = tokenizer()
    extended.add_tokens(["new", "newer"])
    for each in (student, teacher):
        each.resize_token_embeddings(len(extended))
    assert vocabulary_for(student, Teacher(teacher)) is None  # all seven rows
    assert vocabulary_for(student, Teacher(teacher), extended) is None
    assert vocabulary_for(student, Teacher(teacher), extended, extended) == 7
    old = Teacher(GPT2LMHeadModel.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match=r"does not know 2 of the student's tokens.*teacher_tokenizer.*vocabulary=N"):
        vocabulary_for(student, old, extended)
    teacher.resize_token_embeddings(8)
    with pytest.raises(ValueError, match=r"nothing says which are tokens.*teacher_tokenizer.*vocabulary=N"):
        vocabulary_for(student, Teacher(teacher), extended)
    swapped = tokenizer({**WORDS, "a": 3, "b": 2})
    with pytest.raises(ValueError, match="2 ids are other tokens"):
        vocabulary_for(student, Teacher(teacher), swapped)


def test_classifiers_are_compared_and_not_cut() -> None:
    student, teacher = model(8, GPT2ForSequenceClassification), Teacher(model(6, GPT2ForSequenceClassification))
    assert vocabulary_for(student, teacher, tokenizer(), WORDS) is None
    with pytest.raises(
        ValueError, match="the teacher does not know 1 of the student's tokens, the first 'c' with id 4"
    ):
        vocabulary_for(student, teacher, tokenizer(), {word: n for word, n in WORDS.items() if word != "c"})


def test_a_token_for_padding_is_the_student_s_own_affair() -> None:
    own = {**{word: n - 1 for word, n in WORDS.items() if n}, "[PAD]": 4}
    other = {word: n for word, n in own.items() if word != "[PAD]"}
    assert vocabulary_for(model(8), Teacher(model(6)), tokenizer(own), other) == 4


def test_heads_of_cached_teachers(tmp_path: Path) -> None:
    data = [{"input_ids": torch.tensor([1, 2, 3])} for _ in range(2)]
    cache_teacher(model(6), DataLoader(data, 2), tmp_path / "full")  # type: ignore[arg-type]
    cache_teacher(model(6), DataLoader(data, 2), tmp_path / "few", store="sampled", samples=2)  # type: ignore[arg-type]
    for name in ("full", "few"):
        with pytest.raises(ValueError, match="the cached teacher's 6"):
            vocabulary_for(model(8), CachedTeacher(tmp_path / name))
    assert vocabulary_for(model(8), CachedTeacher(tmp_path / "full"), vocabulary=5) == 5
    with pytest.raises(ValueError, match=r"ids were sampled from 6 rows.*LanguageModelling\(5\)"):
        vocabulary_for(model(8), CachedTeacher(tmp_path / "few"), vocabulary=5)
    assert vocabulary_for(model(8), CachedTeacher(tmp_path / "few"), vocabulary=6) == 6
