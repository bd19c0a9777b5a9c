"""Any function in chunks: what is not attention, run a part of its positions at a time."""
