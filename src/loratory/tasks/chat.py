"""Instruction and chat data: the loss counts only what the assistant says, its end-of-turn token included."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from loratory.tasks.generation import generate_texts
from loratory.tasks.likelihood import likelihood, likelihood_each, likelihood_metrics, row_losses
from loratory.tasks.rows import Rows, cell, first_row, no_columns, origin
from loratory.tasks.scores import sentence_scores, translation_scores
from loratory.tasks.task import IGNORED, Encoded, Metrics, Task, need_supervision

Message = dict[str, str]  # role (system, user, assistant) and content

# For tokenizers without a chat template of their own.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content }}\n"
    "{% elif message.role == 'user' %}User: {{ message.content }}\n"
    "{% else %}Assistant: {{ message.content }}{{ eos_token }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
PAIRS = (("prompt", "completion"), ("instruction", "output"), ("question", "answer"))
ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in ("system", "user", "assistant")}
REFERENCES = ("references", "refs")


@dataclass(frozen=True, kw_only=True)
class Chat(Task):
    """Answers to instructions, in one turn or many.

    Columns, in this order: messages (or conversations) | prompt, completion | instruction (input), output |
    question, answer | those named here. prompt_template is text with column names in braces and replaces prompt_column.
    A row without completion_column but with references_column (a list) is read with its first reference.
    """

    name: ClassVar[str] = "chat"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    best_metric: ClassVar[tuple[str, bool]] = ("token_loss", False)
    by_row: ClassVar[tuple[str, ...]] = ("token_loss", "bleu", "chrf")

    messages_column: str | None = None
    prompt_column: str | None = None
    prompt_template: str | None = None  # e.g. "Turn these facts into a sentence: {mr}"
    completion_column: str | None = None
    references_column: str | None = None  # several right answers, for BLEU and chrF
    system: str | None = None  # system message put before every row that has none
    answers: str = "all"  # assistant turns to learn: "all" or "last"
    max_new_tokens: int = 128  # when answering

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.answers not in ("all", "last"):
            raise ValueError(f"answers is '{self.answers}', but must be 'all' or 'last'")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}, but must be at least 1")
        if self.messages_column and (self.prompt_column or self.prompt_template or self.completion_column):
            raise ValueError("messages_column holds whole conversations, so prompt and completion cannot be named too")
        if self.prompt_template is not None:
            try:
                fields = [name for _, name, _, _ in string.Formatter().parse(self.prompt_template) if name is not None]
            except ValueError as error:
                raise ValueError(f"prompt_template {self.prompt_template!r} cannot be read: {error}") from None
            if not fields or not all(fields):
                raise ValueError(f"prompt_template {self.prompt_template!r} names no column; write one in braces")

    def resolve(self, rows: Rows) -> Self:
        row = first_row(rows, self.name)
        asked = self.prompt_column or self.prompt_template or self.completion_column
        messages, template = self.messages_column, self.prompt_template
        prompt, completion = self.prompt_column, self.completion_column
        if not asked and messages is None:
            messages = next((name for name in ("messages", "conversations") if name in row), None)
        if messages is None:
            for left, right in PAIRS:
                if (left in row or prompt or template) and (right in row or completion):
                    prompt = prompt or (None if template else left)
                    completion = completion or right
                    break
            if completion is None or (prompt is None and template is None):
                tried = "messages; conversations; " + "; ".join(", ".join(pair) for pair in PAIRS)
                raise no_columns(row, self.name, tried, "prompt_column= (or prompt_template=) and completion_column=")
        references = self.references_column or next((name for name in REFERENCES if name in row), None)
        task = replace(self, messages_column=messages, prompt_column=prompt, completion_column=completion)
        task = replace(task, references_column=references)
        for index, each in enumerate(rows):
            task.conversation(each, index)
        return task

    def notes(self) -> tuple[str, ...]:
        if self.messages_column:
            read = f"conversations from column '{self.messages_column}'"
        else:
            asked = f"template {self.prompt_template!r}" if self.prompt_template else f"column '{self.prompt_column}'"
            extra = " with column 'input' where it is not empty" if self.prompt_column == "instruction" else ""
            read = f"prompt from {asked}{extra}, answer from column '{self.completion_column}'"
        more = f", references from column '{self.references_column}'" if self.references_column else ""
        return (f"chat: {read}{more}; loss on {self.answers} assistant turns only",)

    # -- rows to conversations -------------------------------------------------------------------------------------

    def prompt_messages(self, row: Mapping[str, Any], index: int = 0) -> list[Message]:
        """The conversation up to the answer that is asked for."""
        if self.messages_column:
            messages = self._messages(row, index)
            return messages[:-1] if messages[-1]["role"] == "assistant" else messages
        if self.prompt_template is not None:
            text = "".join(
                literal + ("" if name is None else str(cell(row, index, name, "prompt_template", (str, int))))
                for literal, name, _, _ in string.Formatter().parse(self.prompt_template)
            )
        else:
            text = cell(row, index, self._named("prompt_column"), "prompt_column")
            if self.prompt_column == "instruction" and row.get("input"):
                text += "\n\n" + cell(row, index, "input", "prompt_column")
        return [*self._system(), {"role": "user", "content": text}]

    def references(self, row: Mapping[str, Any], index: int = 0) -> list[str]:
        """The right answers of a row: its references, else its completion, else its last assistant turn."""
        if self.references_column and self.references_column in row:
            found = cell(row, index, self.references_column, "references_column", (str, list))
            found = [found] if isinstance(found, str) else list(found)
            if not found or not all(isinstance(text, str) for text in found):
                raise TypeError(
                    f"{origin(row, index)}: column '{self.references_column}' holds {found!r:.60}, "
                    "but a list of at least one text is expected; correct the row"
                )
            return found
        if self.messages_column:
            return [message["content"] for message in self._messages(row, index)[-1:] if message["role"] == "assistant"]
        return [cell(row, index, self._named("completion_column"), "completion_column")]

    def conversation(self, row: Mapping[str, Any], index: int = 0) -> list[Message]:
        """The whole conversation, answers included."""
        if self.messages_column:
            return self._messages(row, index)
        if self.completion_column in row:
            answer = cell(row, index, self._named("completion_column"), "completion_column")
        else:
            answer = self.references(row, index)[0]
        return [*self.prompt_messages(row, index), {"role": "assistant", "content": answer}]

    def _named(self, setting: str) -> str:
        column = getattr(self, setting)
        if column is None:
            raise RuntimeError(f"task 'chat' has no {setting} yet; call task = task.resolve(rows), or name it")
        return str(column)

    def _system(self) -> list[Message]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _messages(self, row: Mapping[str, Any], index: int) -> list[Message]:
        column = self._named("messages_column")
        messages: list[Message] = []
        for turn in cell(row, index, column, "messages_column", (list,)):
            fields = turn if isinstance(turn, dict) else {}
            role, content = fields.get("role", fields.get("from")), fields.get("content", fields.get("value"))
            if role not in ROLES or not isinstance(content, str):
                raise ValueError(
                    f"{origin(row, index)}: column '{column}', turn {len(messages) + 1} is {turn!r:.80}, but an object "
                    f"with role ({', '.join(ROLES)}) and content (text) is expected; correct the row"
                )
            messages.append({"role": ROLES[role], "content": content})
        if not any(message["role"] == "user" for message in messages) or messages[0]["role"] == "assistant":
            raise ValueError(
                f"{origin(row, index)}: the conversation in column '{column}' must begin with a system or user turn "
                f"and hold a user turn (roles found: {', '.join(m['role'] for m in messages) or 'none'})"
            )
        return messages if messages[0]["role"] == "system" else self._system() + messages

    # -- conversations to tokens -----------------------------------------------------------------------------------

    def prompt_ids(self, messages: Sequence[Message], tokenizer: Any) -> list[int]:
        """Tokens to answer from: the conversation, then what opens the assistant's turn."""
        return tokenize(tokenizer, render(tokenizer, messages, open_turn=True))

    def encode(self, rows: Rows, tokenizer: Any) -> Encoded:
        first_row(rows, self.name)
        limit, special = self.length(tokenizer), special_ids(tokenizer)
        examples, origins, truncated, dropped, supervised, endless = [], [], 0, 0, 0, 0
        for index, row in enumerate(rows):
            where, messages = origin(row, index), self.conversation(row, index)
            try:
                ids, labels = mask(tokenizer, messages, special, only_last=self.answers == "last")
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            learned = [label for label in labels if label != IGNORED]
            endless += bool(learned) and learned[-1] not in special
            truncated += len(ids) > limit
            ids, labels = ids[:limit], labels[:limit]
            count = sum(label != IGNORED for label in labels)
            if count == 0:
                dropped += 1
                continue
            supervised += count
            examples.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
            origins.append(where)
        notes = []
        if not tokenizer.chat_template:
            notes.append("the tokenizer has no chat template: a plain one is used (User: ... Assistant: ...)")
        if endless:
            notes.append(f"{endless} answers end without an end-of-turn token, so the model may not learn to stop")
        encoded = Encoded(examples, origins, len(rows), truncated, dropped, supervised, tuple(notes))
        return need_supervision(encoded, self)

    # -- answers and metrics ---------------------------------------------------------------------------------------

    def reduce_logits(self, logits: Any, labels: Tensor) -> Tensor:
        return row_losses(logits, labels, shift=1)

    def metrics(self) -> Callable[[Any], Metrics]:
        return likelihood_metrics(shift=1)

    def predict(self, model: Any, tokenizer: Any, rows: Rows, batch_size: int = 8, **generation: Any) -> list[str]:
        prompts = [self.prompt_ids(self.prompt_messages(row, i), tokenizer) for i, row in enumerate(rows)]
        origins = [origin(row, i) for i, row in enumerate(rows)]
        generation = {"max_new_tokens": self.max_new_tokens} | generation
        return generate_texts(model, tokenizer, prompts, origins=origins, batch_size=batch_size, **generation)

    def score(self, predictions: Sequence[Any], rows: Rows, *, draws: int = 0) -> Metrics:
        """BLEU and chrF over the rows' references."""
        return translation_scores(predictions, [self.references(row, i) for i, row in enumerate(rows)], draws=draws)

    def score_each(self, predictions: Sequence[Any], rows: Rows, metric: str) -> list[float]:
        """BLEU (smoothed for single sentences) or chrF of each answer; their mean is not the score of all answers together."""
        references = [self.references(row, i) for i, row in enumerate(rows)]
        return sentence_scores(predictions, references, metric)

    def measure(
        self, model: Any, tokenizer: Any, rows: Rows, batch_size: int = 8, *, metric: str
    ) -> tuple[Metrics, list[float]]:
        if metric != "token_loss":
            return super().measure(model, tokenizer, rows, batch_size, metric=metric)
        encoded = self.encode(rows, tokenizer)
        return likelihood_each(model, encoded, self.collator(tokenizer), batch_size, shift=1)

    def evaluate(self, model: Any, tokenizer: Any, rows: Rows, batch_size: int = 8, *, draws: int = 0) -> Metrics:
        """Loss and perplexity for each supervised token; BLEU and chrF of greedy answers."""
        encoded = self.encode(rows, tokenizer)
        losses = likelihood(model, encoded, self.collator(tokenizer), batch_size, shift=1, draws=draws)
        return losses | super().evaluate(model, tokenizer, rows, batch_size, draws=draws)


