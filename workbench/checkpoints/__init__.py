"""The compact checkpoint: bit-packed masks and the values that were kept."""
