"""Methods compared fairly: one task, one budget, the same seeds, and a learning rate chosen for each on dev rows."""
