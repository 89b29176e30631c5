"""Compare rules that choose the cells of a cosine spectrum by gradients with cells chosen at random.

    python examples/image_classification/location_rules.py --root photographs --output_dir location-rules --jobs 2

Before a run, the gradients of a few batches are computed with the head of a linear probe. From them, a rule assigns a score to
every cell of the spectrum, and an adapter trains coefficients at the cells with the largest scores. Rates are tuned for each
rule and budget. Runs that are already in runs.json are not repeated. The code is in location_study/.
"""

import sys

from location_study.run import main

if __name__ == "__main__":
    sys.exit(main())
