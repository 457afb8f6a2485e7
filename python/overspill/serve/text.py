"""Text and tokens of one session: what a prompt adds to it, and what its tokens say."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

# What a decoder puts where bytes are not a character yet.
INCOMPLETE = "�"


class PromptError(ValueError):
    """A prompt that cannot be run."""


@dataclass
class Transcript:
    """What a session has been told and has said.

    Attributes:
        messages: those of its chat, its own among them.
        prompted: the text of the chat up to its last answer.
        reply: the tokens of that answer.
        shown: tokens of the reply whose text was given out.
        context: tokens of the reply from which on the next ones are decoded.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    prompted: str = ""
    reply: list[int] = field(default_factory=list)
    shown: int = 0
    context: int = 0

    def chat(self, tokenizer: Any, messages: list[dict[str, Any]], tools: Any) -> str:
        """The text that ``messages`` add. They may be only what is new, or the whole conversation, in which the
        session's own answers are what it remembers, not what is sent along.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise PromptError("this model has no chat template; use /v1/completions")
        new = messages[len(self.messages) :] if self._begins(messages) else messages
        if not new:
            raise PromptError("there is no new message")
        options: dict[str, Any] = {"tools": tools, "tokenize": False, "add_generation_prompt": True}
        try:
            whole: str = tokenizer.apply_chat_template([*self.messages, *new], **options)
        except Exception as error:
            # Templates are programs of the model's maker, and refuse by exceptions of any kind.
            raise PromptError(f"the model's chat template refuses these messages: {error}") from error
        before = self.prompted + tokenizer.decode(self.reply) if self.messages else ""
        if not whole.startswith(before):
            raise PromptError("the model's chat template cannot go on from what this session has seen")
        self.messages, self.prompted = [*self.messages, *new], whole
        return whole[len(before) :]

    def _begins(self, messages: list[dict[str, Any]]) -> bool:
        """Whether ``messages`` start with the conversation so far."""

        def seen(message: dict[str, Any]) -> Any:
            return message["role"] if message["role"] == "assistant" else message

        head = messages[: len(self.messages)]
        return [seen(one) for one in head] == [seen(one) for one in self.messages]

    def begin(self) -> None:
        """An answer begins."""
        self.reply, self.shown, self.context = [], 0, 0

    def push(self, tokenizer: Any, token: int) -> str:
        """Adds a token of the answer; the text that became certain with it.

        A token's text depends on those before it, so some of them are decoded along.
        """
        self.reply.append(token)
        before = tokenizer.decode(self.reply[self.context : self.shown], skip_special_tokens=True)
        now = tokenizer.decode(self.reply[self.context :], skip_special_tokens=True)
        if now.endswith(INCOMPLETE) or len(now) <= len(before):
            return ""
        self.context, self.shown = self.shown, len(self.reply)
        return now[len(before) :]

    def end(self, tokenizer: Any) -> None:
        """The answer is over."""
        if self.messages and self.messages[-1]["role"] != "assistant":
            content = tokenizer.decode(self.reply, skip_special_tokens=True)
            self.messages.append({"role": "assistant", "content": content})

    def to_record(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)
