"""Train a pipeline that draws from scratch, and adapters that teach it a subject and a style: one command, no hub, no GPU.

    python examples/dreambooth/study.py subjects

Every drawing is made by this program, and every random number follows from the seed. Finished steps are not repeated, so the
command can be stopped and started again. The code is in subject_study/; the base shares parts with the study of edits, in
../instruct_pix2pix/small_base/.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "instruct_pix2pix"))  # small_base

from subject_study.run import main

if __name__ == "__main__":
    sys.exit(main())
