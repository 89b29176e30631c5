"""Teach a text-to-image pipeline a subject (DreamBooth), a style or a concept: `loca-vision train-image`.

    accelerate launch examples/text_to_image/train.py \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --instance_data_dir dog --instance_prompt "a photo of sks dog" --validation_prompt "a photo of sks dog in a bucket" \
        --center_crop --max_train_steps 800 --output_dir dog-loca

The flags are those of diffusers' train_text_to_image_lora.py and train_dreambooth_lora*.py, plus some for the adapter. The
script writes the adapter, metrics.json, loss.png, validation pictures, config.yaml and checkpoints. Load the adapter in Python
with pipe.load_loca_weights("dog-loca").
"""

import sys

from loca_vision.recipes.text_to_image.train import main

if __name__ == "__main__":
    sys.exit(main())
