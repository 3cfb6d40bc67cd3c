"""The story world: a seeded grammar that knows the exact probability of every text it writes.

A story is a sequence of turns, each one to two sentences of one kind:

    place     The lamp is at Hilltop.            The kite is with Nora.
    person    Tara really likes plums.           Otto lives in Elmford.
    event     Otto put the lamp at Oldgate.      Otto took the lamp to Oldgate.    Otto gave the lamp to Nora.
    question  Where is the lamp? The lamp is at Oldgate.       What does Tara like? Tara really likes plums.
              Where does Otto live? Otto lives in Elmford.
    sum       7 plus 5 is 12.                    12 minus 5 is 7.
    song      Nora sang: reed fern dusk hail wave.     (word for word the same whenever Nora sings)
    weather   In the evening the wind was cold.

Every choice depends only on the text so far: who or what comes next is a new name with probability a / (a + n) after n
different names, else one of those n (the Chinese restaurant rule), so there is no hidden cast list; and no text can be
written in two ways. The log-probability of a story is therefore the plain sum of the logarithms of its choices, and its
negative mean per token is the entropy floor: no model can do better on average.

Places, persons and answers have two words between a name and its value ("lamp is at Oldgate", "Tara really likes
plums"). A first layer that looks a fixed distance back then serves all facts alike; with "Tara likes plums" a model of
this size learned the objects' facts and never the people's.

Answers, the later words of a known song and the results of sums are not choices. The story marks them (`Span`), which
is what the recall measurements of `refllm.model.probe` read.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

_words = lambda text: tuple(text.split())


@dataclass(frozen=True)
class Span:
    """Tokens of a story that its past determines.

    kind : object-place, object-person, likes, home (answers), song, sum. start, stop : positions in `Story.tokens`.
    distance : tokens between the value and its latest earlier mention for the same key; 0 for sums.
    """

    kind: str
    start: int
    stop: int
    distance: int


@dataclass
class Story:
    """One text: `tokens` (words with their leading space, and punctuation), `spans`, and after each turn in `turns`:
    (number of tokens so far, log-probability in nats of the text so far)."""

    tokens: list[str] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    turns: list[tuple[int, float]] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The story as one line (the first word has no leading space)."""
        return "".join(self.tokens)[1:]

    @property
    def log_probability(self) -> float:
        """Nats, of all complete turns."""
        return self.turns[-1][1] if self.turns else 0.0


