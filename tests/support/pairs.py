"""Random images for pairs, and a data set made of a list of pairs."""

import numpy as np
import torch
from PIL import Image


def picture(number, size=(12, 8)):
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


class Listed(torch.utils.data.Dataset):
    def __init__(self, pairs):
        self.pairs = pairs

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        return self.pairs[index]
