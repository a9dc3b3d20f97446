"""Records of a run as one self-contained page, and as a table for the terminal."""
