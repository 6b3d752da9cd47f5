"""One trainer for every method."""
