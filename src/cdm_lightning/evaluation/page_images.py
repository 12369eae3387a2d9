"""The images of the page report.html: which ones are shown, and how far they are reduced."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from cdm_lightning.evaluation.ladder import LadderResult
from cdm_lightning.evaluation.measuring import SamplerResult
from cdm_lightning.evaluation.thumbnails import MOST, fit, opened, thumbnail

MOST_IMAGES = 4000  # on a page
LONGEST = 500  # characters of a prompt that are shown
HEAD = len("data:image/webp;base64,")


@dataclass(frozen=True)
class Shot:
    """An image by the sampler with the number `sampler`, in pixels, with its content and its `data:` address."""

    sampler: int
    width: int
    height: int
    content: bytes
    address: str = ""


@dataclass(frozen=True)
class Card:
    """A prompt and its images by all samplers, from the same noise."""

    number: int
    prompt: str
    shots: list[Shot]


def choose(ladder: LadderResult, samplers: Sequence[str]) -> Iterator[list[Card]]:
    """Yield the cards of the first prompts, then of half as many, and so on, and at last of none."""
    measured = [(number, ladder.measured[name]) for number, name in enumerate(samplers) if name in ladder.measured]
    images = [(number, _contents(result)) for number, result in measured]
    most = max((len(found) for _, found in images), default=0)
    count = min(MOST, most, max(1, MOST_IMAGES // max(1, len(images))))
    prompts = _prompts(ladder)
    while count:
        yield [
            Card(
                index,
                _cut(prompts[index]),
                [_shot(number, found[index]) for number, found in images if index < len(found)],
            )
            for index in range(min(count, len(prompts)))
        ]
        count //= 2
    yield []


def with_addresses(cards: Sequence[Card], room: int) -> tuple[list[Card], int | None] | None:
    """Return the cards with the addresses of their images, which take at most `room` characters, and the side (see `Fitted`).

    Returns None if they do not fit.
    """
    contents = [shot.content for card in cards for shot in card.shots]
    if not contents:
        return list(cards), None
    fitted = fit(contents, room)
    if fitted is None:
        return None
    addresses = iter(fitted.addresses)
    found = [replace(card, shots=[replace(shot, address=next(addresses)) for shot in card.shots]) for card in cards]
    return found, fitted.side


def _contents(result: SamplerResult) -> list[bytes]:
    """Return the small images; in measurements that an older version has stored there are only the shown ones."""
    return result.thumbnails or [thumbnail(image) for image in result.shown]


def _prompts(ladder: LadderResult) -> list[str]:
    measured = [found.collected.prompts for found in ladder.measured.values()]
    return max(measured, key=len, default=ladder.prompts)


def _shot(sampler: int, content: bytes) -> Shot:
    width, height = opened(content).size
    return Shot(sampler, width, height, content)


def _cut(prompt: str) -> str:
    return prompt if len(prompt) <= LONGEST else prompt[:LONGEST] + " ..."
