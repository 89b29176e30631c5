"""Fine-tune an image classifier with LoCA or another method, and test it: `loca-vision train-classifier`.

    python examples/image_classification/train.py --dataset folder --root photos --output_dir mine
    accelerate launch examples/image_classification/train.py --dataset oxford_pets --root data --preset vit-base-loca-3000

It writes the adapter, metrics.json, curves.png, config.yaml and checkpoints; evaluate.py and report.py read them.
"""

import sys

from loca_vision.recipes.classification.train import main

if __name__ == "__main__":
    sys.exit(main())
