"""A hostile world: see README.md."""
