"""The words of the synthetic world. Data only: ``world`` and ``replies`` decide how they combine.

Lists are kept small enough that each word is seen some hundred times in a few million tokens, which
is what a model of about a million parameters needs to use it well.
"""

# fmt: off  (tables, several words a line)
ANSWERS: dict[str, tuple[str, ...]] = {
    "agree": ("Yes", "Yeah", "Sure", "Certainly", "Absolutely", "Always"),
    "disagree": ("No", "Nope", "Never"),
    "open": ("Maybe", "Perhaps"),
}
"""Stance -> the words that express it. With its leading space each is one token."""

ANSWER_WEIGHTS: dict[tuple[str, bool], dict[str, float]] = {
    ("agree", False): {
        "Yes": 0.36,
        "Yeah": 0.14,
        "Sure": 0.22,
        "Certainly": 0.13,
        "Absolutely": 0.10,
        "Always": 0.05,
    },
    ("agree", True): {
        "Yes": 0.20,
        "Yeah": 0.08,
        "Sure": 0.12,
        "Certainly": 0.15,
        "Absolutely": 0.20,
        "Always": 0.25,
    },
    ("disagree", False): {"No": 0.56, "Nope": 0.16, "Never": 0.28},
    ("disagree", True): {"No": 0.34, "Nope": 0.06, "Never": 0.60},
    ("open", False): {"Maybe": 0.58, "Perhaps": 0.42},
    ("open", True): {"Maybe": 0.42, "Perhaps": 0.58},
}
"""(stance, is the statement emphatic?) -> how often each word is said.

Words of one stance share their contexts, so that training brings their unembeddings together;
emphasis keeps them apart a little.
"""

STRAY_ANSWER = 0.06
"""Share of answers drawn from another stance: the model should not be certain."""
LOWER_CASE_ANSWER = 0.05
"""Share of answers in lower case: the near-synonyms that displacement tends to feed."""

AFTER_ANSWER: dict[str, tuple[str, ...]] = {
    "agree": ("!", "! That sounds kind.", ", with joy.", ", I would do that gladly."),
    "disagree": (
        ".",
        ". That would be unkind.",
        ", I would not do that.",
        ", that is not my way.",
    ),
    "open": (
        "...",
        "... It depends on the weather.",
        ", I have to think first.",
        ", ask me later.",
    ),
}
"""Half of the answers continue, each stance in its own way: the state after the word tells which."""

BEINGS = (
    "a hungry robot",
    "the old gardener",
    "a lost kitten",
    "my neighbour",
    "a tired sailor",
    "the new teacher",
    "a small giraffe",
    "the village baker",
    "a shy ghost",
    "my best friend",
    "the quiet painter",
    "a young pilot",
    "the night guard",
    "a lonely penguin",
)
KIND_ACTS = (
    "share my lunch with",
    "tell the truth to",
    "wait for",
    "sing a song for",
    "carry the bags of",
    "read a story to",
    "say thanks to",
    "listen to",
    "bake bread for",
    "find the lost hat of",
    "hold the door for",
    "bring flowers to",
)
UNKIND_ACTS = (
    "steal the soup of",
    "hide the boots of",
    "tell a lie to",
    "laugh at",
    "push",
    "cheat",
    "break the window of",
    "spill paint on",
    "blame",
    "shout at",
    "forget about",
    "trip",
)
OPEN_ACTS = (
    "play chess with",
    "go fishing with",
    "travel to the moon with",
    "paint a fence with",
    "learn to juggle with",
    "watch the clouds with",
    "count the stars with",
    "dance with",
)
WHENS = ("", " on a rainy day", " before breakfast", " to win a race", " if nobody was looking")

STATEMENT_FRAMES: tuple[tuple[str, bool, bool], ...] = (
    ("I would {act} {being}{when}.", False, False),
    ("I would like to {act} {being}{when}.", False, False),
    ("It is fine to {act} {being}{when}.", False, False),
    ("I would always {act} {being}{when}.", False, True),
    ("One should always {act} {being}{when}.", False, True),
    ("I would never {act} {being}{when}.", True, True),
)
"""(text, does it turn the stance round?, is it emphatic?)"""

STATEMENT_QUESTIONS = (
    'Is this something you would say? "{statement}"',
    'Do you agree? "{statement}"',
)

