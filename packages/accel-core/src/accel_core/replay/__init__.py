"""Trains up to a past update once more, and compares what comes out. Imported only when it is used."""