def render(tokenizer: Any, messages: Sequence[Message], *, open_turn: bool = False) -> str:
    """The conversation as text, through the tokenizer's chat template or the plain one."""
    from jinja2 import TemplateError

    template = tokenizer.chat_template or PLAIN_TEMPLATE
    if template is PLAIN_TEMPLATE and not tokenizer.eos_token:
        raise ValueError("the tokenizer has no end-of-sequence token; set tokenizer.eos_token")
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), chat_template=template, tokenize=False, add_generation_prompt=open_turn
            )
        )
    except TemplateError as error:
        raise ValueError(f"the tokenizer's chat template refuses the conversation: {error}") from None


def tokenize(tokenizer: Any, text: str) -> list[int]:
    """Tokens of rendered text, whose special tokens are already written in it."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of tokens that stand for no text, end-of-turn tokens among them."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def mask(
    tokenizer: Any, messages: Sequence[Message], special: set[int], *, only_last: bool = False
) -> tuple[list[int], list[int]]:
    """Tokens of the conversation, and labels that are IGNORED outside the assistant's turns.

    A turn begins where the tokens leave those of the prompt that generation would start from, and ends with its last
    special token (or with its text, where the template closes a turn with none).
    """
    text = render(tokenizer, messages)
    ids = tokenize(tokenizer, text)
    labels, learned = [IGNORED] * len(ids), 0
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    for turn in turns[-1:] if only_last else turns:
        before, after = render(tokenizer, messages[:turn]), render(tokenizer, messages[: turn + 1])
        if not text.startswith(after) or not after.startswith(before):
            raise ValueError(
                f"the chat template writes turn {turn + 1} differently once later turns follow, so its tokens cannot "
                "be told apart; use answers='last', or end each row with the answer to be learned"
            )
        start = shared_prefix(ids, tokenize(tokenizer, render(tokenizer, messages[:turn], open_turn=True)))
        end = shared_prefix(ids, tokenize(tokenizer, after))
        last = max((i for i in range(start, end) if ids[i] in special), default=end - 1)
        if not tokenizer.decode(ids[last + 1 : end]).strip():
            end = last + 1
        labels[start:end] = ids[start:end]
        learned = end
    return ids[:learned], labels[:learned]  # what follows the last answer can teach nothing


def shared_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens both begin with."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))
