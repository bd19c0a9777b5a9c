"""What runs in the model: the op, the modules, and the kernels under both."""
