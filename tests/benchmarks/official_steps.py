"""How far fifty of our steps end from the official code's fifty, given the same weights, batches and draws.

    python -m tests.benchmarks.official_steps [--results=docs/results]

tests/official.py says what is compared with what. Every number is a share of how far the official parameters moved.
"""

from tests import official
from tests.benchmarks.measure import Table, parser_of


def main() -> None:
    parser = parser_of(__doc__)
    results = parser.parse_args().results
    steps = [f"after {step} step{'s' if step > 1 else ''}" for step in official.MEASURED_AT]
    shown = Table("official_steps", "method", *steps)
    for method in official.OPTIONS:
        shown.add(method, *(f"{apart:.1e}" for apart in official.apart(method).values()))
    shown.write(results, "python -m tests.benchmarks.official_steps")


if __name__ == "__main__":
    main()
