"""Exercise 5, solved: the bit is as it is seen three times out of four."""


def predictor(seen):
    return 0.75 if seen else 0.25
