"""Spoken notes about money spent or people to see, each with the JSON a small model should turn it into.

`python scripts/demo_data.py OUT_DIR` writes `notes_train.jsonl` and `notes_eval.jsonl`, alpaca rows such as

    input:  Um, paid 12.50 dollars for a taxi in Lisbon
    output: {"type":"expense","amount":12.5,"currency":"USD","item":"taxi","place":"Lisbon"}

    input:  Note to self: a check-up with Dr. Meyer on tuesday at 3:30 pm
    output: {"type":"appointment","who":"Dr. Meyer","what":"check-up","day":"Tuesday","time":"15:30"}

Everything is made up from the lists below: amounts become numbers, currencies ISO codes, times HH:MM on a 24-hour
clock, weekdays get their capital, an article is dropped, and what the note does not say is `null`.

Every fourth entry of each list of persons, purposes, items and places never occurs in a training row; a field of an
evaluation row takes such an entry one time in three. The sentence patterns are the same on both sides, so the
evaluation shows that values are read from the note and not recalled. It does not show how a model does on wording
unlike the patterns here.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

__all__ = ["INSTRUCTION", "Row", "exact_match", "held_out_values", "main", "make_rows", "split", "write_jsonl"]

Row = dict[str, str]
Answer = dict[str, str | int | float | None]

INSTRUCTION = "Turn the spoken note into JSON."
EVAL_HELD_OUT = 1 / 3


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(phrase.strip() for phrase in text.split(","))


# Each phrase stands as it is said; the answer leaves out its first word where that is one of `LEADS`.
LEADS = {"a", "an", "the", "some", "in", "at"}

PEOPLE = _phrases("""
    Anna, Tom, Priya, Lucas, Maria, Ben, Sofia, Oliver, Emma, Jack, Nina, Pedro, Laura, Simon, Chloe, Marek, Julia,
    Adam, Ingrid, Hugo, Karen, Felix, Amira, Daniel, Elena, George, Hannah, Victor, Zoe, Patrick, Rosa, Liam,
    Sarah Collins, Peter Brandt, Grace Murphy, Paul Lambert, Clara Rossi, Mike Turner, Eva Lindgren, Luis Ortega,
    Helen Foster, Jonas Weber, Megan Price, Igor Kovac, Rachel Stone, Marco Bianchi, Alice Dupont, Sven Larsen,
    Mr. Novak, Ms. Taylor, Mrs. Olsen, Mr. Barnes, Ms. Fischer, Mrs. Hughes, Mr. Silva, Ms. Jensen
""")
DOCTORS = _phrases("""
    Dr. Meyer, Dr. Patel, Dr. Evans, Dr. Moreau, Dr. Romano, Dr. Baker, Dr. Schmidt, Dr. Larkin,
    Dr. Garcia, Dr. Nielsen, Dr. Wright, Dr. Costa, Dr. Chen, Dr. Keller, Dr. Byrne, Dr. Hoffman
""")
ERRANDS = _phrases("""
    a haircut, a job interview, the budget review, a piano lesson, a flat viewing, a tax consultation,
    a driving lesson, a tennis match, a project meeting, a guitar lesson, the planning session, a yoga class,
    a bike repair, a Spanish lesson, a house tour, a photo shoot, the contract review, a team breakfast,
    a car inspection, an insurance talk, a swimming lesson, a kitchen fitting, the sales call, a chess game
""")
TREATMENTS = _phrases("""
    a check-up, a blood test, an eye test, a flu shot, a dental cleaning, a skin check,
    a hearing test, an ultrasound, a follow-up visit, a vaccination, physiotherapy, an allergy test
""")
SMALL_ITEMS = _phrases("""
    a taxi, coffee, lunch, a sandwich, parking, a bus ticket, some stamps, a notebook, printer paper, an umbrella,
    a phone charger, a pizza, some flowers, a newspaper, a birthday card, bottled water, some batteries, a light bulb,
    laundry, a metro ticket, a salad, ice cream, a paperback, some pens, an adapter, groceries, breakfast,
    a museum ticket, some envelopes, a screwdriver, a car wash, dog food, hand soap, a street map, a USB stick, a scarf
