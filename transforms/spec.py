"""Pipeline text: `quest{weight-bits=1},sta{tile=6,8,8 window=3,3,3}` <-> passes.

Grammar: `pass ("," pass)*`; `pass = name ["{" (key "=" value)* "}"]`; `value = item ("," item)*`;
item = number | true | false | none | word | "quoted"; `none` alone is also the empty tuple. Errors
point a caret at the column.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin

from resplice.errors import SpecError
from resplice.pass_base import Pass, option_name
from resplice.registry import pass_class

_TOKEN = re.compile(r'\s*(?:(?P<quoted>"(?:[^"\\]|\\.)*")|(?P<punct>[{}=,])|(?P<word>[^\s{}=,"]+))')


def parse(text: str) -> tuple[Pass, ...]:
    """Read pipeline text.

    Raises:
        SpecError: With the text and a caret under the offending column.
    """
    return _Parser(text).pipeline()


def print_passes(passes: typing.Iterable[Pass]) -> str:
    """Canonical text of passes; `parse` reads it back."""
    return ",".join(map(print_pass, passes))


def print_pass(item: Pass) -> str:
    """Canonical text of one pass: options in field order, defaults left out."""
    changed = [
        f"{option_name(f.name)}={_print_value(getattr(item, f.name))}"
        for f in fields(item)
        if getattr(item, f.name) != f.default
    ]
    return item.name + (f"{{{' '.join(changed)}}}" if changed else "")


class Quoted(str):
    """A quoted value: always text, so `"none"` is not nothing."""

    __slots__ = ()


def _print_value(value: Any) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, tuple):
        return ",".join(map(_print_value, value))
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    plain = re.fullmatch(r'[^\s{}=,"]+', text) and text != "none"
    return text if plain else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


class _Parser:
    def __init__(self, text: str) -> None:
        self.text, self.tokens, position = text, [], 0
        while text[position:].strip():
            found = _TOKEN.match(text, position)
            if not found:
                raise SpecError("unfinished quoted text", text=text, column=position)
            kind = str(found.lastgroup)
            self.tokens.append((kind, found[kind], found.start(kind)))
            position = found.end()
        self.index = 0

    def pipeline(self) -> tuple[Pass, ...]:
        if not self.tokens:
            raise SpecError("the pipeline is empty", hint="name at least one pass, such as quest")
        passes = [self.one_pass()]
        while self.index < len(self.tokens):
            self.expect(",", "between passes")
            passes.append(self.one_pass())
        return tuple(passes)

    def one_pass(self) -> Pass:
        name, column = self.word("a pass name")
        cls = pass_class(name, text=self.text, column=column)
        values: dict[str, Any] = {}
        if self.peek() == "{":
            self.index += 1
            while self.peek() != "}":
                if self.peek() is None:
                    raise SpecError(
                        "expected '}', found the end", text=self.text, column=len(self.text)
                    )
                self.option(cls, values)
            self.index += 1
        try:
            return cls(**values)
        except SpecError as error:
            raise SpecError(error.what, text=self.text, column=column, hint=error.hint) from error

    def option(self, cls: type[Pass], values: dict[str, Any]) -> None:
        key, column = self.word("an option")
        known = {option_name(f.name): f.name for f in fields(cls)}
        key = key.replace("_", "-")
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
            hint = (
                f"did you mean {near[0]}?" if near else f"options are {', '.join(known) or 'none'}"
            )
            raise SpecError(
                f"{cls.name} has no option {key!r}", text=self.text, column=column, hint=hint
            )
        if known[key] in values:
            raise SpecError(f"{cls.name}: {key} is given twice", text=self.text, column=column)
        self.expect("=", f"after {key}")
        start = self.column()
        items = [self.item()]
        while self.peek() == "," and self.peek(1) not in ("}", None):
            self.index += 1
            items.append(self.item())
        kind = typing.get_type_hints(cls)[known[key]]
        try:
            values[known[key]] = convert(items, kind)
        except ValueError as error:
            raise SpecError(f"{cls.name}: {key} {error}", text=self.text, column=start) from error

    def item(self) -> str:
        kind, text, _ = self.next("a value")
        if kind == "quoted":
            return Quoted(re.sub(r"\\(.)", r"\1", text[1:-1]))
        if kind != "word":
            raise SpecError(
                f"expected a value, found {text!r}", text=self.text, column=self.column(-1)
            )
        return text

    def word(self, wanted: str) -> tuple[str, int]:
        kind, text, column = self.next(wanted)
        if kind != "word":
            raise SpecError(f"expected {wanted}, found {text!r}", text=self.text, column=column)
        return text, column

    def expect(self, symbol: str, wanted: str) -> None:
        _, text, column = self.next(f"{symbol!r} {wanted}")
        if text != symbol:
            raise SpecError(
                f"expected {symbol!r} {wanted}, found {text!r}", text=self.text, column=column
            )

    def next(self, wanted: str) -> tuple[str, str, int]:
        if self.index >= len(self.tokens):
            raise SpecError(
                f"expected {wanted}, found the end", text=self.text, column=len(self.text)
            )
        self.index += 1
        return self.tokens[self.index - 1]

    def peek(self, ahead: int = 0) -> str | None:
        index = self.index + ahead
        return self.tokens[index][1] if index < len(self.tokens) else None

    def column(self, offset: int = 0) -> int:
        index = self.index + offset
        return self.tokens[index][2] if index < len(self.tokens) else len(self.text)


def convert(items: list[str], kind: Any) -> Any:
    """Convert text items to an option's type.

    Raises:
        ValueError: Says what was expected.
    """
    origin, args = get_origin(kind), get_args(kind)
    nothing = len(items) == 1 and items[0] == "none" and not isinstance(items[0], Quoted)
    if origin in (Union, types.UnionType):
        return None if nothing and type(None) in args else _first_fitting(items, args)
    if origin is tuple and nothing and args[1:] in ((), (...,)):
        return ()
    if origin is tuple:
        inner = args[0]
        if len(args) > 1 and args[1] is not ... and len(items) != len(args):
            raise ValueError(f"takes {len(args)} items, got {len(items)}")
        return tuple(convert([item], inner) for item in items)
    if len(items) != 1:
        raise ValueError(f"takes one value, got {len(items)}")
    (item,) = items
    if origin is Literal:
        if item not in map(str, args):
            raise ValueError(f"must be one of {', '.join(map(str, args))}, not {item!r}")
        return next(a for a in args if str(a) == item)
    return _scalar(item, kind)


def _first_fitting(items: list[str], kinds: tuple[Any, ...]) -> Any:
    for kind in (k for k in kinds if k is not type(None)):
        try:
            return convert(items, kind)
        except ValueError:
            continue
    raise ValueError(f"can't be {','.join(items)!r}")


def _scalar(item: str, kind: Any) -> Any:
    if kind is bool:
        if item not in ("true", "false"):
            raise ValueError(f"must be true or false, not {item!r}")
        return item == "true"
    try:
        return kind(str(item))
    except ValueError:
        raise ValueError(
            f"must be {'a whole number' if kind is int else 'a number'}, not {item!r}"
        ) from None
