"""Other people's training loops, unchanged."""