""")
LARGE_ITEMS = _phrases("""
    a hotel room, a train ticket, an office chair, a keyboard, running shoes, a flight, a monitor, a suitcase,
    a winter coat, a backpack, a printer, a rental car, a desk lamp, headphones, a concert ticket, a bookshelf,
    a coffee machine, a rain jacket, a power drill, a tent, a router, a team dinner, a webcam, a toolbox,
    new tires, a conference ticket, a graphics tablet, a wool blanket
""")
PLACES = _phrases("""
    in Lisbon, in Berlin, in Paris, in Madrid, in London, in Rome, in Vienna, in Dublin, in Boston, in Chicago,
    in Seattle, in Denver, in New York, in Austin, in Prague, in Oslo, in Munich, in Milan, in Porto, in Geneva,
    in Hamburg, in Brussels, in Leeds, in Bristol, in Portland, in Atlanta, in Krakow, in Helsinki, in Amsterdam,
    in Barcelona, in Manchester, in San Diego, in Budapest, in Edinburgh, in Toulouse, in Antwerp,
    at Central Station, at Market Square, at Union Station, at Harbour Mall, at Westgate Mall, at Kings Plaza,
    at North Terminal, at Oak Street, at Riverside Centre, at Castle Square, at South Pier, at Liberty Plaza
""")
DAYS = _phrases("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")

VOCABULARY = {
    "who": (PEOPLE, DOCTORS),
    "what": (ERRANDS, TREATMENTS),
    "item": (SMALL_ITEMS, LARGE_ITEMS),
    "place": (PLACES,),
}
GOODS = ((SMALL_ITEMS, 2, 40), (LARGE_ITEMS, 40, 400))
VISITS = ((ERRANDS, PEOPLE), (ERRANDS, PEOPLE), (TREATMENTS, DOCTORS))
# Currency and place are drawn independently: the code has to come from the words of the note.
CURRENCIES = (("EUR", "€", "euros"), ("USD", "$", "dollars"), ("GBP", "£", "pounds"))
CENTS = ("20", "25", "40", "49", "50", "50", "75", "80", "90", "95", "99")

# {item} and {what} come with their article, {thing} and {topic} without, {place} with "in" or "at".
EXPENSES = (
    "I spent {amount} on {item} {place}",
    "paid {amount} for {item} {place}",
    "{item} {place}, {amount}",
    "{thing} {amount} {place}",
    "{amount} for {item}",
    "bought {item} {place} for {amount}",
    "{place} I paid {amount} for {item}",
    "that was {amount} for {item} {place}",
    "{item} cost me {amount}",
    "{item} cost me {amount} {place}",
    "put down {amount} for {item} {place}",
    "log {amount}, {thing}, {place}",
    "new expense, {thing}, {amount}, {place}",
    "got {item} today, {amount}",
    "just paid for {item} {place}, {amount} altogether",
    "{amount} {place} for {item}",
    "the receipt says {amount}, {thing}, {place}",
    "I had to buy {item} {place}, it was {amount}",
    "add {amount} for {item} to my expenses",
    "{place}, {thing}, {amount}",
    "expense, {thing} for {amount}",
    "{item} set me back {amount}",
    "handed over {amount} for {item} {place}",
    "{thing} {place} came to {amount}",
    "{thing} came to {amount}",
    "could you write down {item}, {amount}, {place}",
)
APPOINTMENTS = (
    "meeting {who} on {day} at {time} for {what}",
    "{what} with {who} on {day} at {time}",
    "{day} at {time}, {what} with {who}",
    "I'm seeing {who} {day} at {time} for {what}",
    "on {day} I have {what} with {who} at {time}",
    "book {what} with {who}, {day} {time}",
    "put {who} down for {what}, {day} at {time}",
    "{who}, {day}, {time}, {topic}",
    "at {time} on {day} there's {what} with {who}",
    "my {topic} with {who} moved to {day} at {time}",
    "new appointment, {topic}, {who}, {day} {time}",
    "{who} can do {day} at {time} for {what}",
    "remind me about {what} with {who}, {day} at {time}",
    "I'm seeing {who} on {day} at {time}",
    "{who} at {time} on {day}",
    "appointment with {who} this {day}, {time}",
    "{day} {time} is {who}",
    "I have {what} on {day} at {time}",
    "{what} this {day} at {time}",
    "don't let me miss {what}, {day} at {time}",
    "{topic}, {day}, {time}",
    "my {topic} is on {day} at {time}",
    "{what} with {who} next {day}",
    "{who} is coming {day} for {what}",
    "I need to see {who} on {day}",
    "{what} on {day}, time still open",
)
OPENERS = (
    *("um, ", "uh, ", "note to self: ", "quick one: ", "okay so ", "hey, ", "right, ", "just a note, "),
    *("before I forget, ", "for the record, ", "so, ", "quick note, ", "one more thing, ", "well, "),
)
CLOSERS = (", thanks", ", that's it", ", please", ", that's all", ", I think", ", yeah", ", okay", ", got it")
HESITATIONS = ("um ", "uh ", "er ")


def _known(phrases: Sequence[str]) -> list[str]:
    return [phrase for i, phrase in enumerate(phrases) if i % 4 != 3]


def _bare(phrase: str) -> str:
    lead, _, rest = phrase.partition(" ")
    return rest if lead in LEADS else phrase


def held_out_values() -> dict[str, set[str]]:
    """By field of the answer, the values that only evaluation rows hold."""
    return {
        field: {_bare(phrase) for phrases in lists for phrase in phrases[3::4]} for field, lists in VOCABULARY.items()
    }


def _pick(rng: random.Random, phrases: Sequence[str], held_out: float) -> str:
    return rng.choice(phrases[3::4] if rng.random() < held_out else _known(phrases))


def _sometimes(rng: random.Random, share: float, phrases: Sequence[str]) -> str:
    return rng.choice(phrases) if rng.random() < share else ""


def _say_amount(rng: random.Random, low: int, high: int) -> tuple[str, int | float, str]:
    """The amount as said, its value, and its currency's code."""
    code, symbol, word = rng.choice(CURRENCIES)
    whole = rng.randint(low, high)
    digits = str(whole) if rng.random() < 0.5 else f"{whole}.{rng.choice(CENTS)}"
    said = f"{symbol}{digits}" if rng.random() < 0.4 else f"{digits} {word}"
    return said, float(digits) if "." in digits else whole, code


