"""Gather runs of train.py into the shape of the paper's Table 4, next to its numbers. What was not run stays blank.

python examples/image_classification/report.py runs --format markdown
"""

import sys

from loca_vision.recipes.classification.table import main

if __name__ == "__main__":
    sys.exit(main())