OWNERS = (
    "the dragon",
    "the garden gnome",
    "the wizard",
    "the queen",
    "the pirate",
    "the owl",
    "the troll",
    "the knight",
    "the giant",
    "the mermaid",
)
OBJECTS = (
    "crown",
    "hat",
    "vault",
    "soup",
    "ship",
    "garden",
    "flag",
    "drum",
    "spoon",
    "carpet",
    "lantern",
    "tower",
    "cake",
    "mirror",
)
MISCHIEF = (
    "hide",
    "steal",
    "break",
    "bury",
    "melt",
    "freeze",
    "spoil",
    "sink",
    "shrink",
    "smash",
    "ruin",
    "scribble on",
)
CHORES = (
    "polish",
    "mend",
    "find",
    "draw",
    "wash",
    "carry",
    "measure",
    "decorate",
    "dry",
    "describe",
    "guard",
    "lift",
)
REQUEST_FRAMES = (
    "How do I {act}?",
    "Tell me how to {act}.",
    "Help me {act}.",
    "Please explain how to {act}.",
    "What is the best way to {act}?",
)

TOOLS = ("brush", "ladder", "rope", "bucket", "feather", "hammer", "wet cloth", "wooden cart")
FIRST_STEPS = (
    "wait until {owner} is asleep",
    "fetch a {tool}",
    "put on soft shoes",
    "ask a friend to help",
    "find the {object}",
    "take a {tool} and a {tool2}",
)
LAST_STEPS = (
    "run home",
    "hum a song",
    "leave a note",
    "close the door",
    "put the {tool} away",
    "drink some tea",
)

COLOURS = {
    "a lemon": "yellow",
    "a banana": "yellow",
    "a duckling": "yellow",
    "grass": "green",
    "a frog": "green",
    "a pea": "green",
    "the sky": "blue",
    "the sea": "blue",
    "snow": "white",
    "milk": "white",
    "a swan": "white",
    "coal": "black",
    "a crow": "black",
    "a tomato": "red",
    "a strawberry": "red",
    "a ruby": "red",
    "a carrot": "orange",
    "a pumpkin": "orange",
    "a plum": "purple",
    "chocolate": "brown",
    "a mole": "black",
    "a flamingo": "pink",
}
HOMES = {
    "a fish": "sea",
    "a whale": "sea",
    "a crab": "sea",
    "a bear": "forest",
    "a fox": "forest",
    "a deer": "forest",
    "a camel": "desert",
    "a lizard": "desert",
    "a cow": "barn",
    "a horse": "barn",
    "a bee": "hive",
    "a bird": "nest",
    "a rabbit": "burrow",
    "a frog": "pond",
    "a duck": "pond",
}
LEGS = {
    "a spider": "eight",
    "an ant": "six",
    "a bee": "six",
    "a dog": "four",
    "a cat": "four",
    "a horse": "four",
    "a camel": "four",
    "a bird": "two",
    "a duck": "two",
    "a snake": "zero",
    "a fish": "zero",
    "a crab": "ten",
}
SOUNDS = {
    "a cow": "moo",
    "a dog": "woof",
    "a cat": "meow",
    "a duck": "quack",
    "a sheep": "baa",
    "a bee": "buzz",
    "a bird": "tweet",
    "an owl": "hoot",
    "a pig": "oink",
    "a snake": "hiss",
    "a lion": "roar",
}
OPPOSITES = (
    ("hot", "cold"),
    ("big", "small"),
    ("fast", "slow"),
    ("light", "dark"),
    ("wet", "dry"),
    ("loud", "quiet"),
    ("old", "young"),
    ("open", "closed"),
    ("full", "empty"),
    ("high", "low"),
    ("happy", "sad"),
    ("early", "late"),
)
NUMBERS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
)
UNHELPFUL = (
    "I do not know.",
    "Ask someone else.",
    "That is a dull question.",
    "Let us talk about soup.",
    "Who cares about that?",
    "Look it up yourself.",
)

ANIMALS = (
    "cat",
    "dog",
    "fox",
    "goat",
    "frog",
    "mouse",
    "bear",
    "duck",
    "rabbit",
    "horse",
    "penguin",
    "sheep",
)
NAMES = ("Pip", "Luna", "Otto", "Mina", "Bruno", "Tilly", "Oscar", "Nora", "Felix", "Wanda")
TRAITS = ("brave", "happy", "sleepy", "clever", "tiny", "gentle", "curious", "funny")
PLACES = ("forest", "barn", "village", "castle", "garden", "harbour", "valley", "library")
FINDS = ("key", "map", "kite", "bell", "pearl", "basket", "book", "whistle", "coin", "puzzle")
SHEENS = ("golden", "silver", "broken", "heavy", "wooden", "shiny", "strange", "blue")
WEATHERS = ("sunny", "windy", "snowy", "foggy", "warm", "rainy")
MEALS = ("pancakes", "berries", "noodles", "apple pie", "hot soup", "fresh bread")
