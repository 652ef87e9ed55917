"""Who guesses: one file per drafter, named like the method. `base` holds the interface."""
