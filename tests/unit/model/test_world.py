"""The story world: probabilities that sum to 1, one way to write each text, marked spans that follow from the past."""

import math
import random
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from refllm.model.world import Dice, World, write

SMALL = replace(
    World(),
    people=("Ann", "Bob"),
    objects=("cup", "pen"),
    places=("hall",),
    foods=("pie", "jam"),
    towns=("York",),
    lyrics=("la", "lo"),
    moments=("morning",),
    weathers=("wind", "sea"),
    moods=("cold",),
    song_length=2,
    largest_sum=2,
)


class Enumerator:
    """A source of choices that follows a given path and notes how many ways there were at each fork."""

    def __init__(self, path):
        self.path, self.widths, self.probability = list(path), [], 1.0

    @property
    def log_probability(self):
        return math.log(self.probability)

    def _take(self, options, chances):
        at = len(self.widths)
        if at == len(self.path):
            self.path.append(0)
        self.widths.append(len(options))
        self.probability *= chances[self.path[at]]
        return options[self.path[at]]

    def uniform(self, options):
        return self._take(options, [1 / len(options)] * len(options))

    def weighted(self, options, weights):
        kept = [(option, weight) for option, weight in zip(options, weights, strict=True) if weight > 0]
        whole = sum(weights)
        return self._take([option for option, _ in kept], [weight / whole for _, weight in kept])


def every_story(world, turns):
    """All (story, probability) of a number of turns, by walking the tree of choices."""
    path = []
    while True:
        source = Enumerator(path)
        yield write(world, source, turns=turns), source.probability
        path = source.path
        while path and path[-1] + 1 == source.widths[len(path) - 1]:
            path.pop()
        if not path:
            return
        path[-1] += 1


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_probabilities_sum_to_one_and_no_text_has_two_derivations(turns):
    world = SMALL if turns < 3 else replace(SMALL, lyrics=("la",), foods=("pie",), weathers=("wind",), objects=("cup",))
    whole, texts = 0.0, Counter()
    for story, probability in every_story(world, turns):
        whole += probability
        texts[story.text] += 1
    assert max(texts.values()) == 1
    assert len(texts) > 15**turns
    assert whole == pytest.approx(1, abs=1e-9)


def test_probability_of_a_story_counted_by_hand():
    world = replace(SMALL, newness=1.5)
    found = {story.text: probability for story, probability in every_story(world, 2)}
    weights = dict(world.turn_weights)
    stay = dict(world.stay)["person"]
    no_question = sum(weights.values()) - weights["question"]
    # First turn: a question is impossible; person turn, one of 2 people, one of 2 relations, the only town.
    first = weights["person"] / no_question / 2 / 2
    assert found["Ann lives in York. Ann really likes jam."] == pytest.approx(
        # Stay with the kind (or draw it again); known person: n / (a + n) = 1 / 2.5; the relation left; 1 of 2 foods.
        first * (stay + (1 - stay) * weights["person"] / sum(weights.values())) / 2.5 / 2
    )
    assert found["Ann lives in York. Bob really likes jam."] == pytest.approx(
        first * (stay + (1 - stay) * weights["person"] / sum(weights.values())) * 1.5 / 2.5 / 2 / 2
    )
    assert found["Ann lives in York. Where does Ann live? Ann lives in York."] == pytest.approx(
        first * (1 - stay) * weights["question"] / sum(weights.values())
    )


def test_dice_report_the_probability_of_what_they_draw():
    dice = Dice(random.Random(3))
    drawn = [dice.weighted("abc", (1.0, 0.0, 3.0)) for _ in range(4000)]
    assert set(drawn) == {"a", "c"}
    # Four standard deviations of a binomial(4000, 3/4).
    assert abs(drawn.count("c") - 3000) < 4 * math.sqrt(4000 * 3 / 16)
    assert dice.log_probability == pytest.approx(sum(math.log(0.25 if d == "a" else 0.75) for d in drawn))
    before = dice.log_probability
    counts = Counter(dice.uniform("xyz") for _ in range(3000))
    assert all(abs(counts[c] - 1000) < 4 * math.sqrt(3000 * 2 / 9) for c in "xyz")
    assert dice.log_probability - before == pytest.approx(-3000 * math.log(3))


def test_same_seed_same_story():
    world = World()
    assert world.story("a", 300) == world.story("a", 300)
    assert world.story("a", 300).text != world.story("b", 300).text
    # Pinned: training data must not change by accident, on any platform or Python version.
    assert world.story("pin", 40).text == PINNED


PINNED = (
    "Ruth really likes figs. Igor really likes walnuts. Igor lives in Seaton. Lena lives in Foxdale. "
    "Wanda really likes bread. What does Igor like? Igor really likes walnuts."
)


