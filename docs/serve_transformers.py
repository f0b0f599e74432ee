"""Ask a checkpoint that was trained with --regions text, with transformers alone.

python docs/serve_transformers.py out/sft/step-001000 room.png "USER TURN"
"""

import sys

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl import Qwen2VLImageProcessorPil

folder, file, question = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(folder)
# AutoProcessor would do both, but wants torchvision for videos.
image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)

image = image_processor(Image.open(file).convert("RGB"), return_tensors="pt")
message = {
    "role": "user",
    "content": [{"type": "image"}, {"type": "text", "text": question}],
}
text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
# The template has one token for the image; the model wants one for each square of patches.
patches = int(image["image_grid_thw"].prod())
tokens = patches // image_processor.merge_size**2
text = text.replace("<|image_pad|>", "<|image_pad|>" * tokens)

inputs = tokenizer(text, return_tensors="pt")
ids = inputs["input_ids"]
written = model.generate(
    **inputs,
    **image,
    mm_token_type_ids=(ids == model.config.image_token_id).int(),
    max_new_tokens=512,
)
answer = written[0, ids.shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
