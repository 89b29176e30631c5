"""Compare methods on one image set at equal steps: rates tuned on validation, several seeds, accuracy against trained numbers.

    python examples/image_classification/study.py --dataset fashion_mnist --root data --output_dir study
    python examples/image_classification/study.py --dataset folder --root photographs --output_dir study --jobs 2
    python examples/image_classification/study.py --dataset folder --root photographs --output_dir study --augment none \
        --layers 'blocks.[6-9]' 'blocks.1?' --cache_features --budgets 10 30 100 300 1000 3000 --ranks 1 4 16 --seeds 0 1 2 3 4

Every run is a run of train.py. Runs that are already in runs.json are not repeated, so the command can be stopped and started
again, even with more methods, budgets and seeds. The code is in classifier_study/.
"""

import sys

from classifier_study.run import main

if __name__ == "__main__":
    sys.exit(main())
