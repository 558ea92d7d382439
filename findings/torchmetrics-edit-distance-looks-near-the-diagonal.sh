#!/usr/bin/env bash
# torchmetrics 1.9.0, torch 2.13.0: edit_distance and EditDistance are to count the characters to insert, delete or substitute. They
# look for the cheapest way within 25 places of the diagonal only, a shortcut that was made for the words of a sentence. As soon as
# the common text begins 25 characters later in one of the two, it is not found: 25 characters in front of it and 25 behind it
# cost 157 edits instead of 50. char_error_rate of the same package is right.
#
# Seen: 150 characters, some more behind the prediction and as many others before the target
#       10 more: edit_distance 20, character error rate times length 20, by hand 20
#       24 more: edit_distance 48, character error rate times length 48, by hand 48
#       25 more: edit_distance 157, character error rate times length 50, by hand 50
#       40 more: edit_distance 175, character error rate times length 80, by hand 80
#       a phrase of 27 characters in front of the target: edit_distance 38, by hand 27
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 torchmetrics==1.9.0 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import random
import string
import sys

from torchmetrics.functional.text import char_error_rate, edit_distance


def by_hand(one, other):
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        last, row[0] = row[:], i
        for j, b in enumerate(other, 1):
            row[j] = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (a != b))
    return row[-1]


def text(n):
    return "".join(random.choice(string.ascii_lowercase) for _ in range(n))


random.seed(0)
print("150 characters, some more behind the prediction and as many others before the target")
found = {}
for more in (10, 24, 25, 40):
    body = text(150)
    prediction, target = body + text(more), text(more) + body
    found[more] = int(edit_distance(prediction, target)), by_hand(prediction, target)
    rate = float(char_error_rate(prediction, target)) * len(target)
    print(f"{more} more: edit_distance {found[more][0]}, character error rate times length {rate:.0f}, by hand {found[more][1]}")
body, phrase = text(150), "the answer to this is that "
alone = int(edit_distance(body, phrase + body)), by_hand(body, phrase + body)
print(f"a phrase of {len(phrase)} characters in front of the target: edit_distance {alone[0]}, by hand {alone[1]}")
right = all(found[more][0] == found[more][1] for more in (10, 24))
sys.exit(0 if right and all(found[more][0] > 2 * found[more][1] for more in (25, 40)) else 1)
PYTHON
