"""What is saved and loaded again: training states, exports, the files under them, random numbers."""
