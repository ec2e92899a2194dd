"""Chat: render the model's own chat template and encode it with its special tokens."""

import datetime
import json
from pathlib import Path

from hf import require
from hf.tokenizer import HFTokenizer, load_backend

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def folder_info(folder: Path, config: dict) -> dict:
    """Return what a chat needs from the files of a Hugging Face folder (HFTokenizer.info)."""
    files = {}
    for name in ("tokenizer_config.json", "generation_config.json"):
        path = folder / name
        files[name] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    settings = files["tokenizer_config.json"]
    tokens = {name: settings.get(name) for name in ROLES}
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


def chat_ids(tokenizer: HFTokenizer, messages: list[dict]) -> list[int]:
    """Return the ids of a conversation, up to where the assistant answers.

    messages: [{"role": "user", "content": "..."}, ...]. As in transformers, special tokens in a
    message are parsed too. Raises ValueError if there is no template, or if it fails.
    """
    text = render(tokenizer, messages)
    return load_backend(tokenizer.source).encode(text, add_special_tokens=False).ids


def end_ids(tokenizer: HFTokenizer) -> list[int]:
    """Return the ids that end an answer."""
    return tokenizer.info.get("end_ids", [])


def render(tokenizer: HFTokenizer, messages: list[dict]) -> str:
    """Return the text of a conversation by the model's template, run in jinja2's sandbox."""
    template = getattr(tokenizer, "info", {}).get("chat_template")
    if not template:
        raise ValueError("this model has no chat template; leave out --chat")
    jinja2 = require("jinja2")
    sandbox = require("jinja2.sandbox").ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    class Generation(require("jinja2.ext").Extension):
        """{% generation %} marks the answer for training. Here it only shows its content."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    extensions = ["jinja2.ext.loopcontrols", Generation]
    environment = sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    values = tokenizer.info.get("special_tokens", {}) | {"messages": messages, "tools": None}
    try:
        return environment.from_string(template).render(add_generation_prompt=True, **values)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, ArithmeticError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:160]
        raise ValueError(f"the model's chat template fails: {reason}") from None


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
