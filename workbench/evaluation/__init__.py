"""Judging what was trained: scores by sample, comparisons of stages, statistics over seeds."""
