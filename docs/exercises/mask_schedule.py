"""Exercise 3: a mask that opens short edges first.

Grade it: python -m docs.exercises.grade mask_schedule
"""


def near_first(T, share):
    """Return the edges (T, T) bool that are open in addition to the causal ones.

    Of the T (T - 1) / 2 edges from a slot to a later one, exactly round(share * T (T - 1) / 2) are
    open: short edges first, and among edges of one length those of earlier slots first. It could
    replace open_edges in ar2diff.py, which opens edges at random.
    """
    raise NotImplementedError
