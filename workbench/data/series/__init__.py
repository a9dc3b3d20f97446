"""Time series as Lightning data modules: whole series to be classified, and one long table to be forecast."""
