"""Exporting a trained stage to formats that load elsewhere, each measured against what was trained."""