@pytest.mark.parametrize("length", [20, 100, 511])
def test_length_and_turns(length):
    world = World()
    for seed in range(20):
        story = world.story(seed, length)
        assert length - world.longest_turn < len(story.tokens) <= length
        ends = [0, *(end for end, _ in story.turns)]
        assert ends[-1] == len(story.tokens) and max(np.diff(ends)) <= world.longest_turn
        falls = np.diff([0.0, *(total for _, total in story.turns)])
        assert (falls < 0).all() and story.log_probability == story.turns[-1][1]
        assert set(story.tokens) <= set(world.vocabulary)


def test_a_longer_story_continues_a_shorter_one():
    world = World()
    short, long = world.story(5, 100), world.story(5, 200)
    assert long.tokens[: len(short.tokens)] == short.tokens
    assert long.turns[: len(short.turns)] == short.turns


def test_too_short_a_story_is_refused():
    with pytest.raises(ValueError, match="room for one turn"):
        World().story(1, 5)


def truths(story):
    """Read the text again, sentence by sentence, with regular expressions: what each question should be answered."""
    facts, answers = {}, []
    sentences = re.findall(r"[^.?]+[.?]", " " + story.text)
    asked = None
    for sentence in (s.strip() for s in sentences):
        if sentence.endswith("?"):
            asked = sentence
            continue
        if asked is not None:
            key = re.search(r"Where is the (\w+)|What does (\w+) like|Where does (\w+) live", asked).groups()
            kind, name = next((k, n) for k, n in zip(("where", "likes", "home"), key, strict=True) if n)
            answers.append((sentence, facts[kind, name]))
            asked = None
        elif m := re.fullmatch(r"The (\w+) is (?:at|with) \w+\.", sentence):
            facts["where", m[1]] = sentence
        elif m := re.fullmatch(r"\w+ (?:put the (\w+) at|took the (\w+) to) (\w+)\.", sentence):
            facts["where", m[1] or m[2]] = f"The {m[1] or m[2]} is at {m[3]}."
        elif m := re.fullmatch(r"(\w+) gave the (\w+) to (\w+)\.", sentence):
            assert m[1] != m[3]
            facts["where", m[2]] = f"The {m[2]} is with {m[3]}."
        elif m := re.fullmatch(r"(\w+) really likes (\w+)\.", sentence):
            assert ("likes", m[1]) not in facts
            facts["likes", m[1]] = sentence
        elif m := re.fullmatch(r"(\w+) lives in (\w+)\.", sentence):
            assert ("home", m[1]) not in facts
            facts["home", m[1]] = sentence
        elif m := re.fullmatch(r"(\d+) (plus|minus) (\d+) is (\d+)\.", sentence):
            assert int(m[4]) == int(m[1]) + int(m[3]) * (1 if m[2] == "plus" else -1)
        elif m := re.fullmatch(r"(\w+) sang: (.+)\.", sentence):
            assert facts.setdefault(("song", m[1]), m[2]) == m[2]
        else:
            assert re.fullmatch(r"In the \w+ the \w+ was \w+\.", sentence), sentence
    return answers


def test_answers_follow_from_the_text():
    for seed in range(20):
        story = World().story(seed, 511)
        answers = truths(story)
        assert len(answers) == sum(span.kind not in ("song", "sum") for span in story.spans) > 0
        assert all(said == true for said, true in answers)


def test_spans_mark_answers_and_their_distance():
    for seed in range(20):
        story = World().story(seed, 511)
        for span in story.spans:
            words = story.tokens[span.start : span.stop]
            if span.kind == "sum":
                assert words[0].strip().isdigit() and words[1] == "." and span.distance == 0
                continue
            if span.kind == "song":
                assert story.tokens[span.start - span.distance :][: len(words)] == words
                continue
            value = span.stop - 2
            assert words[-1] == "." and story.tokens[span.start - 1] == "?"
            assert story.tokens[value - span.distance] == story.tokens[value]
            name = {"likes": words[0], "home": words[0]}.get(span.kind, words[1])
            # Between the two mentions nothing is said about the same key.
            between = "".join(story.tokens[value - span.distance + 1 : span.start])
            last = between[: between.rfind(" Where" if span.kind != "likes" else " What")]
            pattern = {"likes": f"{name} really", "home": f"{name} lives"}.get(span.kind, rf"the{name}|The{name} is")
            assert not re.search(pattern + r"\b", last), (seed, span)


def test_no_question_is_asked_twice_in_a_row():
    for seed in range(20):
        sentences = re.findall(r"[^.?]+[.?]", World().story(seed, 511).text)
        questions = [s for s in sentences if s.endswith("?")]
        assert len(questions) > 5
        for before, after in zip(sentences, sentences[2:], strict=False):
            assert not (before.endswith("?") and before == after)
