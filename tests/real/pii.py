"""Sentences with personal data, labelled by construction: templates whose slots Faker fills."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from faker import Faker
from packages import write_text_at_once

SENTENCES = 600
SEED = 7

# Words are separated by spaces, punctuation included; a word in braces is a slot of that entity type.
TEMPLATES = (
    "My name is {GIVEN_NAME} {SURNAME} and I live at {BUILDING_NUMBER} {STREET_NAME} , {CITY} , {STATE} {ZIP_CODE} .",
    "Please send the invoice to {GIVEN_NAME} {SURNAME} at {EMAIL} before Friday .",
    "You can call me on {PHONE} or write to {EMAIL} .",
    "Ship it to {GIVEN_NAME} {SURNAME} , {BUILDING_NUMBER} {STREET_NAME} , {SECONDARY_ADDRESS} , {CITY} , {STATE} {ZIP_CODE} .",
    "{GIVEN_NAME} moved from {CITY} to {CITY} last year .",
    "The customer {GIVEN_NAME} {SURNAME} asked us to call back at {PHONE} .",
    "Hi {GIVEN_NAME} , thanks for meeting us in {CITY} yesterday .",
    "Our new office is at {BUILDING_NUMBER} {STREET_NAME} in {CITY} , {STATE} .",
    "Contact {GIVEN_NAME} {SURNAME} by email : {EMAIL} .",
    "The meeting with Mr. {SURNAME} takes place in {CITY} , {STATE} .",
    "Her portfolio is online at {URL} and her email is {EMAIL} .",
    "The weather was pleasant and the train left on time .",
)


def write_pii_sentences(data: Path) -> None:
    """Write ``pii-sentences.jsonl``: per line a sentence as ``words`` and their BIO ``tags``; the same on every host."""
    lines = [json.dumps({"words": words, "tags": tags}) for words, tags in generate_sentences(SENTENCES, SEED)]
    write_text_at_once(data / "pii-sentences.jsonl", "\n".join(lines) + "\n")


def generate_sentences(count: int, seed: int) -> list[tuple[list[str], list[str]]]:
    """Words and tags of ``count`` sentences, templates in turn."""
    faker = Faker("en_US")
    faker.seed_instance(seed)
    slots: dict[str, Callable[[], str]] = {
        "GIVEN_NAME": faker.first_name,
        "SURNAME": faker.last_name,
        "EMAIL": faker.email,
        "PHONE": lambda: faker.numerify("(###) 555-01##"),
        "URL": faker.url,
        "BUILDING_NUMBER": faker.building_number,
        "STREET_NAME": faker.street_name,
        "SECONDARY_ADDRESS": faker.secondary_address,
        "CITY": faker.city,
        "STATE": faker.state,
        "ZIP_CODE": faker.zipcode,
    }
    return [_fill(TEMPLATES[index % len(TEMPLATES)], slots) for index in range(count)]


def _fill(template: str, slots: dict[str, Callable[[], str]]) -> tuple[list[str], list[str]]:
    words: list[str] = []
    tags: list[str] = []
    for word in template.split():
        if not word.startswith("{"):
            words.append(word)
            tags.append("O")
            continue
        entity = word.strip("{}")
        for position, part in enumerate(slots[entity]().split()):
            words.append(part)
            tags.append(f"{'I' if position else 'B'}-{entity}")
    return words, tags