@dataclass(frozen=True)
class World:
    """Vocabulary and habits of the story world; the defaults are the world of the bundled model.

    turn_weights : relative frequency of the kinds of turn when the kind is drawn anew.
    stay : probability that the kind of the last turn is kept instead.
    newness : the `a` of the Chinese restaurant rule, for people, objects and singers.
    largest_sum : results of sums, and minuends, go up to this; operands are 1..largest_sum // 2.
    """

    people: tuple[str, ...] = _words("Tara Otto Nora Emil Ruth Hugo Vera Igor Lena Ivan Wanda Felix")
    objects: tuple[str, ...] = _words(
        "lamp kite drum rope vase comb flute mirror basket hammer ladder candle needle saddle whistle compass kettle "
        "broom bell map"
    )
    places: tuple[str, ...] = _words(
        "Hilltop Riverside Oldgate Northwood Southbank Westgate Lowtown Highmoor Brookside Lakeside Parkhill Churchend "
        "Millside Longfield Eastport Newbridge"
    )
    foods: tuple[str, ...] = _words(
        "plums bread honey soup cheese olives figs beans rice grapes walnuts cake carrots berries"
    )
    towns: tuple[str, ...] = _words(
        "Elmford Redhill Stonebury Millwick Seaton Oakham Foxdale Ironbridge Lakemoor Windham Greenport Ashby "
        "Marshend Kingsley"
    )
    lyrics: tuple[str, ...] = _words(
        "reed fern dusk hail wave moss dawn frost cloud pearl leaf crow owl swan trout rain sand salt gold ash thorn "
        "ivy clover lily star moon ember smoke tide shell pine birch spark dew hawk wren fox hare storm glow "
        "amber anchor arrow banner barley beacon bramble bronze cedar chalk coral cotton cradle crystal dagger daisy "
        "desert diamond eagle feather fiddle finch flame flint fog granite gull harvest hazel hollow hymn island jewel "
        "kernel lantern lark linen marble mist nettle oak oyster petal pigeon poppy quill raven ribbon robin ruby sail "
        "silver thistle thunder timber velvet violet willow winter wolf yarrow"
    )
    moments: tuple[str, ...] = _words("morning evening winter summer")
    weathers: tuple[str, ...] = _words("wind sky sea air river road")
    moods: tuple[str, ...] = _words("cold calm grey bright wild quiet")
    song_length: int = 6
    largest_sum: int = 18
    turn_weights: tuple[tuple[str, float], ...] = (
        ("place", 8.0),
        ("person", 12.0),
        ("event", 12.0),
        ("question", 46.0),
        ("sum", 6.0),
        ("song", 12.0),
        ("weather", 4.0),
    )
    stay: tuple[tuple[str, float], ...] = (
        ("place", 0.3),
        ("person", 0.4),
        ("event", 0.3),
        ("question", 0.2),
        ("sum", 0.2),
        ("song", 0.0),
        ("weather", 0.0),
    )
    newness: float = 1.5
    newness_singers: float = 0.4

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """Every token the world can write, sorted."""
        fixed = "The the is at with in really likes lives put took gave to Where What does like live plus minus sang"
        numbers = (str(i) for i in range(self.largest_sum + 1))
        named = (*self.people, *self.objects, *self.places, *self.foods, *self.towns, *self.lyrics)
        names = (*named, *self.moments, *self.weathers, *self.moods)
        return tuple(sorted({" " + w for w in (*fixed.split(), "In", "was", *numbers, *names)} | set(".?:")))

    @property
    def longest_turn(self) -> int:
        """Upper bound on the tokens of one turn."""
        return max(11, 4 + self.song_length)

    def story(self, seed: int | str, length: int) -> Story:
        """Write one story.

        Parameters
        ----------
        seed : int or str
            Same seed, same story (`random.Random`, the same on every platform).
        length : int
            Upper bound on the tokens. The story stops after the first turn that leaves no room for a longest turn; when
            it stops depends on the text so far only, so stopping costs no probability.

        Returns
        -------
        Story

        Raises
        ------
        ValueError
            If `length` has no room for one turn.
        """
        if length < self.longest_turn:
            raise ValueError(f"a story needs room for one turn, {self.longest_turn} tokens, got {length}")
        return write(self, Dice(random.Random(seed)), length)


class Dice:
    """Draws choices and adds up their log-probability in nats."""

    def __init__(self, source: random.Random):
        self.source = source
        self.log_probability = 0.0

    def uniform(self, options: Sequence):
        """One of the options, all equally likely."""
        if len(options) > 1:
            self.log_probability -= math.log(len(options))
        return options[int(self.source.random() * len(options))]

    def weighted(self, options: Sequence, weights: Sequence[float]):
        """One of the options, in proportion to the weights (those with weight 0 are never drawn)."""
        whole = sum(weights)
        point = self.source.random() * whole
        for option, weight in zip(options, weights, strict=True):
            if weight > 0:
                chosen, chance = option, weight
                point -= weight
                if point < 0:
                    break
        self.log_probability += math.log(chance / whole)
        return chosen


def write(world: World, dice: Dice, length: int | None = None, turns: int | None = None) -> Story:
    """Write a story with a given source of choices, up to `length` tokens (as `World.story`) or some `turns`."""
    story, state = Story(), _State(world)
    limit = math.inf if length is None else length - world.longest_turn
    while len(story.tokens) <= limit and (turns is None or len(story.turns) < turns):
        kind = _next_kind(world, state, dice)
        _WRITERS[kind](state, story, dice)
        state.last_kind = kind
        story.turns.append((len(story.tokens), dice.log_probability))
    return story


