"""What an icon's name says: its class, the same in every family, and the stem that it shares with its relatives."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

# Words that designers use for one and the same thing. Only pairs that are drawn alike: a caret and a chevron are not.
_SYNONYMS = {
    "user": "account person",
    "users": "people persons accounts",
    "gear": "cog settings setting",
    "trash": "delete bin trashcan",
    "search": "magnify magnifier find",
    "home": "house",
    "mail": "email envelope",
    "plus": "add",
    "minus": "subtract",
    "check": "checkmark tick done",
    "x": "close xmark times cross cancel dismiss multiply",
    "bolt": "lightning flash thunderbolt zap",
    "file": "document doc page",
    "image": "picture photo",
    "phone": "telephone",
    "microphone": "mic",
    "video": "videocam",
    "chat": "message comment",
    "eye": "visibility",
    "warning": "alert exclamation important",
    "question": "help",
    "off": "slash",
    "globe": "world earth",
    "heart": "favorite favourite love",
    "volume": "sound",
    "chart": "graph",
    "down": "bottom",
    "up": "top",
    "unlock": "unlocked",
    "lock": "locked",
    "info": "information",
    "circle": "circled round circular",
    "paperclip": "attachment",
    "filter": "funnel",
    "chevron": "angle",
    "pencil": "pen",
    "sun": "sunny",
}
# The same for names of several words.
_PHRASES = {
    "magnifying-glass": "search",
    "x-mark": "x",
    "chevrons": "chevron-double",
    "shopping-cart": "cart",
    "map-marker": "map-pin",
    "location-pin": "map-pin",
    "microchip": "cpu",
    "processor": "cpu",
    "light-bulb": "bulb",
    "lightbulb": "bulb",
    "fullscreen": "full-screen",
    "headphones": "headphone",
    "thumbs": "thumb",
    "zoom-in": "search-plus",
    "zoom-out": "search-minus",
    "text-bold": "bold",
    "text-italic": "italic",
    "text-underline": "underline",
    "text-strikethrough": "strikethrough",
    "video-camera": "video",
    "camera-video": "video",
    "at-sign": "at",
    "more-horizontal": "more",
    "question-mark": "question",
    "exclamation-mark": "warning",
}
_WORD = {other: word for word, others in _SYNONYMS.items() for other in others.split()}


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Say how often, how or around what something is drawn, and not what it is.
_ATTRIBUTES = _set(
    "circle square box plus minus x check off on up down left right in out alt small large big full half empty open new all multiple "
    "double a an the of to from with horizontal vertical low medium high mini simple one two three"
)
# Say only that a picture is a company's.
_BRAND = _set("logo brand")
# Say what a name is about where nothing else does: a heart, but a user with a heart.
_BADGES = _set("heart star lock unlock gear search pencil warning question info eye sync refresh")
# Their numbers say what they are: a die that shows two is another picture than one that shows three.
_COUNTED = _set(
    "dice die number numeric looks filter battery signal wifi hexagon counter digit clock time timer repeat forward replay rewind"
)
_ALTERNATIVE = re.compile(r"\d{1,2}|alt|variant|alternative")


def bare(name: str, styles: Iterable[str]) -> tuple[str, bool]:
    """The name without the words for its style, and whether it is an alternative drawing (`home-2`, `home-alt`, `home-variant`).

    Args:
        name: an icon's name in its family.
        styles: the words that this family ends names with, for each style that it draws everything in.
    """
    words = [word for word in name.split("-") if word]
    endings = set(styles)
    while len(words) > 1 and words[-1] in endings:
        words.pop()
    alternative = False
    while len(words) > 1 and _ALTERNATIVE.fullmatch(words[-1]) and not (words[-1].isdigit() and _COUNTED & set(words)):
        alternative = words.pop().lstrip("0") != "1" or alternative
    return "-".join(words), alternative


def class_key(name: str) -> str:
    """The class of a bare name: its words in one order, synonyms as one word."""
    return "-".join(sorted(set(_words(name))))


def class_name(bare_names: list[str]) -> str:
    """The name that most families give a class, the shortest of several."""
    return min(Counter(bare_names).items(), key=lambda item: (-item[1], len(item[0]), item[0]))[0]


def stem(name: str) -> str:
    """The word that says what a class shows: `user` of `user-plus`; classes of one stem are on the same side of the split."""
    words = [word for word in _words(name) if word not in _ATTRIBUTES] or _words(name)
    return next((word for word in words if word not in _BADGES), words[0])


def _words(name: str) -> list[str]:
    """The words of a bare name, synonyms as one."""
    name = f"-{name}-"
    for phrase, other in _PHRASES.items():
        name = name.replace(f"-{phrase}-", f"-{other}-")
    words = [_WORD.get(word, word) for word in name.strip("-").split("-")]
    return [word for word in words if word not in _BRAND] or words
