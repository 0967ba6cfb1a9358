"""What one asks of an operator: estimates, eigenpairs, densities, landscapes, logs."""
