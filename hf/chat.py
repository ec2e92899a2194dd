"""Chat: render the model's own chat template and encode it with its special tokens."""

import json
from pathlib import Path

SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


def folder_info(folder: Path, config: dict) -> dict:
    """Return what a chat needs from the files of a Hugging Face folder: see HFTokenizer.info."""
    files = {}
    for name in ("tokenizer_config.json", "generation_config.json"):
        try:
            files[name] = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            files[name] = {}
    settings = files["tokenizer_config.json"]
    tokens = {name: settings.get(name) for name in SPECIAL_TOKENS}
    tokens = {name: t["content"] if isinstance(t, dict) else t for name, t in tokens.items() if t}
    template = settings.get("chat_template") or ""
    if isinstance(template, list):  # several, each with a name
        template = {part["name"]: part["template"] for part in template}.get("default", "")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    ends = files["generation_config.json"].get("eos_token_id", config.get("eos_token_id"))
    ends = ends if isinstance(ends, list) else [ends]
    ends = [i for i in ends if type(i) is int]
    info = {"chat_template": template, "special_tokens": tokens, "end_ids": ends}
    return {name: value for name, value in info.items() if value}