class _State:
    """What the text so far says; everything in it can be read off the text."""

    def __init__(self, world: World):
        self.world = world
        self.last_kind: str | None = None
        self.seen_people: list[str] = []
        self.seen_objects: list[str] = []
        self.songs: dict[str, tuple[str, ...]] = {}
        self.song_at: dict[str, int] = {}
        # key -> value; a key is (relation, name) with relation "where", "likes" or "home"
        self.facts: dict[tuple[str, str], tuple[str, str]] = {}
        self.said_at: dict[tuple[str, str], int] = {}  # position of the latest mention of the key's value
        self.last_asked: tuple[str, str] | None = None

    def state_fact(self, story: Story, relation: str, name: str, value: tuple[str, str], back: int) -> None:
        """Note a fact whose value stands `back` tokens before the end of the story."""
        key = (relation, name)
        self.facts[key], self.said_at[key] = value, len(story.tokens) - back
        if self.last_asked == key:
            self.last_asked = None

    def undecided_people(self) -> list[str]:
        """People of whom the text has not yet said both what they like and where they live."""
        return [p for p in self.seen_people if ("likes", p) not in self.facts or ("home", p) not in self.facts]


def _pick(dice: Dice, known: Sequence[str], fresh: Sequence[str], newness: float) -> str:
    """Chinese restaurant rule: a fresh name with probability a / (a + n), else one of the n known ones."""
    if known and fresh:
        pool = dice.weighted((fresh, known), (newness, len(known)))
    else:
        pool = known or fresh
    return dice.uniform(pool)


def _person(state: _State, dice: Dice, but: str | None = None) -> str:
    known = [p for p in state.seen_people if p != but]
    fresh = [p for p in state.world.people if p not in state.seen_people and p != but]
    name = _pick(dice, known, fresh, state.world.newness)
    _see(state.seen_people, name)
    return name


def _see(seen: list[str], name: str) -> None:
    if name not in seen:
        seen.append(name)


def _next_kind(world: World, state: _State, dice: Dice) -> str:
    """Keep the last kind with its `stay` probability, else draw by weight; only kinds that can be written now count."""
    possible = {
        "place": len(state.seen_objects) < len(world.objects),
        "person": len(state.seen_people) < len(world.people) or bool(state.undecided_people()),
        "question": any(key != state.last_asked for key in state.facts),
    }
    kinds = [kind for kind, weight in world.turn_weights if weight > 0 and possible.get(kind, True)]
    weights = [weight for kind, weight in world.turn_weights if kind in kinds]
    if state.last_kind in kinds:
        stay = dict(world.stay)[state.last_kind]
        whole = sum(weights)
        weights = [
            (1 - stay) * weight / whole + (stay if kind == state.last_kind else 0.0)
            for kind, weight in zip(kinds, weights, strict=True)
        ]
    return dice.weighted(kinds, weights)


def _say(story: Story, *words: str) -> None:
    story.tokens.extend(word if word in ".?:" else " " + word for word in words)


def _write_place(state: _State, story: Story, dice: Dice) -> None:
    thing = dice.uniform([o for o in state.world.objects if o not in state.seen_objects])
    _see(state.seen_objects, thing)
    if dice.uniform(("at", "with")) == "at":
        value = ("at", dice.uniform(state.world.places))
    else:
        value = ("with", _person(state, dice))
    _say(story, "The", thing, *_where(value), ".")
    state.state_fact(story, "where", thing, value, 2)


def _where(value: tuple[str, str]) -> tuple[str, ...]:
    return ("is", *value)


