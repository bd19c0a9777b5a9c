"""What measures: the search over plans, and the process that runs them."""
