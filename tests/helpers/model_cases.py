"""Helpers of the tests in tests/workbench/models."""


def parameters(model):
    return sum(p.numel() for p in model.parameters())
