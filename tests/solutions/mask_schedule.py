"""Exercise 3, solved."""

import torch


def near_first(T, share):
    row, column = torch.triu_indices(T, T, offset=1)
    order = ((column - row) * T + row).argsort()[: round(share * len(row))]
    opened = torch.zeros(T, T, dtype=torch.bool)
    opened[row[order], column[order]] = True
    return opened
