"""Several processes: ranks and what they agree on, and weights divided among them."""
