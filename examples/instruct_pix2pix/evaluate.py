"""Edit photographs with an InstructPix2Pix model and its adapters, and measure the edits.

    python examples/instruct_pix2pix/evaluate.py --pretrained_model_name_or_path timbrooks/instruct-pix2pix \
        --adapter cartoon --other cartoon-lora --photographs photos --prompt "Change the natural image to a cartoon-style image"
    python examples/instruct_pix2pix/evaluate.py --pretrained_model_name_or_path timbrooks/instruct-pix2pix \
        --adapter cartoon --pairs pairs --split test --output_dir evaluation

It writes evaluation.json, contact_sheet.png and edits/. When started again, it resumes where it was stopped.
"""

import sys
from functools import partial

from loca_vision.commands.evaluate_edit import main as evaluate_edit

main = partial(evaluate_edit, prog="evaluate.py")

if __name__ == "__main__":
    sys.exit(main())
