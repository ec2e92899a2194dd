"""Exercise 5: L(1) is no bound on the likelihood. Grade it: python -m docs.exercises.grade bound"""


def predictor(seen):
    """The probability that a bit was 1, given what is seen of it, 0 or 1, after corruption.

    The data are independent fair bits: nobody can say them in less than ln 2 = 0.693 nats a bit. The corruption is that
    of training, with uniform noise: at a rate r, uniform in (0, 1), a bit is replaced by a fair one. Give the predictor
    an L(1) below ln 2, and see what the same predictor costs by the bound of eval/bound.py.
    """
    return 0.5
