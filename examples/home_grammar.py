"""The Home Assistant intent grammar, forwards and backwards: template to command, command to answer."""

import itertools
import json
import random
from dataclasses import dataclass
from typing import Any

from examples.home_names import NOUNS, Home

try:
    import hassil.expression as grammar
    from hassil.intents import Intents, RangeSlotList, SlotList, TextSlotList, TextSlotValue
    from hassil.numbers import get_rbnf_engine
    from hassil.recognize import recognize_best
    from hassil.util import normalize_whitespace
    from home_assistant_intents import get_intents
except ImportError as error:
    raise SystemExit(f"error: {error.name} is missing: pip install hassil home-assistant-intents") from error

NUMBER_WORDS = 0.1  # "forty-two" for 42


def load_intents() -> Intents:
    """The English grammar of the installed package."""
    data: Any = get_intents("en")
    intents = Intents.from_dict(data)
    for values in intents.slot_lists.values():
        # hassil 3.12 caches number words by range, without the multiplier: once "volume down by ten" was
        # read, "brightness ten" is -10 as well. So the few lists that multiply take digits only.
        if isinstance(values, RangeSlotList) and values.multiplier is not None:
            values.words = False
    return intents


@dataclass(frozen=True, eq=False)  # a template is itself, and so can be counted
class Template:
    """All places where an intent uses one template string; they never part between splits."""

    intent: str
    text: str
    blocks: tuple[tuple[grammar.Sentence, dict[str, Any], dict[str, Any]], ...]  # with fixed slots and needed context
    sense: frozenset[str]  # slot names, fixed values and domains: templates of an intent that share it are paraphrases

    @property
    def group(self) -> tuple[str, frozenset[str]]:
        return self.intent, self.sense


class Expander:
    """Draws one random command of a template, with its slots and its skeleton (names left as `{name}`)."""

    def __init__(self, intents: Intents, home: Home) -> None:
        self.intents, self.home = intents, home
        self.engine = get_rbnf_engine("en")

    def expand(self, template: Template, split: str, rng: random.Random) -> tuple[str, str, dict]:
        sentence, fixed, context = rng.choice(template.blocks)
        self.rng, self.split, self.slots = rng, split, dict(fixed)
        self.domain = rng.choice(context.get("domain") or [""])
        text, skeleton = self._draw(sentence.expression)
        return normalize_whitespace(text).strip(), normalize_whitespace(skeleton).strip(), self.slots

    def _draw(self, node: grammar.Expression) -> tuple[str, str]:
        if isinstance(node, grammar.TextChunk):
            return node.original_text, node.original_text
        if isinstance(node, grammar.Alternative):
            return self._draw(self.rng.choice(node.items))
        if isinstance(node, grammar.Group):
            items, glue = node.items, ""
            if isinstance(node, grammar.Permutation):
                items, glue = self.rng.sample(items, len(items)), " "
            texts, skeletons = zip(*map(self._draw, items), strict=True)
            return glue.join(texts), glue.join(skeletons)
        if isinstance(node, grammar.RuleReference):
            return self._draw(self.intents.expansion_rules[node.rule_name].expression)
        assert isinstance(node, grammar.ListReference), node
        text, value = self._fill(node.list_name)
        if node.slot_name in self.slots:  # "2 hours ... half": the recogniser would keep one of the two
            raise LookupError(f"slot {node.slot_name} is filled twice")
        self.slots[node.slot_name] = value
        text = f"{node.prefix or ''}{text}{node.suffix or ''}"
        return text, f"{{{node.list_name}}}"

    def _fill(self, list_name: str) -> tuple[str, object]:
        values = self.intents.slot_lists.get(list_name)
        if isinstance(values, TextSlotList):
            chosen = self.rng.choice(values.values)
            return self._draw(chosen.text_in)[0], chosen.value_out
        if isinstance(values, RangeSlotList):
            number = self.rng.choice(list(values.get_numbers()))
            text = str(number)
            if values.words and isinstance(number, int) and number <= 100 and self.rng.random() < NUMBER_WORDS:
                text = self.engine.format_number(number).text_by_ruleset["spellout-cardinal"]
            return text, _plain(number * (values.multiplier or 1))
        name = self.home.draw(self.rng, self.domain if list_name == "name" else list_name, self.split)
        return name, name


def _plain(value: object) -> object:
    """A whole float as an int, as the recogniser and the grammar disagree about -30 and -30.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def answer_json(intent: str, slots: dict) -> str:
    return json.dumps({"intent": intent, "slots": slots}, ensure_ascii=False, sort_keys=True)


class Recogniser:
    """Home Assistant's own reading of a command, in the form of the task's answer."""

    SATELLITE = "(where the speaker stands)"  # stands for "here": never said, so never part of an answer

    def __init__(self, intents: Intents, home: Home) -> None:
        names = [value for key in (*NOUNS, "person", "weather") for value in self._values(home, key, {"domain": key})]
        self.intents = intents
        self.lists: dict[str, SlotList] = {
            "name": TextSlotList("name", names),
            "area": TextSlotList("area", self._values(home, "area")),
            "floor": TextSlotList("floor", self._values(home, "floor")),
        }

    @staticmethod
    def _values(home: Home, key: str, context: dict[str, str] | None = None) -> list[TextSlotValue]:
        every = itertools.chain.from_iterable(home.parts[key].values())
        return [TextSlotValue(grammar.TextChunk(name), name, context) for name in every]

    def answer(self, command: str) -> str | None:
        here = {"area": self.SATELLITE}
        best = recognize_best(command, self.intents, self.lists, intent_context=here, best_slot_name="name")
        if best is None:
            return None
        slots = {name: _plain(entity.value) for name, entity in best.entities.items()}
        return answer_json(best.intent.name, {k: v for k, v in slots.items() if v != self.SATELLITE})


def read_templates(intents: Intents) -> list[Template]:
    """The grammar's templates, one per (intent, template string)."""
    found: dict[tuple[str, str], list[tuple]] = {}
    senses: dict[tuple[str, str], set[str]] = {}
    for name, intent in intents.intents.items():
        for number, data in enumerate(intent.data):
            for sentence in data.sentences:
                key = name, str(sentence.text)
                found.setdefault(key, []).append((sentence, data.slots, data.requires_context))
                expression: Any = sentence.expression  # always a group, though not declared so
                sense = {ref.slot_name for ref in expression.list_references(intents.expansion_rules)}
                sense |= {f"{slot}={value}" for slot, value in data.slots.items()}
                # "lock {name}" and "press {name}" turn different things on, and neither tells of the other.
                sense |= {f"needs {domain}" for domain in data.requires_context.get("domain", ())}
                # Without slots ("who made you", "hello") only the grammar's own block says what is alike.
                senses.setdefault(key, set()).update(sense or {f"block {number}"})
    return [Template(*key, tuple(blocks), frozenset(senses[key])) for key, blocks in found.items()]
