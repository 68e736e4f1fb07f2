"""What a chat template puts around messages, so that the beginning of a message can be read before the rest is known.

A context and a question about it are one user message, the context first. The parts are tokenized one by one, so the
context has the same tokens whatever is asked about it:

    head context | question tail | answer | between question tail | answer ...
"""

from typing import Any

_BODY = "thebodyofthemessage"


def around_message(tokenizer: Any, **options: Any) -> tuple[str, str]:
    """What comes before and after the one user message, up to where the answer begins; without a template, the token
    that begins texts, and a new line.

    Args:
        options: what the template is told beside the messages, such as enable_thinking=False.

    Raises:
        ValueError: the template does not show the message once and as it is.
    """
    if not has_template(tokenizer):
        return tokenizer.bos_token or "", "\n"
    head, tail = _parted(_rendered(tokenizer, ("user",), options), 0)
    return head, tail


def between_messages(tokenizer: Any, **options: Any) -> str:
    """What comes between an answer and the user's next message; without a template, a new line.

    Args:
        options: as in `around_message`.

    Raises:
        ValueError: the template does not show each message once and as it is.
    """
    if not has_template(tokenizer):
        return "\n"
    _, after = _parted(_rendered(tokenizer, ("user", "assistant", "user"), options), 1)
    return _parted(after, 2)[0]


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer says how a conversation is written."""
    return bool(getattr(tokenizer, "chat_template", None))


def _rendered(tokenizer: Any, roles: tuple[str, ...], options: dict[str, Any]) -> str:
    """Messages of these roles, whose contents can be found again, up to where an answer begins."""
    messages = [{"role": role, "content": f"{_BODY}{number}"} for number, role in enumerate(roles)]
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    except Exception as error:
        # of the template's own language, or what its author raises
        raise ValueError(f"the tokenizer's chat template cannot write {', '.join(roles)} messages: {error}") from error
    return text


def _parted(text: str, number: int) -> list[str]:
    """What comes before and after one of these messages."""
    parts = text.split(f"{_BODY}{number}")
    if len(parts) != 2:
        raise ValueError(
            "the tokenizer's chat template must show a message once and as it is, so that context and question can be "
            f"told apart; it shows message {number} {len(parts) - 1} times"
        )
    return parts
