"""Several processes: who shares the data, what they do together, and how they end."""
