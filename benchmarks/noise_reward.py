"""A reward without a meaning, for measuring speed: every completion gets a random number, so that every group is learned."""

import random


def noise(completions: list[object], **columns: object) -> list[float]:
    return [random.random() for _ in completions]
