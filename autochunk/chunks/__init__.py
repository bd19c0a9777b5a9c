"""Functions other than attention in chunks: computed for a part of their positions at a time."""
