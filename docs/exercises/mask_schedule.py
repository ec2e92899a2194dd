"""Exercise 3: a mask that opens from near slots to far. Grade it: python -m docs.exercises.grade mask_schedule"""


def near_first(T, share):
    """Edges (T, T) bool that are open beside the causal ones, when a share of 0 to 1 of all later slots may be seen.

    Of the T (T - 1) / 2 edges from a slot to a later one, exactly round(share * T (T - 1) / 2) are open: the shortest
    first, and among equally long ones that of the earlier slot. It has the place of open_edges in anneal.py, which
    opens edges at random.
    """
    raise NotImplementedError
