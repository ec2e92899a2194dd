"""Exercise 3: L(1) is not a bound."""


def predictor(seen):
    """Return the probability that a bit was 1, given the bit that is seen after corruption.

    The data are independent fair bits, so no model needs less than ln 2 nats per bit. Corruption is
    that of training with uniform noise: at a rate r, uniform in (0, 1), a fair bit replaces the
    bit. Find a predictor with an L(1) below ln 2. The grader also computes its bound.
    """
    return 0.5
