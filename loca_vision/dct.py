"""The public module of the cosine transforms."""

from loca_vision.functional.dct import dct, dct2, dct_matrix, idct, idct2

__all__ = ["dct", "dct2", "dct_matrix", "idct", "idct2"]
