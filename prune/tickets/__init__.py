"""The parts of a hunt: what is trained, from where, beside which controls, and what is left on disk."""