def _say_time(rng: random.Random) -> tuple[str, str]:
    """The time as said, and as HH:MM."""
    hour = rng.randint(7, 20)
    minute = rng.choice(("00", "00", "15", "30", "30", "45"))
    clock = f"{hour:02}:{minute}"
    if clock == "12:00":
        return "noon", clock
    if hour == 12 or rng.random() < 0.3:
        return f"{hour}:{minute}", clock
    short = str(hour % 12) if minute == "00" else f"{hour % 12}:{minute}"
    return f"{short} {'am' if hour < 12 else 'pm'}", clock


def _expense(rng: random.Random, held_out: float) -> tuple[str, dict[str, str], Answer]:
    pattern = rng.choice(EXPENSES)
    goods, low, high = rng.choice(GOODS)
    item, place = _pick(rng, goods, held_out), _pick(rng, PLACES, held_out)
    said, amount, currency = _say_amount(rng, low, high)
    slots = {"amount": _sometimes(rng, 0.1, HESITATIONS) + said, "item": item, "thing": _bare(item), "place": place}
    answer: Answer = {"type": "expense", "amount": amount, "currency": currency, "item": _bare(item)}
    answer["place"] = _bare(place) if "{place}" in pattern else None
    return pattern, slots, answer


def _appointment(rng: random.Random, held_out: float) -> tuple[str, dict[str, str], Answer]:
    pattern = rng.choice(APPOINTMENTS)
    purposes, persons = rng.choice(VISITS)
    who, what = _pick(rng, persons, held_out), _pick(rng, purposes, held_out)
    day = rng.choice(DAYS)
    said, clock = _say_time(rng)
    slots = {"who": who, "what": what, "topic": _bare(what), "time": _sometimes(rng, 0.1, HESITATIONS) + said}
    slots["day"] = day.lower() if rng.random() < 0.4 else day
    answer: Answer = {
        "type": "appointment",
        "who": who if "{who}" in pattern else None,
        "what": _bare(what) if "{what}" in pattern or "{topic}" in pattern else None,
        "day": day,
        "time": clock if "{time}" in pattern else None,
    }
    return pattern, slots, answer


