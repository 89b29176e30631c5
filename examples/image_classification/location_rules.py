"""Where should the components of a cosine spectrum stand? Rules that choose cells by gradients, against random ones.

    python examples/image_classification/location_rules.py --root photographs --output_dir location-rules --jobs 2

Before a run the gradients of a few batches are taken, with the head of a linear probe. By them a rule gives every cell of the
spectrum a score, and an adapter learns coefficients at the cells of the largest scores. Rates are tuned for each rule and
budget. What is in runs.json is not run again. The code is in location_study/.
"""

import sys

from location_study.run import main

if __name__ == "__main__":
    sys.exit(main())
