"""What plans that were never measured would cost, from the curves that were: numpy, no jax."""
