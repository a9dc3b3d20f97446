"""Helpers of the tests in tests/workbench/data/text."""

import os

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "dog", "run", "far", "off"]
PARTS = ("train", "val", "test")


def sentences(count, start=0):
    return [" ".join(WORDS[(i * k + start) % len(WORDS)] for k in range(2, 4 + i % 5)) for i in range(count)]


def rows(count, start=0):
    return [[text, f"class{i % 3}"] for i, text in enumerate(sentences(count, start))]


def loaded(module, part):
    return list(getattr(module, f"{part}_dataloader")())


def texts(module, part):
    """What a part holds, decoded."""
    names = {number: token for token, number in module.vocabulary.items()}
    return [" ".join(names[int(i)] for i in module.parts[part][k]["input_ids"]) for k in range(len(module.parts[part]))]


def real(*inside):
    return os.path.join(os.environ["DATA"], *inside)
