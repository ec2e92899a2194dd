"""Evaluations: each is a module with a main, run as python -m eval.NAME from the root folder."""
