"""Recipes, from a line on the terminal to finished stages: reading, checking, running, repeating over a grid."""
