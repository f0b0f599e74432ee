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
content = [{"type": "image"}, {"type": "text", "text": question}]
text = tokenizer.apply_chat_template(
    [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
)
count = int(image["image_grid_thw"].prod()) // image_processor.merge_size**2
text = text.replace("<|image_pad|>", "<|image_pad|>" * count)
ids = tokenizer(text, return_tensors="pt")
is_image = (ids["input_ids"] == model.config.image_token_id).int()
written = model.generate(**ids, **image, mm_token_type_ids=is_image, max_new_tokens=512)
print(tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
