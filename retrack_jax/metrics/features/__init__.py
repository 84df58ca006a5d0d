"""Feature networks: each has a name and a digest that metrics quote."""
