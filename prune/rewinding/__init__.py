"""Rewinding: the point that training goes back to, and what goes back there."""
