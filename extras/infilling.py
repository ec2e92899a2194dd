"""Templates for infilling: given text with free slots, for diffusion models."""

import re

from configurator import require


def parse_template(text: str, tokenizer, model_cfg) -> list[int]:
    """Return T - 1 ids: "ab[[2]]c" -> [97, 98, -1, -1, 99, 256, 256, ..]."""
    slots = []
    parts = re.split(r"\[\[([^\[\]]*)\]\]", text)  # text, n, text, n, .., text
    require(len(parts) > 1, f"infill: no slot is free in {text!r}; write [[12]] for 12")
    for i, part in enumerate(parts):
        if i % 2 == 0:
            slots += tokenizer.encode(part)
            continue
        valid = re.fullmatch("[0-9]{1,6}", part) and int(part)
        require(valid, f"infill: [[{part}]] is not a number of slots, such as [[12]]")
        slots += [-1] * int(part)
    free = model_cfg.target_length - 1 - len(slots)
    require(free >= 0, f"infill: {len(slots)} slots, {-free} more than the model has")
    return slots + [model_cfg.pad_id] * free
