"""Fine-tune Stable Diffusion to follow instructions about images (InstructPix2Pix) with LoCA or another method.

    accelerate launch examples/instruct_pix2pix/train.py --preset cartoonization \
        --pretrained_model_name_or_path timbrooks/instruct-pix2pix \
        --dataset_name instruction-tuning-sd/cartoonization --output_dir cartoon

The flags are those of diffusers' train_instruct_pix2pix.py, plus some for the adapter. The script writes the adapter,
metrics.json, loss.png, validation pictures, config.yaml and checkpoints. Load the adapter in Python with
pipe.load_loca_weights("cartoon").
"""

import sys

from loca_vision.recipes.editing.train import main

if __name__ == "__main__":
    sys.exit(main())
