"""Plain float64 implementations, written from the equations, that tests compare against."""
