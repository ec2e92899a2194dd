"""Exercise 3, solved: three times out of four a bit is what is seen."""


def predictor(seen):
    return 0.75 if seen else 0.25
