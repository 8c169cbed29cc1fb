"""Holds what concerns several processes: who shares the data, what they do together, how they end."""