def _say(rng: random.Random, pattern: str, slots: dict[str, str]) -> str:
    """The note; its first letter is a capital unless a value starts it, so that a value is always said as written."""
    opener, closer = _sometimes(rng, 0.5, OPENERS), _sometimes(rng, 0.2, CLOSERS)
    note = opener + pattern.format(**slots) + closer
    return note if not opener and pattern.startswith("{") else note[0].upper() + note[1:]


def _draw(count: int, rng: random.Random, held_out: float, avoid: Collection[str]) -> list[Row]:
    rows: list[Row] = []
    seen = set(avoid)
    while len(rows) < count:
        pattern, slots, answer = (_appointment if len(rows) % 2 else _expense)(rng, held_out)
        note = _say(rng, pattern, slots)
        if note not in seen:
            seen.add(note)
            output = json.dumps(answer, separators=(",", ":"), ensure_ascii=False)
            rows.append({"instruction": INSTRUCTION, "input": note, "output": output})
    return rows


def make_rows(count: int, seed: int, held_out: float = 0.0) -> list[Row]:
    """`count` rows, expenses and appointments in turn, no note twice.

    A person, purpose, item or place is one of the held-out values with probability `held_out`.
    """
    return _draw(count, random.Random(f"rows {seed}"), held_out, ())


def split(train: int, evaluation: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Training rows without any held-out value, and evaluation rows whose notes are not among them."""
    train_rows = make_rows(train, seed)
    notes = {row["input"] for row in train_rows}
    return train_rows, _draw(evaluation, random.Random(f"evaluation {seed}"), EVAL_HELD_OUT, notes)


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _canonical(text: str) -> str:
    """One spelling for equal JSON objects; ValueError for anything else."""
    value = json.loads(text.strip(), object_pairs_hook=_unique_keys, parse_constant=_reject_constant)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return json.dumps(value, sort_keys=True, allow_nan=False)


def exact_match(answer: str, expected: str) -> bool:
    """Whether `answer` is one JSON object equal to `expected`, and nothing else but white space around it.

    Keys may come in any order but not twice. Types count: 23, 23.0 and "23" are three values; 12.50 is 12.5.
    """
    try:
        return _canonical(answer) == _canonical(expected)
    except (ValueError, RecursionError):
        return False


def write_jsonl(rows: Iterable[Row], path: str | Path) -> None:
    """One row a line, UTF-8."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    Path(path).write_text(lines, encoding="utf-8", newline="\n")


def _holds_fresh_value(row: Row) -> bool:
    answer: Answer = json.loads(row["output"])
    return any(answer.get(field) in values for field, values in held_out_values().items())


def _describe(path: Path, rows: Sequence[Row]) -> str:
    longest = max((len(row["input"]) for row in rows), default=0)
    fresh = sum(map(_holds_fresh_value, rows))
    return f"{path}: {len(rows)} rows, {fresh} with a held-out value, longest note {longest} characters"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the demo's spoken notes and their JSON as alpaca rows.")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="made if it is not there")
    parser.add_argument("--train", type=int, default=1200, help="training rows (default: %(default)s)")
    parser.add_argument("--eval", type=int, default=100, help="evaluation rows (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same files (default: %(default)s)")
    options = parser.parse_args(arguments)
    options.out_dir.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "eval"), split(options.train, options.eval, options.seed), strict=True):
        path = options.out_dir / f"notes_{name}.jsonl"
        write_jsonl(rows, path)
        print(_describe(path, rows))


if __name__ == "__main__":
    main()
