"""The cosine transforms, where users look for them."""

from loca_vision.functional.dct import dct, dct2, dct_matrix, idct, idct2

__all__ = ["dct", "dct2", "dct_matrix", "idct", "idct2"]
