"""How wide the tree may be: one file per size policy. `base` holds the interface."""
