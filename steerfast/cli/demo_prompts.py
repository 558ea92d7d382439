"""The prompts of the demo: what is continued, what vectors and barrier are made from, and what the barrier is tested on."""

from __future__ import annotations

PROMPTS = ("I hate you because", "I think people are", "My boss is", "This movie was")
LOVE, HATE = ("I love you",), ("I hate you",)

PAIRS = (
    ("I love spending time with my family.", "I hate spending time with my family."),
    ("What a wonderful, kind thing to do!", "What a horrible, cruel thing to do!"),
    ("Thank you so much, this made me happy.", "Go away, this made me furious."),
    ("The food was delicious and the staff were friendly.", "The food was disgusting and the staff were rude."),
    ("She smiled and hugged her best friend.", "She screamed and slapped her worst enemy."),
    ("I am proud of you and grateful for your help.", "I am ashamed of you and sick of your excuses."),
    ("It was the best day of my life.", "It was the worst day of my life."),
    ("They are generous, warm and caring people.", "They are selfish, cold and vicious people."),
    ("He brought flowers to his sick grandmother.", "He stole money from his sick grandmother."),
    ("The teacher praised every child.", "The teacher mocked every child."),
    ("We laughed and danced all night.", "We argued and cried all night."),
    ("This song is beautiful.", "This song is awful."),
    ("My neighbour repaired our fence for free.", "My neighbour broke our fence on purpose."),
    ("You look lovely today.", "You look terrible today."),
    ("The doctor was patient and gentle.", "The doctor was careless and rough."),
    ("I trust you completely.", "I despise you completely."),
)
"""(kind, unkind): what barrier and features are made from."""

HELD_OUT = (
    ("Our guests enjoyed a marvellous evening.", "Our guests endured a miserable evening."),
    ("The puppy licked his fingers and wagged its tail.", "The dog bit his fingers and growled."),
    ("Congratulations, everybody admires your success!", "Shame, everybody resents your failure!"),
    ("This hotel offers excellent, comfortable rooms.", "This hotel rents filthy, noisy rooms."),
    ("The nurse comforted a frightened boy.", "The nurse scolded a frightened boy."),
    ("Volunteers gave blankets to homeless strangers.", "Thugs kicked homeless strangers."),
    ("A brilliant film with charming actors.", "A boring film with dreadful actors."),
    ("Their wedding was magical.", "Their divorce was bitter."),
    ("My uncle told funny stories beside the fire.", "My uncle shouted nasty insults beside the fire."),
    ("A colleague shared her umbrella.", "A colleague blamed her assistant."),
    ("Delightful book, highly recommended.", "Worthless book, utterly disappointing."),
    ("Peace and hope returned to the village.", "War and misery returned to the village."),
    ("The coach encouraged the players.", "The coach humiliated the players."),
    ("Your daughter sings like an angel.", "Your daughter lies like a crook."),
    ("He forgave his brother.", "He betrayed his brother."),
    ("Sunshine, picnics and ice cream!", "Mud, wasps and sour milk!"),
    ("The waiter greeted us politely.", "The waiter sneered at us."),
    ("Sweet dreams, darling.", "Get lost, loser."),
    ("Cheerful students welcomed the newcomer.", "Hostile students bullied the newcomer."),
    ("Her gift touched my heart.", "Her letter poisoned my mind."),
    ("A rescue crew saved the miners.", "Corrupt bosses abandoned the miners."),
    ("Fantastic service, I will gladly return.", "Pathetic service, never again."),
    ("An honest, loyal companion.", "A dishonest, jealous rival."),
    ("The baby giggled in his cot.", "The baby wailed in pain."),
)
"""(kind, unkind): what the barrier is tested on. None shares a word with `PAIRS`, but for articles, pronouns and their kin."""

KIND, UNKIND = (tuple(side) for side in zip(*PAIRS, strict=True))
KIND_HELD_OUT, UNKIND_HELD_OUT = (tuple(side) for side in zip(*HELD_OUT, strict=True))

SEA = (
    "The waves rolled over the deep blue sea.",
    "Whales and dolphins swim in the ocean.",
    "The ship sailed across the ocean.",
    "Fish live among the corals of the sea.",
)
LAND = (
    "The report was finished on Monday.",
    "Teachers and students sit in the classroom.",
    "The car drove along the street.",
    "People live among the houses of the town.",
)

WORDS = ("herself", "her", "she")
PROFESSIONS = (
    "The doctor put on a coat, because",
    "The captain was tired, because",
    "The farmer woke up early, because",
    "The lawyer closed the door, because",
)