def _write_person(state: _State, story: Story, dice: Dice) -> None:
    world = state.world
    fresh = [p for p in world.people if p not in state.seen_people]
    name = _pick(dice, state.undecided_people(), fresh, world.newness)
    _see(state.seen_people, name)
    relation = dice.uniform([r for r in ("likes", "home") if (r, name) not in state.facts])
    if relation == "likes":
        value = ("likes", dice.uniform(world.foods))
        _say(story, name, "really", "likes", value[1], ".")
    else:
        value = ("home", dice.uniform(world.towns))
        _say(story, name, "lives", "in", value[1], ".")
    state.state_fact(story, relation, name, value, 2)


def _write_event(state: _State, story: Story, dice: Dice) -> None:
    world = state.world
    giver = _person(state, dice)
    verb = dice.uniform(("put", "took", "gave"))
    fresh = [o for o in world.objects if o not in state.seen_objects]
    thing = _pick(dice, state.seen_objects, fresh, world.newness)
    _see(state.seen_objects, thing)
    if verb == "gave":
        value = ("with", _person(state, dice, but=giver))
        _say(story, giver, "gave", "the", thing, "to", value[1], ".")
    else:
        value = ("at", dice.uniform(world.places))
        _say(story, giver, verb, "the", thing, "at" if verb == "put" else "to", value[1], ".")
    state.state_fact(story, "where", thing, value, 2)


def _write_question(state: _State, story: Story, dice: Dice) -> None:
    # The longer a fact has not been mentioned, the likelier the question: distances of hundreds of tokens are common.
    keys = [key for key in state.facts if key != state.last_asked]
    relation, name = key = dice.weighted(keys, [len(story.tokens) - state.said_at[key] for key in keys])
    word, value = state.facts[key]
    if relation == "where":
        _say(story, "Where", "is", "the", name, "?")
        kind, answer = "object-place" if word == "at" else "object-person", ("The", name, *_where((word, value)), ".")
    elif relation == "likes":
        _say(story, "What", "does", name, "like", "?")
        kind, answer = "likes", (name, "really", "likes", value, ".")
    else:
        _say(story, "Where", "does", name, "live", "?")
        kind, answer = "home", (name, "lives", "in", value, ".")
    start = len(story.tokens)
    _say(story, *answer)
    at = len(story.tokens) - 2
    story.spans.append(Span(kind, start, len(story.tokens), at - state.said_at[key]))
    state.said_at[key], state.last_asked = at, key


def _write_sum(state: _State, story: Story, dice: Dice) -> None:
    half = range(1, state.world.largest_sum // 2 + 1)
    a, b = dice.uniform(half), dice.uniform(half)
    if dice.uniform(("plus", "minus")) == "plus":
        _say(story, str(a), "plus", str(b), "is", str(a + b), ".")
    else:
        _say(story, str(a + b), "minus", str(b), "is", str(a), ".")
    story.spans.append(Span("sum", len(story.tokens) - 2, len(story.tokens), 0))


def _write_song(state: _State, story: Story, dice: Dice) -> None:
    world = state.world
    fresh = [p for p in world.people if p not in state.songs]
    singer = _pick(dice, tuple(state.songs), fresh, world.newness_singers)
    _see(state.seen_people, singer)
    known = singer in state.songs
    if not known:
        state.songs[singer] = tuple(dice.uniform(world.lyrics) for _ in range(world.song_length))
    _say(story, singer, "sang", ":")
    start = len(story.tokens)
    _say(story, *state.songs[singer], ".")
    if known:
        story.spans.append(Span("song", start, start + world.song_length, start - state.song_at[singer]))
    state.song_at[singer] = start


def _write_weather(state: _State, story: Story, dice: Dice) -> None:
    world = state.world
    moment, thing, mood = dice.uniform(world.moments), dice.uniform(world.weathers), dice.uniform(world.moods)
    _say(story, "In", "the", moment, "the", thing, "was", mood, ".")


_WRITERS: dict[str, Callable[[_State, Story, Dice], None]] = {
    "place": _write_place,
    "person": _write_person,
    "event": _write_event,
    "question": _write_question,
    "sum": _write_sum,
    "song": _write_song,
    "weather": _write_weather,
}
