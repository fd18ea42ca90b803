"""Against PEFT itself: the same numbers, and each other's files."""
