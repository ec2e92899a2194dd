"""Chat: render the model's own chat template and encode it with its special tokens."""

import datetime
import functools
import json
import re
from pathlib import Path

from configurator import require
from hf import explained, optional, read_json, read_text
from hf.tokenizer import HFTokenizer


def folder_info(folder: Path, config: dict) -> dict:
    """Return what a chat needs from the files of a Hugging Face folder (HFTokenizer.info)."""
    names = ("tokenizer_config.json", "generation_config.json")
    paths = [folder / name for name in names]
    settings, generation = (read_json(path) if path.is_file() else {} for path in paths)
    tokens = {n: t for n, t in settings.items() if n.endswith("_token") and type(t) in (str, dict)}
    template = settings.get("chat_template")
    with explained(f"{paths[0].name}: a special token or a template lacks its text"):
        tokens = {name: t["content"] if type(t) is dict else t for name, t in tokens.items()}
        if isinstance(template, list):  # several, each with a name
            template = {part["name"]: part["template"] for part in template}.get("default")
    if (folder / "chat_template.jinja").is_file():
        template = read_text(folder / "chat_template.jinja")
    ends = generation.get("eos_token_id", config.get("eos_token_id"))
    ends = [i for i in (ends if isinstance(ends, list) else [ends]) if type(i) is int]
    info = {"chat_template": template, "special_tokens": tokens, "end_ids": ends}
    return {name: value for name, value in info.items() if value}


def chat_ids(tokenizer: HFTokenizer, messages: list[dict]) -> list[int]:
    """Return the ids of a conversation, up to where the assistant answers.

    messages: [{"role": "user", "content": "..."}, ...]. As in transformers, special tokens in a
    message are parsed too. Raises ValueError if there is no template, or if it fails.
    """
    text = render(tokenizer, messages)
    return tokenizer.chat_backend.encode(text, add_special_tokens=False).ids


def end_ids(tokenizer: HFTokenizer) -> list[int]:
    """Return the ids that end an answer."""
    return tokenizer.info.get("end_ids", [])


def render(tokenizer: HFTokenizer, messages: list[dict]) -> str:
    """Return the text of a conversation by the model's template, run in jinja2's sandbox."""
    template = getattr(tokenizer, "info", {}).get("chat_template")
    require(template and type(template) is str, "this model has no chat template; leave out --chat")
    sandbox = optional("jinja2.sandbox").ImmutableSandboxedEnvironment
    loops = ["jinja2.ext.loopcontrols"]
    environment = sandbox(trim_blocks=True, lstrip_blocks=True, extensions=loops)
    # jinja2's own filter writes JSON for HTML, which transformers does not.
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = functools.partial(require, False)
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    # {% generation %} marks the answer for training. Here it only shows its content.
    template = re.sub(r"(\{%[-+]?\s*)generation\b", r"\1if true", template)
    template = re.sub(r"(\{%[-+]?\s*)endgeneration\b", r"\1endif", template)
    values = tokenizer.info.get("special_tokens", {}) | {"messages": messages, "tools": None}
    with explained("the model's chat template fails"):
        return environment.from_string(template).render(add_generation_prompt=True, **values)
