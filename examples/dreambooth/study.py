"""From nothing to a pipeline that draws, and adapters that teach it a subject and a style: one command, no hub, no GPU.

    python examples/dreambooth/study.py subjects

Every drawing is made by this program, and every random number follows from the seed. What is finished is not done again, so
that the command may be stopped and given anew. The code is in subject_study/; parts of the base are those of the study of
edits, in ../instruct_pix2pix/small_base/.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "instruct_pix2pix"))  # small_base

from subject_study.run import main

if __name__ == "__main__":
    sys.exit(main())
