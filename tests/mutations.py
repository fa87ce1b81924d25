"""Small damages to a file, as disks, connections and attackers do them."""

import random

_TELLING = [b"\0", b"\xff", b"\x7f", b"\x80", b"\0" * 4, b"\xff" * 4, b"\xff\xff\xff\x7f", b"\xff" * 8, b"\0" * 8]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """`data` with one to three changes: flipped bits, other bytes, a piece moved, left out, doubled, or cut off."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        place, other = rng.randrange(len(changed) + 1), rng.randrange(len(changed) + 1)
        length = rng.choice([1, 2, 4, 8, 16, 64])
        match rng.randrange(8):
            case 0 | 1 | 2:
                if place < len(changed):
                    changed[place] ^= 1 << rng.randrange(8)
            case 3:
                telling = rng.choice(_TELLING)
                changed[place : place + len(telling)] = telling
            case 4:
                changed[place : place + length] = changed[other : other + length]
            case 5:
                del changed[place : place + length]
            case 6:
                changed[place:place] = changed[other : other + length]
            case 7:
                del changed[place:]
    return bytes(changed)
