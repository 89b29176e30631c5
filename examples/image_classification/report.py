"""Arrange runs of train.py like the paper's Table 4, next to the paper's numbers. Cells without a run stay blank.

python examples/image_classification/report.py runs --format markdown
"""

import sys

from loca_vision.recipes.classification.table import main

if __name__ == "__main__":
    sys.exit(main())
